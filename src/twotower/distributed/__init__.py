"""Processes of a run: their start, their communication, and the tensor rows that they share."""
