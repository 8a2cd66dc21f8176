"""File reading: formats, validation, feature tables, id lists, and the layout of stored data."""
