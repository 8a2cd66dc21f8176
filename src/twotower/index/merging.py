"""Merging of searches over parts of a catalog into the result of one search over the whole catalog."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.index.ties import splitmix64


def merge_best(scores: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Merge W lists into the K best of each row, equal scores in the order of `tie_order`.

    Args:
        scores: [W, B, K] float32, -inf where a list is shorter.
        items: [W, B, K] int64 codes, distinct within a row over all lists; -1 where a list is shorter.

    Returns:
        Scores and items, [B, K] each.
    """
    width = items.shape[2]
    every = items.permute(1, 0, 2).flatten(1)
    flat = scores.permute(1, 0, 2).flatten(1)
    hashed = splitmix64(every.cpu().numpy()) ^ np.uint64(1 << 63)  # keeps the order when read as signed numbers
    by_tie = torch.from_numpy(hashed.view(np.int64)).to(every.device).argsort(dim=1, stable=True)
    by_score = flat.gather(1, by_tie).argsort(dim=1, descending=True, stable=True)[:, :width]
    chosen = by_tie.gather(1, by_score)
    return flat.gather(1, chosen), every.gather(1, chosen)
