"""A background thread for one task at a time, used to write a checkpoint while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs one task at a time in a separate thread, and keeps its error for the next call.

    The interpreter waits for the task before it exits, so nothing is left half done.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start a task, after the previous one has ended.

        Raises:
            Exception: the error of the previous task; the new one is not started then.
        """
        self.wait()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = self._threads.submit(work)

    def wait(self) -> None:
        """Wait until no task is running.

        Raises:
            Exception: the error of the task, raised once.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread. An error not yet raised is dropped: another one is propagating already."""
        threads, self._threads, self._running = self._threads, None, None
        if threads is not None:
            threads.shutdown(wait=True)
