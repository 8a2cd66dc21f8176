"""The order of items with equal scores, fixed and pseudo-random, and the merge of partial searches that keeps it.

A model that gives every item the same score must not do better than chance in an evaluation. If ties were broken by
item code, it would do better whenever codes follow popularity or time. So equal scores are ordered by a hash of the
code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.hashing import GOLDEN, mix64


def splitmix64(codes: np.ndarray) -> np.ndarray:
    """Compute the splitmix64 hash of each code.

    Args:
        codes: [N] non-negative integers.

    Returns:
        [N] uint64; the hash is a bijection, so distinct codes never share a hash.
    """
    return mix64((codes.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def tie_order(num_items: int, first: int = 0) -> Tensor:
    """Return the item codes in tie order: from the item that wins every tie to the item that loses every tie.

    The order depends only on the codes: it is the same in every process, on every device and for every model, and the
    order of two items does not change when the catalog grows.

    Args:
        num_items: N, the size of the catalog.
        first: code of the first item, for a contiguous part of a larger catalog.

    Returns:
        [N] int64, a permutation of 0 .. N-1: codes minus `first`.
    """
    hashes = splitmix64(np.arange(first, first + num_items, dtype=np.uint64))
    return torch.from_numpy(np.argsort(hashes, kind="stable").astype(np.int64))


def best_of(scores: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the K best of each row, equal scores in the order of `tie_order`.

    Args:
        scores: [B, M] float32, -inf where there is no item.
        items: [B, M] int64 codes, distinct within a row; -1 where there is no item.
        k: K, number of items per row.

    Returns:
        Scores and items, [B, min(K, M)] each.
    """
    k = min(k, scores.shape[1])
    if not k or not len(scores):
        return scores[:, :k], items[:, :k]
    top, place = scores.topk(k, dim=1)
    best = merge_best(top[None], items.gather(1, place)[None])
    # If more than K items have at least the K-th score, the hash decides which of them are chosen.
    tied = ((scores >= top[:, -1:]).sum(1) > k) & (top[:, -1] > -torch.inf)
    if bool(tied.any()):
        among = merge_best(scores[None, tied], items[None, tied])
        for chosen, sorted_rows in zip(best, among, strict=True):
            chosen[tied] = sorted_rows[:, :k]
    return best


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
