"""The order of items with equal scores: fixed and pseudo-random.

A model that gives every item the same score must not evaluate better than chance. Ties broken by item code would reward
it if codes follow popularity or time, so equal scores are ordered by a hash of the code, which depends on neither.
"""

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
    """Return the item codes from the one that wins every tie to the one that loses every tie.

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
