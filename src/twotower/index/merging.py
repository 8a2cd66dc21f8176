"""The best items of several searches, each over its own part of a catalog, as one search over all would give them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.index.ties import splitmix64


def merge_best(scores: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """The K best of W lists for each row, in the order of `tie_order` among equal scores.

    Args:
        scores: [W, B, K] float32, -inf where a list had no more items.
        items: [W, B, K] int64 codes, distinct within a row over all lists; -1 where a list had no more.

    Returns:
        Scores and items, [B, K] each.
    """
    width = items.shape[2]
    every = items.permute(1, 0, 2).flatten(1)
    told = scores.permute(1, 0, 2).flatten(1)
    hashed = splitmix64(every.cpu().numpy()) ^ np.uint64(1 << 63)  # as signed numbers they keep their order
    by_tie = torch.from_numpy(hashed.view(np.int64)).to(every.device).argsort(dim=1, stable=True)
    by_score = told.gather(1, by_tie).argsort(dim=1, descending=True, stable=True)[:, :width]
    chosen = by_tie.gather(1, by_score)
    return told.gather(1, chosen), every.gather(1, chosen)
