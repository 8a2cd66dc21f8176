"""Settings of this process that make training faster: an allocator that keeps its memory, one thread for each core.

The command line applies them when it starts. A library user may, with `tune`, before the first large tensors are made.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

from twotower import machine

# mallopt(3): the numbers of its parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Blocks below this many bytes are kept for reuse, larger ones returned to the system; some glibc allow 32 MiB at most.
#: Before 2.38 glibc finds a hole for an aligned block, as torch's are, only after making several: the larger the
#: blocks that are kept, the more memory lies idle.
KEPT_BELOW = (1 << 27, 1 << 25)
#: So much free memory at the end of the heap is kept, and no more.
KEPT_IN_ALL = 1 << 30
#: madvise(2).
MADV_HUGEPAGE = 14
HUGE_PAGE = 1 << 21


@dataclass(frozen=True)
class Tuning:
    """What `tune` has set.

    Attributes:
        kept_below: blocks smaller than this are kept for reuse, bytes; None where the allocator was left alone.
        threads: threads for torch; None where they were left alone, as when OMP_NUM_THREADS says how many.
    """

    kept_below: int | None
    threads: int | None


_applied: dict[str, Tuning] = {}


def tune() -> Tuning:
    """Keep freed memory for reuse, and use one thread for each physical core; the second call changes nothing.

    By default glibc takes every block of more than 128 KiB (later up to 32 MiB) from the system and gives it back when
    it is freed. The temporaries of a training step are such blocks: the system zeroes and maps them page by page, every
    step anew. What the user has set in the environment (MALLOC_*, GLIBC_TUNABLES, OMP_NUM_THREADS) is left alone.
    """
    if "tuning" not in _applied:
        _applied["tuning"] = Tuning(keep_freed_memory(), use_every_core())
    return _applied["tuning"]


def tuning() -> Tuning | None:
    """What `tune` has set; None before it was called."""
    return _applied.get("tuning")


def allocator() -> str:
    """The C library's allocator, by name and version where it is known; or the one preloaded in its place."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preloaded:
            return name
    return " ".join(platform.libc_ver()).strip() or "unknown"


def keep_freed_memory() -> int | None:
    """Let glibc keep what is freed; returns the size of block from which on it does not, None where nothing was set."""
    if not allocator().startswith("glibc") or sys.platform != "linux":
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(k.startswith("MALLOC_") for k in os.environ):
        return None
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return None
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    for size in KEPT_BELOW:
        if mallopt(M_MMAP_THRESHOLD, size):
            mallopt(M_TRIM_THRESHOLD, KEPT_IN_ALL)
            return size
    return None


def use_every_core() -> int | None:
    """One thread for each physical core, unless OMP_NUM_THREADS is set; returns how many, None where left alone.

    torch counts hardware threads, and in a container all those of the machine.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    count = machine.cores()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
    else:  # read when torch is imported; importing it here would slow `--help` down
        os.environ["OMP_NUM_THREADS"] = str(count)
    return count


def advise_huge_pages(address: int, size: int) -> bool:
    """Ask for pages of 2 MiB instead of 4 KiB in a block that has not been written to yet; whether it was granted.

    Rows of a large table lie on as many pages as they are many, and each 4 KiB page needs an entry of its own in the
    processor's small table of addresses. A request, and harmless where it cannot be granted.

    Args:
        address: where the block starts.
        size: its length in bytes; nothing is asked for blocks below two huge pages.
    """
    start, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    if sys.platform != "linux" or end <= start:
        return False
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return False
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return int(madvise(start, end - start, MADV_HUGEPAGE)) == 0
