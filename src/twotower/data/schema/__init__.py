"""Columns, ids and their codes, and the account of what was read."""
