"""Dynamic batching: requests that arrive together are searched together.

No request waits for others to arrive. While one batch is searched the next one fills, so a single request is answered
at once, and batches grow under load.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from typing import Any

from twotower.serving.http.metrics import Metrics
from twotower.serving.http.problems import Problem

#: Answers the requests of one batch, in order; an exception in the result concerns one request only.
Run = Callable[[Any, Sequence[Any]], Sequence[Any]]

_Waiting = list[tuple[Any, "asyncio.Future[Any]"]]


class Batcher:
    """A queue that collects requests with the same settings and answers them in one call.

    Args:
        run: `run(key, questions)`, called in `executor`, one batch at a time.
        executor: executor that `run` is called in.
        capacity: maximum number of waiting requests.
        largest: maximum number of requests in one batch.
        metrics: metrics that count batches and refusals.
    """

    def __init__(self, run: Run, executor: Executor, *, capacity: int, largest: int, metrics: Metrics) -> None:
        self._run = run
        self._executor = executor
        self._capacity = capacity
        self._largest = largest
        self._metrics = metrics
        self._waiting: OrderedDict[Hashable, _Waiting] = OrderedDict()
        self._count = 0
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Start answering; call it in a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Answer the waiting requests, then stop."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task

    async def ask(self, key: Hashable, question: Any) -> Any:
        """Queue a request and wait for its answer.

        Args:
            key: settings; only requests with the same key are answered together.
            question: the request, in the form that `run` expects.

        Raises:
            Problem: 503, too many requests are waiting.
        """
        if self._closing or self._count >= self._capacity:
            self._metrics.refused.inc()
            raise Problem(503, "too many requests are waiting; try again", {"Retry-After": "1"})
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((question, future))
        self._count += 1
        self._metrics.waiting.set(self._count)
        self._arrived.set()
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._count or not self._closing:
            if not self._count:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            key, batch = self._next()
            began = time.perf_counter()
            try:
                answers = await loop.run_in_executor(self._executor, self._run, key, [one for one, _ in batch])
            except Exception as error:  # every request of the batch gets the error
                answers = [error] * len(batch)
            kind = key[0] if isinstance(key, tuple) else "other"
            self._metrics.batches.labels(kind).observe(len(batch))
            self._metrics.search_seconds.labels(kind).observe(time.perf_counter() - began)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():  # the client has disconnected
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _next(self) -> tuple[Hashable, _Waiting]:
        """Take the next batch. Keys take turns, so that none waits until the queue of another is empty."""
        key, waiting = self._waiting.popitem(last=False)
        batch, rest = waiting[: self._largest], waiting[self._largest :]
        if rest:
            self._waiting[key] = rest
        self._count -= len(batch)
        self._metrics.waiting.set(self._count)
        return key, batch
