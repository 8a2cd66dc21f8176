"""What lives as long as the service: models, the queue, threads, and the watch over the model folders."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from twotower.serving.service.answering import Question, RecommendKey, SimilarKey, answer
from twotower.serving.service.batching import Batcher
from twotower.serving.service.metrics import Metrics
from twotower.serving.service.problems import Problem
from twotower.serving.service.settings import ServiceSettings
from twotower.serving.service.swapping import Slots

P = ParamSpec("P")
T = TypeVar("T")

#: Other work than searches that may wait: explanations, filters, maps.
_ASIDE = 64


class _Pools:
    """The threads of a running service."""

    def __init__(self) -> None:
        # One thread searches: a matrix product uses all cores by itself, and batches grow while it is busy.
        self.search = ThreadPoolExecutor(1, "search")
        self.others = ThreadPoolExecutor(2, "others")
        self.loader = ThreadPoolExecutor(1, "loader")

    def shutdown(self) -> None:
        for pool in (self.search, self.others, self.loader):
            pool.shutdown(wait=False, cancel_futures=True)


class Service:
    """The state of one service.

    Args:
        directories: model or run folders.
        settings: options.

    Raises:
        InputError: a model cannot be read.
    """

    def __init__(self, directories: Sequence[Path], settings: ServiceSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.models = Slots(directories, self.metrics)
        self.ready = False
        self._waiting = 0
        self._pools: _Pools | None = None
        self._batcher: Batcher | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to answer."""
        self._pools = _Pools()
        self._batcher = Batcher(
            answer,
            self._pools.search,
            capacity=self.settings.queue,
            largest=self.settings.largest_batch,
            metrics=self.metrics,
        )
        self._batcher.start()
        if self.settings.watch_seconds > 0:
            self._watch = asyncio.get_running_loop().create_task(self._watching())
        self.ready = True

    async def stop(self) -> None:
        """Answer what waits, then end."""
        self.ready = False
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._batcher is not None:
            await self._batcher.stop()
        if self._pools is not None:
            self._pools.shutdown()

    async def ask(self, key: RecommendKey | SimilarKey, question: Question) -> bytes:
        """The JSON that answers a question; a condition is understood before it can hold up others.

        Raises:
            Problem: the queue is full.
            InputError: what is asked cannot be answered.
        """
        if self._batcher is None:
            raise Problem(503, "not ready yet", {"Retry-After": "1"})
        if key.filter is not None:
            await self.aside(key.model.condition, key.filter)
        told: bytes = await self._batcher.ask(key, question)
        return told

    async def aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something in a thread, where few enough wait.

        Raises:
            Problem: 503, too many do.
        """
        if self._waiting >= _ASIDE:
            self.metrics.refused.inc()
            raise Problem(503, "too many requests wait; try again", {"Retry-After": "1"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._running().others, lambda: work(*args, **kwargs)
            )
        finally:
            self._waiting -= 1

    async def reload(self, *, again: bool = True) -> dict[str, str]:
        """Look at the model folders now."""
        return await asyncio.get_running_loop().run_in_executor(
            self._running().loader, lambda: self.models.refresh(again=again)
        )

    def _running(self) -> _Pools:
        if self._pools is None:
            raise Problem(503, "not ready yet", {"Retry-After": "1"})
        return self._pools

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            await self.reload(again=False)
