"""A process that ends with the process that started it, even if that one is killed (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: Variable of a started process: the process id of its parent.
PARENT = "TWOTOWER_PARENT"
#: The request of Linux to get a signal when the parent ends.
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask for SIGTERM at the end of the parent that `PARENT` names; do nothing without the variable.

    A training run that is left behind would keep its run folder locked. At SIGTERM it writes a checkpoint and stops.
    """
    parent = os.environ.pop(PARENT, None)  # not for processes that this one starts
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if str(os.getppid()) != parent:  # it ended before the request
        os.kill(os.getpid(), signal.SIGTERM)
