"""State of a running service: models, threads, the task that watches the model folders, and the queue of searches.

Requests that arrive together are searched together. No request waits for others to arrive: while one batch is searched,
the next one fills. So a single request is answered immediately, and batches grow under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from twotower.serving.http.handlers import PendingRequest, RecommendKey, SimilarKey, answer
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.models import ModelRegistry
from twotower.serving.http.problems import Problem
from twotower.serving.http.settings import ServiceSettings

P = ParamSpec("P")
T = TypeVar("T")

#: Function that answers the requests of one batch, in order; an exception in the result concerns one request only.
AnswerBatch = Callable[[Any, Sequence[Any]], Sequence[Any]]

_Waiting = list[tuple[Any, "asyncio.Future[Any]"]]

#: Maximum number of waiting tasks other than searches: explanations, filters, maps.
_ASIDE = 64


def run_shielded(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work` in a worker thread, and convert any `BaseException` to an `Exception`.

    Native code may raise a `BaseException` (a panic of polars), and a `SystemExit` or `KeyboardInterrupt` in a thread
    concerns only its request, since the process is stopped by signals in the main thread. If they propagated, they
    would end the task that answers all requests.
    """
    try:
        return work(*args, **kwargs)
    except StopIteration as error:  # a future does not accept it
        raise RuntimeError("StopIteration in a worker thread") from error
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__} in a worker thread") from error


class Batcher:
    """A queue that collects requests with the same settings and answers them in one call.

    Args:
        run: `run(key, requests)`, called in `executor`, one batch at a time.
        executor: executor that `run` is called in.
        capacity: maximum number of waiting requests.
        largest: maximum number of requests in one batch.
        metrics: metrics that count batches and rejected requests.
    """

    def __init__(self, run: AnswerBatch, executor: Executor, *, capacity: int, largest: int, metrics: Metrics) -> None:
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

    async def submit(self, key: Hashable, request: Any) -> Any:
        """Queue a request and wait for its answer.

        Args:
            key: settings; only requests with the same key are answered together.
            request: the request, in the form that `run` expects.

        Raises:
            Problem: 503, too many requests are waiting.
        """
        if self._closing or self._count >= self._capacity:
            self._metrics.refused.inc()
            raise Problem(503, "too many requests are waiting; try again", {"Retry-After": "1"})
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((request, future))
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
            requests = [request for request, _ in batch]
            try:
                answers = await loop.run_in_executor(self._executor, run_shielded, self._answers, key, requests)
            except Exception as error:  # every request of the batch gets the error, and the loop continues
                answers = [error] * len(batch)
            kind = key[0] if isinstance(key, tuple) else "other"
            self._metrics.batches.labels(kind).observe(len(batch))
            self._metrics.search_seconds.labels(kind).observe(time.perf_counter() - began)
            for (_, future), found in zip(batch, answers, strict=True):
                if future.done():  # the client disconnected, or the request timed out
                    continue
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)

    def _answers(self, key: Hashable, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch, in its thread."""
        answers = list(self._run(key, requests))
        if len(answers) != len(requests):
            raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests")
        return answers

    def _next(self) -> tuple[Hashable, _Waiting]:
        """Take the next batch. Keys take turns, so that no key waits until the queue of another is empty."""
        key, waiting = self._waiting.popitem(last=False)
        batch, rest = waiting[: self._largest], waiting[self._largest :]
        if rest:
            self._waiting[key] = rest
        self._count -= len(batch)
        self._metrics.waiting.set(self._count)
        return key, batch


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

    async def search(self, key: RecommendKey | SimilarKey, request: PendingRequest) -> bytes:
        """Answer a request with JSON. Its filter is evaluated first, outside the queue, and so delays no other request.

        Raises:
            Problem: 503, the queue is full, or there was no answer in time.
            InputError: the request cannot be answered.
        """
        if self._batcher is None:
            raise Problem(503, "not ready yet", {"Retry-After": "1"})
        async with self._in_time():
            if key.filter is not None:
                await self.aside(key.model.condition, key.filter)
            body: bytes = await self._batcher.submit(key, request)
        return body

    async def aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work in a thread, outside the search queue.

        Raises:
            Problem: 503, too many tasks are waiting, or there was no answer in time.
        """
        if self._waiting >= _ASIDE:
            self.metrics.refused.inc()
            raise Problem(503, "too many requests are waiting; try again", {"Retry-After": "1"})
        self._waiting += 1
        try:
            async with self._in_time():
                return await asyncio.get_running_loop().run_in_executor(
                    self._running().others, lambda: run_shielded(work, *args, **kwargs)
                )
        finally:
            self._waiting -= 1

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Limit the time that a client waits for an answer; the thread itself cannot be stopped."""
        try:
            async with asyncio.timeout(self.settings.answer_seconds):
                yield
        except TimeoutError:
            raise Problem(
                503, f"no answer within {self.settings.answer_seconds:g} seconds; try again", {"Retry-After": "1"}
            ) from None

    async def reload(self, *, again: bool = True) -> dict[str, str]:
        """Check the model folders for new models now; return the result for each model by name."""
        return await asyncio.get_running_loop().run_in_executor(
            self._running().loader, lambda: run_shielded(self.models.refresh, again=again)
        )

    def _running(self) -> _Pools:
        if self._pools is None:
            raise Problem(503, "not ready yet", {"Retry-After": "1"})
        return self._pools

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            await self.reload(again=False)
