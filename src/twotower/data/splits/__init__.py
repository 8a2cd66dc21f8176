"""Splits into training, validation and test, by a protocol or from files."""

from twotower.data.splits.from_files import from_parts
from twotower.data.splits.holdout import Holdout
from twotower.data.splits.protocols import Split, by_time, held_out_queries, leave_last_out, random_rows, rolling

__all__ = [
    "Holdout",
    "Split",
    "by_time",
    "from_parts",
    "held_out_queries",
    "leave_last_out",
    "random_rows",
    "rolling",
]
