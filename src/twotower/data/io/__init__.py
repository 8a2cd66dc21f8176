"""Reading files: formats, validation, tables of features, lists of ids, and the layout of stored data."""
