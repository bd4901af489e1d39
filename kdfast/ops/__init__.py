"""Building blocks of the engines: the problem, products, collectives, transforms, a sparse teacher's arithmetic."""
