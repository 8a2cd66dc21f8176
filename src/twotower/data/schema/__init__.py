"""Columns, ids and codes, and the account of the data read."""
