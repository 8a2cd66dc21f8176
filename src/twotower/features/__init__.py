"""Features of items, queries and requests: from columns to encoded arrays."""
