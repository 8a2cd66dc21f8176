"""Training batches: row order, histories, sequences and time gaps."""
