"""Losses as pure functions, and objectives, which pair a loss with a pool of candidates."""

from twotower.losses.binary import BPR, GeneralisedBCE, Logistic
from twotower.losses.logistic import bpr, gbce, gbce_beta, logistic
from twotower.losses.objectives import (
    Embedded,
    Objective,
    PositiveCorrectedSoftmax,
    RefinedLogQ,
    SampledSoftmax,
    corrected_logits,
)
from twotower.losses.softmax import candidate_logits, full_softmax, refined_logq, sampled_softmax
from twotower.losses.tiled import tiled_bpr, tiled_full_softmax, tiled_logistic, tiled_softmax

__all__ = [
    "BPR",
    "Embedded",
    "GeneralisedBCE",
    "Logistic",
    "Objective",
    "PositiveCorrectedSoftmax",
    "RefinedLogQ",
    "SampledSoftmax",
    "bpr",
    "candidate_logits",
    "corrected_logits",
    "full_softmax",
    "gbce",
    "gbce_beta",
    "logistic",
    "refined_logq",
    "sampled_softmax",
    "tiled_bpr",
    "tiled_full_softmax",
    "tiled_logistic",
    "tiled_softmax",
]
