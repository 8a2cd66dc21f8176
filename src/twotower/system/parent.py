"""Ending a process when its parent ends, even if the parent is killed (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: Environment variable with the process id of the parent; the parent sets it for its child.
PARENT = "TWOTOWER_PARENT"
#: The `prctl` option that requests a signal when the parent ends.
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Request SIGTERM when the parent ends; do nothing if the variable `PARENT` is not set.

    An orphaned training run would keep its run folder locked. On SIGTERM it writes a checkpoint and stops.
    """
    parent = os.environ.pop(PARENT, None)  # children must not inherit it
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if str(os.getppid()) != parent:  # the parent ended before the request
        os.kill(os.getpid(), signal.SIGTERM)
