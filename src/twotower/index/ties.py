"""The one order among equal scores: a fixed pseudo-random order of the items.

A model that gives every item the same score must not score better than chance. Ties broken by item code would
reward it wherever codes follow popularity or time, so equal scores are ordered by a hash of the code, which knows
of neither.
"""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(codes: np.ndarray) -> np.ndarray:
    """The splitmix64 hash of each code.

    Args:
        codes: [N] non-negative integers.

    Returns:
        [N] uint64, a bijection of the input: distinct codes never share a hash.
    """
    # Arithmetic on unsigned arrays wraps modulo 2^64, which is what the hash is defined by.
    z = (codes.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)))


def tie_order(num_items: int, first: int = 0) -> Tensor:
    """The item codes from the one that wins every tie to the one that loses every tie.

    The order depends on the codes alone: it is the same in every process, on every device, for every model, and
    the order of two items does not change when the catalog grows.

    Args:
        num_items: N, the size of the catalog.
        first: code of its first item, where it is a run of a larger catalog.

    Returns:
        [N] int64, a permutation of 0 .. N-1: codes less `first`.
    """
    hashes = splitmix64(np.arange(first, first + num_items, dtype=np.uint64))
    return torch.from_numpy(np.argsort(hashes, kind="stable").astype(np.int64))
