"""Reading of files: formats, validation, feature tables, id lists, and the layout of stored data."""
