"""Mixing of integers: pseudo-random numbers that are computed from a number instead of drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: The step of splitmix64's counter: 2^64 over the golden ratio.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): each bit of a number decides every bit of the outcome.

    A bijection; arithmetic on unsigned arrays wraps modulo 2^64, which is what it is defined by.

    Args:
        numbers: uint64, any shape.
    """
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
