"""Conversion of files to sorted, coded columns, in bounded memory and with several workers."""
