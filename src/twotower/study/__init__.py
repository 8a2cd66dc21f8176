"""The search for settings: `twotower tune`."""

from twotower.study.tune import Budget, Tuned, tune_run

__all__ = ["Budget", "Tuned", "tune_run"]
