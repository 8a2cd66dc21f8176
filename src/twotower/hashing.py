"""Hashes: integer mixing, which computes pseudo-random numbers from integers, and checksums of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: Increment of splitmix64's counter: 2^64 divided by the golden ratio.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix each number with the finaliser of splitmix64 (Steele, Lea and Flood 2014).

    A bijection in which every input bit affects every output bit. Its arithmetic is modulo 2^64, which is how unsigned
    arrays wrap.

    Args:
        numbers: uint64, any shape.
    """
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
