"""A progress bar that appears only for slow work."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Seconds before the bar appears.
PATIENCE = 3.0


class SlowProgress:
    """A progress bar on standard error that appears only if the work takes long, and only on a terminal.

    Args:
        title: description of the work.
        patience: seconds before the bar appears.

    Example:
        >>> with SlowProgress("ranking") as progress:
        ...     for done in range(1, 4):
        ...         progress(done, 3)
    """

    def __init__(self, title: str, patience: float = PATIENCE) -> None:
        self._title, self._from = title, time.monotonic() + patience
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> SlowProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` steps are done."""
        if self._bar is None:
            if time.monotonic() < self._from or not sys.stderr.isatty():
                return
            # Standard output is for results.
            from rich.console import Console  # noqa: PLC0415  # needed only for slow work
            from rich.progress import Progress  # noqa: PLC0415

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=total)
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
