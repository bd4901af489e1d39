"""What engines are made of: the problem, products, collectives, a sparse teacher's arithmetic."""
