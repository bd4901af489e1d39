"""Training data: text to batches."""
