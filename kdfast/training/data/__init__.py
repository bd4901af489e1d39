"""Training data: from text to batches."""
