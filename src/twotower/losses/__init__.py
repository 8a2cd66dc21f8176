"""Losses as pure functions of embeddings and log counts: one value per row, or in the tiled forms a weighted sum."""

from twotower.losses.binary import bpr, gbce, gbce_beta, logistic, slate_logistic, slate_pairwise
from twotower.losses.softmax import candidate_logits, full_softmax, refined_logq, sampled_softmax
from twotower.losses.tiled import tiled_bpr, tiled_full_softmax, tiled_logistic, tiled_softmax

__all__ = [
    "bpr",
    "candidate_logits",
    "full_softmax",
    "gbce",
    "gbce_beta",
    "logistic",
    "refined_logq",
    "sampled_softmax",
    "slate_logistic",
    "slate_pairwise",
    "tiled_bpr",
    "tiled_full_softmax",
    "tiled_logistic",
    "tiled_softmax",
]
