"""The machine: files, hardware and process settings."""
