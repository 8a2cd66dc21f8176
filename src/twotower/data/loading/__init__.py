"""Batches for training: order, histories, sequences and time gaps."""
