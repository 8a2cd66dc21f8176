"""The machine: files, hardware, and the settings of this process."""
