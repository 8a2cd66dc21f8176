"""Objectives: a loss paired with the pool of candidates that it is correct for."""

from twotower.objectives.base import (
    Objective,
    PositiveCorrectedSoftmax,
    RefinedLogQ,
    SampledSoftmax,
    corrected_logits,
)
from twotower.objectives.binary import BPR, GeneralisedBCE, Logistic
from twotower.objectives.embeddings import Embedded
from twotower.objectives.feedback import Feedback

__all__ = [
    "BPR",
    "Embedded",
    "Feedback",
    "GeneralisedBCE",
    "Logistic",
    "Objective",
    "PositiveCorrectedSoftmax",
    "RefinedLogQ",
    "SampledSoftmax",
    "corrected_logits",
]
