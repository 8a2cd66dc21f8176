"""From settings to a trained, evaluated model."""

from twotower.run.batches import history_length, make_batches, row_gaps
from twotower.run.data import propose_features, read_data, split_data
from twotower.run.model import Model, continue_with, evaluate, fit
from twotower.run.run_folder import audit_run, evaluate_run, reread, settings_of, train_run

__all__ = [
    "Model",
    "audit_run",
    "continue_with",
    "evaluate",
    "evaluate_run",
    "fit",
    "history_length",
    "make_batches",
    "propose_features",
    "read_data",
    "reread",
    "row_gaps",
    "settings_of",
    "split_data",
    "train_run",
]
