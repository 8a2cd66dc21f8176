"""The order of training rows (a shuffle that is computed, not stored), the position in it, and prefetching."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.hashing import mix64

T = TypeVar("T")

ROUNDS = 8


class Shuffle:
    """A pseudo-random bijection of 0..n-1, keyed by seed and epoch.

    A Feistel network permutes 0..m-1, where m is a power of four and at least n. A result outside 0..n-1 is
    permuted again until it is inside (cycle walking; Black and Rogaway 2002); this takes fewer than four passes on
    average.

    Args:
        n: number of values, above 0.
        seed: 0 or more.
        epoch: 0 or more; the order differs between epochs.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise InputError(f"shuffle: n={n}; expected at least 1.")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at these positions in 0..n-1, int64 of the same shape."""
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


class EpochPosition:
    """The position of an iteration over epochs, saved in checkpoints and validated when restored.

    A subclass yields batches, sets `seed`, `epoch` and `position`, and defines `_fixed`, which returns the values that
    determine its order.
    """

    seed: int
    epoch: int
    position: int

    def _fixed(self) -> dict[str, int]:
        raise NotImplementedError

    def rest(self, make: Callable[[int], T], count: int) -> Iterator[T]:
        """Yield ``make(position)`` for the rest of an epoch of `count` batches, then advance to the next epoch."""
        for batch in ahead(make, self.position, count):
            # `position` counts the yielded batches, not the prepared ones. It advances before the yield, so that a
            # state saved while a batch is in use already includes that batch.
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch; for the current epoch, keep the position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch, the number of batches already yielded, and the values that determine the order."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved `state_dict`, in the same order.

        Raises:
            InputError: the values that determine the order differ, for example because of different data or batch size.
        """
        for name, here in self._fixed().items():
            if state.get(name) != here:
                raise InputError(
                    f"batches: the saved state has {name} {state.get(name)}, but here it is {here}; start a new run."
                )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]


def require_at_least(**values: tuple[int, int]) -> None:
    """Check settings of batches, each given as (value, smallest allowed value).

    Raises:
        InputError: a value is too small.
    """
    for name, (value, least) in values.items():
        if value < least:
            raise InputError(f"{name}: {value}; expected at least {least}.")


#: Number of batches computed ahead: enough to hide a slow batch, few enough to need little memory.
DEPTH = 3


def ahead(make: Callable[[int], T], start: int, stop: int, *, depth: int = DEPTH) -> Iterator[T]:
    """Yield ``make(start), ..., make(stop - 1)`` in order, computed on a background thread up to `depth` ahead.

    A single thread computes the results sequentially, so `make` need not be thread-safe. An exception in `make` is
    raised when its result is requested. The thread stops with the iterator: when it is exhausted, fails, is interrupted
    by Ctrl-C, is closed or is garbage collected.

    Args:
        make: function called once with each number, on the background thread.
        start: the first number.
        stop: one past the last number.
        depth: number of results to compute ahead, at least 1.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        waiting: deque[Future[T]] = deque()
        upcoming = iter(range(start, stop))
        try:
            while True:
                while len(waiting) < depth and (number := next(upcoming, None)) is not None:
                    waiting.append(thread.submit(make, number))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
