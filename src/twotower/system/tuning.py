"""Process settings that make training faster: an allocator that keeps freed memory, and one thread per core.

The command line applies them at startup. Library users can call `tune` before they create the first large tensors.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

from twotower.system import hardware

# mallopt(3): parameter numbers from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Blocks below this many bytes are kept for reuse, larger ones are returned to the system. The second value is for
#: versions of glibc that allow at most 32 MiB. Before 2.38, glibc reuses a hole for an aligned block, as torch's are,
#: only after several have accumulated: the larger the blocks that are kept, the more memory lies idle.
KEPT_BELOW = (1 << 27, 1 << 25)
#: Keep at most this much free memory at the end of the heap.
KEPT_IN_ALL = 1 << 30
#: madvise(2).
MADV_HUGEPAGE = 14
HUGE_PAGE = 1 << 21


@dataclass(frozen=True)
class Tuning:
    """The settings made by `tune`.

    Attributes:
        kept_below: blocks smaller than this many bytes are kept for reuse; None if the allocator was not changed.
        threads: threads for torch; None if not changed, for example because OMP_NUM_THREADS is set.
    """

    kept_below: int | None
    threads: int | None


_applied: dict[str, Tuning] = {}


def tune() -> Tuning:
    """Keep freed memory for reuse, and use one thread per physical core; a second call does nothing.

    By default glibc takes every block of more than 128 KiB (later up to 32 MiB) from the system and returns it when it
    is freed. The temporaries of a training step are such blocks, so in every step the system zeroes them and maps them
    page by page. Settings in the environment (MALLOC_*, GLIBC_TUNABLES, OMP_NUM_THREADS) take precedence.
    """
    if "tuning" not in _applied:
        _applied["tuning"] = Tuning(keep_freed_memory(), use_every_core())
    return _applied["tuning"]


def tuning() -> Tuning | None:
    """Return the settings made by `tune`; None before it was called."""
    return _applied.get("tuning")


def allocator() -> str:
    """Return the name of the memory allocator: a preloaded one, or the C library with its version."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preloaded:
            return name
    return " ".join(platform.libc_ver()).strip() or "unknown"


def keep_freed_memory() -> int | None:
    """Let glibc keep freed blocks; return the size below which it keeps them, or None if nothing was changed."""
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
    """Use one thread per physical core unless OMP_NUM_THREADS is set; return the number, or None if not changed.

    torch by default counts hardware threads, and in a container all those of the machine.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    count = hardware.cores()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
    else:  # torch reads it when it is imported; importing torch here would slow down `--help`
        os.environ["OMP_NUM_THREADS"] = str(count)
    return count


def advise_huge_pages(address: int, size: int) -> bool:
    """Request 2 MiB pages instead of 4 KiB pages for a block that has not been written yet; return whether it worked.

    Lookups in a large table touch about one page per row, and each 4 KiB page needs its own entry in the TLB, which is
    small. This is only a hint: if it cannot be granted, nothing changes.

    Args:
        address: start of the block.
        size: its length in bytes; blocks that contain no whole huge page are left alone.
    """
    start, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    if sys.platform != "linux" or end <= start:
        return False
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return False
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return int(madvise(start, end - start, MADV_HUGEPAGE)) == 0
