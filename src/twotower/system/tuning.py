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
#: Blocks smaller than this many bytes are kept for reuse; larger blocks are returned to the system. The second value is
#: for versions of glibc that allow at most 32 MiB. Before 2.38, glibc reuses a hole for an aligned block, such as those
#: of torch, only after several holes have accumulated, so a higher limit would leave more memory idle.
KEPT_BELOW = (1 << 27, 1 << 25)
#: Maximum free memory kept at the end of the heap, in bytes.
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

    By default glibc takes every block above a threshold (128 KiB at first, later up to 32 MiB) from the system and
    returns it when it is freed. The temporaries of a training step are such blocks, so in every step the system zeroes
    and maps them page by page. Settings in the environment (MALLOC_*, GLIBC_TUNABLES, OMP_NUM_THREADS) take precedence.
    """
    if "tuning" not in _applied:
        _applied["tuning"] = Tuning(keep_freed_memory(), use_every_core())
    return _applied["tuning"]


def tuning() -> Tuning | None:
    """Return the settings made by `tune`; None before the first call of `tune`."""
    return _applied.get("tuning")


def allocator() -> str:
    """Return the name of the memory allocator: a preloaded allocator, or the C library with its version."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preloaded:
            return name
    return " ".join(platform.libc_ver()).strip() or "unknown"


def keep_freed_memory() -> int | None:
    """Let glibc keep freed blocks; return the size below which blocks are kept, or None if nothing was changed."""
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
    """Use one thread per physical core unless OMP_NUM_THREADS is set; return their number, or None if unchanged.

    By default torch ignores the core limit of a container, and it may use one thread per hardware thread.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    count = hardware.cores()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
    else:  # torch reads the variable on import; importing torch here would slow down `--help`
        os.environ["OMP_NUM_THREADS"] = str(count)
    return count


def advise_huge_pages(address: int, size: int) -> bool:
    """Request 2 MiB instead of 4 KiB pages for a block that has not been written yet.

    Lookups in a large table touch about one page per row, and each 4 KiB page needs its own entry in the small TLB.
    The request is only a hint: if the system does not grant it, nothing changes.

    Args:
        address: start of the block.
        size: length of the block in bytes; a block without a whole huge page is not changed.

    Returns:
        Whether the system accepted the request.
    """
    start, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    if sys.platform != "linux" or end <= start:
        return False
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return False
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return int(madvise(start, end - start, MADV_HUGEPAGE)) == 0
