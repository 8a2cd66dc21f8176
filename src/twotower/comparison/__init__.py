"""Comparison of objectives trained from the same weights and evaluated on the same queries, with tests and a report."""

from twotower.comparison.compare import Comparison, compare_run
from twotower.comparison.single_model import evaluate_folder
from twotower.comparison.sweep import Sweep

__all__ = [
    "Comparison",
    "Sweep",
    "compare_run",
    "evaluate_folder",
]
