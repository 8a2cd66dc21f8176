"""Processes of one run: what they exchange, how they start, and rows of tensors that they share."""
