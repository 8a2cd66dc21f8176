"""Work done ahead of need, on a thread beside the one that needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: Batches made ahead: enough to even out a slow one, few enough not to matter in memory.
DEPTH = 3


def ahead(make: Callable[[int], T], start: int, stop: int, *, depth: int = DEPTH) -> Iterator[T]:
    """``make(start), ..., make(stop - 1)`` in order, made on another thread up to `depth` ahead.

    One thread makes them one after the other, so `make` need not be safe for several. What is raised in it is raised
    here when its turn comes. The thread ends with the iterator: at its end, on an error, on Ctrl-C, or when it is
    closed or dropped.

    Args:
        make: called with each number once, on the other thread.
        start: the first number.
        stop: the number after the last.
        depth: how many are made ahead, at least 1.
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
