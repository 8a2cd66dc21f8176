"""Objectives side by side: trained from the same start, measured on the same queries, tested, reported."""

from twotower.comparison.comparing import Comparison, compare_run
from twotower.comparison.single import evaluate_folder

__all__ = ["Comparison", "compare_run", "evaluate_folder"]
