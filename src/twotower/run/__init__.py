"""Training and evaluation from a configuration. Only this package and `build.py` map names to classes."""

from twotower.run.batches import gaps_of, history_length, make_batches
from twotower.run.fitting import Model, continue_with, fit
from twotower.run.folders import audit_run, evaluate_run, reread, settings_of, train_run
from twotower.run.measuring import evaluate
from twotower.run.reading import propose_features, read_data, split_data

__all__ = [
    "Model",
    "audit_run",
    "continue_with",
    "evaluate",
    "evaluate_run",
    "fit",
    "gaps_of",
    "history_length",
    "make_batches",
    "propose_features",
    "read_data",
    "reread",
    "settings_of",
    "split_data",
    "train_run",
]
