"""State of a running service: models, queue, threads, and the task that watches the model folders."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from twotower.serving.http.batching import Batcher
from twotower.serving.http.handlers import PendingRequest, RecommendKey, SimilarKey, answer
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.problems import Problem
from twotower.serving.http.reload import ModelRegistry
from twotower.serving.http.settings import ServiceSettings

P = ParamSpec("P")
T = TypeVar("T")

#: Other tasks than searches that may wait: explanations, filters, maps.
_ASIDE = 64


class _Pools:
    """Thread pools of a running service."""

    def __init__(self) -> None:
        # One thread for searches: a matrix product uses all cores by itself, and batches grow while it is busy.
        self.search = ThreadPoolExecutor(1, "search")
        self.others = ThreadPoolExecutor(2, "others")
        self.loader = ThreadPoolExecutor(1, "loader")

    def shutdown(self) -> None:
        for pool in (self.search, self.others, self.loader):
            pool.shutdown(wait=False, cancel_futures=True)


class Service:
    """Models, queue and threads of one service.

    Args:
        directories: model or run folders.
        settings: options of the service.

    Raises:
        InputError: a model cannot be read.
    """

    def __init__(self, directories: Sequence[Path], settings: ServiceSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.models = ModelRegistry(directories, self.metrics)
        self.ready = False
        self._waiting = 0
        self._pools: _Pools | None = None
        self._batcher: Batcher | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start answering requests."""
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
        """Answer the waiting requests, then stop."""
        self.ready = False
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._batcher is not None:
            await self._batcher.stop()
        if self._pools is not None:
            self._pools.shutdown()

    async def ask(self, key: RecommendKey | SimilarKey, question: PendingRequest) -> bytes:
        """Answer a request with JSON. Its filter is evaluated first, so that it cannot delay other requests.

        Raises:
            Problem: the queue is full.
            InputError: the request cannot be answered.
        """
        if self._batcher is None:
            raise Problem(503, "not ready yet", {"Retry-After": "1"})
        if key.filter is not None:
            await self.aside(key.model.condition, key.filter)
        body: bytes = await self._batcher.ask(key, question)
        return body

    async def aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work in a thread, outside the search queue.

        Raises:
            Problem: 503, too many tasks are waiting.
        """
        if self._waiting >= _ASIDE:
            self.metrics.refused.inc()
            raise Problem(503, "too many requests are waiting; try again", {"Retry-After": "1"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._running().others, lambda: work(*args, **kwargs)
            )
        finally:
            self._waiting -= 1

    async def reload(self, *, again: bool = True) -> dict[str, str]:
        """Check the model folders for new models now."""
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
