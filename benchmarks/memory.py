"""Resident memory of this process, in MiB."""

import ctypes
from pathlib import Path

from twotower.system import hardware


def resident_mib() -> float:
    """Return the current resident size."""
    return (hardware.resident_memory() or 0) / 2**20


def peak_mib() -> float:
    """Return the peak resident size, since `forget_peak` if that was called."""
    return (hardware.peak_memory() or 0) / 2**20


def forget_peak() -> None:
    """Reset the peak (Linux with glibc).

    Freed memory is first returned to the system: reusing it would not count as growth, and results would depend on how
    much happened to be free.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
