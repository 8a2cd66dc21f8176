"""The losses computed in tiles, without a matrix of all logits in memory."""

from twotower.losses.tiled.api import tiled_bpr, tiled_full_softmax, tiled_logistic, tiled_softmax

__all__ = [
    "tiled_bpr",
    "tiled_full_softmax",
    "tiled_logistic",
    "tiled_softmax",
]
