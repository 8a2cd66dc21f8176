"""Checkpoints without pickle: writing, reading, sharded tables and lazy reads."""
