"""Runs: from settings to a trained, evaluated model."""

from twotower.run.advice import settings_to_try, with_advice
from twotower.run.batches import make_batches, row_gaps
from twotower.run.data import propose_features, read_data, split_data, split_options
from twotower.run.model import Model, continue_with, evaluate, fit, refit
from twotower.run.run_folder import annotated, audit_run, reread, train_run
from twotower.run.settings import settings_of

__all__ = [
    "Model",
    "annotated",
    "audit_run",
    "continue_with",
    "evaluate",
    "fit",
    "make_batches",
    "propose_features",
    "read_data",
    "refit",
    "reread",
    "row_gaps",
    "settings_of",
    "settings_to_try",
    "split_data",
    "split_options",
    "train_run",
    "with_advice",
]
