"""Prefetching: computing results ahead on a background thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: Batches computed ahead: enough to hide a slow one, few enough to need little memory.
DEPTH = 3


def ahead(make: Callable[[int], T], start: int, stop: int, *, depth: int = DEPTH) -> Iterator[T]:
    """Yield ``make(start), ..., make(stop - 1)`` in order, computed on a background thread up to `depth` ahead.

    A single thread computes one after the other, so `make` need not be thread-safe. An exception in `make` is raised
    here when its result is due. The thread ends with the iterator: at its end, on an error, on Ctrl-C, or when the
    iterator is closed or garbage collected.

    Args:
        make: called once with each number, on the background thread.
        start: the first number.
        stop: one past the last number.
        depth: how many results to compute ahead, at least 1.
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
