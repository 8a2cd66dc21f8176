"""Memory of this process, MiB."""

import ctypes
from pathlib import Path

from twotower import machine


def resident_mib() -> float:
    """What it holds now."""
    return (machine.resident_memory() or 0) / 2**20


def peak_mib() -> float:
    """The most it has held, since `forget_peak` where that was called."""
    return (machine.peak_memory() or 0) / 2**20


def forget_peak() -> None:
    """Measure the peak from here on (Linux with glibc).

    What was freed goes back to the system first: used again, it would be no growth, and a figure would depend on what
    happened to be free.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
