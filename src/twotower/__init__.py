"""Retrieval training whose negatives are corrected by construction."""

__version__ = "0.1.0"
