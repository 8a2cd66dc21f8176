"""A shuffle that is computed instead of stored, in no memory; and the place that an iteration has reached."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.hashing import mix64

ROUNDS = 8


class Shuffle:
    """A pseudo-random bijection of 0..n-1, keyed by seed and epoch.

    A Feistel network permutes a power of four that is at least n; a number that leaves 0..n-1 is sent through again
    until it is back (cycle walking; Black and Rogaway 2002), which takes fewer than four tries on average.

    Args:
        n: how many numbers, above 0.
        seed: 0 or more.
        epoch: 0 or more; each has its own order.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise ValueError(f"a shuffle of {n} numbers")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers at some positions, int64 of the same shape; positions are in 0..n-1."""
        out = self._permute(positions.astype(np.uint64))
        outside = np.flatnonzero(out >= self.n)
        while outside.size:
            out[outside] = self._permute(out[outside])
            outside = outside[out[outside] >= self.n]
        return out.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._low
        for key in self._keys:
            left, right = right, left ^ (mix64(right + key) & self._low)
        return (left << self._half) | right


class Place:
    """Where an iteration is in its epochs: what a checkpoint keeps, and whether it fits.

    A class that gives out batches sets `seed`, `epoch` and `position`, and says in `_fixed` what its order depends on.
    """

    seed: int
    epoch: int
    position: int

    def _fixed(self) -> dict[str, int]:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; where it is the current one, stay at the position reached."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch and the batches of it already given out; and what the order depends on."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, with the same order.

        Raises:
            InputError: what the order depends on differs (other data, another batch size): there is no such place.
        """
        for name, here in self._fixed().items():
            if state.get(name) != here:
                raise InputError(
                    f"batches: the saved state has {name} {state.get(name)}, here it is {here}; start anew."
                )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
