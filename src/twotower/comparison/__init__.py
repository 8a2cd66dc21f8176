"""Comparison of objectives: same initial weights, same test queries, significance tests and a report."""

from twotower.comparison.comparing import Comparison, compare_run
from twotower.comparison.single import evaluate_folder

__all__ = ["Comparison", "compare_run", "evaluate_folder"]
