"""Work beside the training, one piece at a time: the writing of a checkpoint while the next steps are taken."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs one piece of work at a time in a thread of its own, and keeps its error for whoever asks next.

    The interpreter ends only when the work has: a process that comes to its end leaves nothing half done.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, after the one before.

        Raises:
            Exception: what the one before has failed with; nothing is begun then.
        """
        self.wait()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = self._threads.submit(work)

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises:
            Exception: what it has failed with, once.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread. An error that nobody has asked for is dropped: another one is on its way up."""
        threads, self._threads, self._running = self._threads, None, None
        if threads is not None:
            threads.shutdown(wait=True)
