"""What engines are made of: the problem, products, collectives, transforms, a sparse teacher's arithmetic."""
