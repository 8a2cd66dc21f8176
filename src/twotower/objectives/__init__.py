"""Objectives: a loss paired with the pool of candidates that it is correct for."""

from twotower.objectives.base import (
    Embedded,
    Objective,
    PositiveCorrectedSoftmax,
    RefinedLogQ,
    SampledSoftmax,
    corrected_logits,
)
from twotower.objectives.binary import BPR, GeneralisedBCE, Logistic

__all__ = [
    "BPR",
    "Embedded",
    "GeneralisedBCE",
    "Logistic",
    "Objective",
    "PositiveCorrectedSoftmax",
    "RefinedLogQ",
    "SampledSoftmax",
    "corrected_logits",
]
