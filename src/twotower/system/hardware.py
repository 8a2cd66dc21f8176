"""The cores, memory and huge pages that this process may use, as reported by the system."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cores() -> int:
    """Count the physical cores that this process may use, at least 1.

    The hardware threads of a core share its arithmetic units, so matrix products gain nothing from a second thread. A
    container may be allowed fewer cores than it sees, so the quota of the container is respected.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        # All hardware threads of a core list the same siblings.
        siblings = {_text(CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
        count = len(siblings)
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Read the container's core limit from the control group; None if there is no limit."""
    limit = (_text(root / "cpu.max") or "").split()
    if len(limit) == 2 and limit[0].isdigit():
        return int(limit[0]) / int(limit[1])
    quota, period = (_number(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota and period and quota > 0 else None


@dataclass(frozen=True)
class Memory:
    """Amounts of memory in bytes; None where the system reports no value.

    Attributes:
        total: memory of the machine.
        available: memory that can be allocated now without swapping, within the container's and process's limits.
        limit: the smallest of the container's limit and the process's `ulimit -v` and `ulimit -d`; None if none is set.
        resident: resident memory of this process.
        peak: peak resident memory of this process.
    """

    total: int | None
    available: int | None
    limit: int | None
    resident: int | None
    peak: int | None


def memory(processes: int = 1) -> Memory:
    """Read the memory figures from the system.

    Args:
        processes: number of similar processes on this machine. The available memory of the machine and the container is
            divided among them; a `ulimit` applies to each process alone.
    """
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(Path("/proc/meminfo")) or "", re.MULTILINE))
    total = int(table["MemTotal"]) * 1024 if "MemTotal" in table else _physical()
    available = int(table["MemAvailable"]) * 1024 if "MemAvailable" in table else total
    resident = resident_memory()
    group, used = memory_group()
    free = [available] if available is not None else []
    limits = []
    if group is not None:
        limits.append(group)
        free.append(group - used)
    free = [amount // processes for amount in free]
    for allowed, used in process_limits():
        limits.append(allowed)
        free.append(allowed - used)
    least = max(min(free), 0) if free else None
    return Memory(total, least, min(limits, default=None), resident, peak_memory())


def device_memory(accelerator: str) -> int | None:
    """Read the free memory of the CUDA device that this process trains on, in bytes; None if it trains on the CPU.

    Memory that torch has reserved but does not use counts as free, because torch can reuse it.

    Args:
        accelerator: the setting training.accelerator; any value except "cpu" uses the machine's CUDA devices, if any.
    """
    if accelerator == "cpu":
        return None
    import torch  # noqa: PLC0415  # slow to import, and most users of this module do not train

    if not torch.cuda.is_available():
        return None
    free: int = torch.cuda.mem_get_info()[0]
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def resident_memory() -> int | None:
    """Read the resident memory of this process, in bytes; None where the system reports no value."""
    pages = (_text(Path("/proc/self/statm")) or "").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def peak_memory() -> int | None:
    """Read the peak resident memory of this process, in bytes; None where the system reports no value."""
    # On Linux, the peak that `getrusage` reports includes the parent's memory at the time of the fork.
    status = _status()
    if "VmHWM" in status:
        return status["VmHWM"]
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_group(root: Path = CGROUP) -> tuple[int | None, int]:
    """Read the container's memory limit and use, in bytes; (None, 0) if there is no limit.

    With cgroup v2, inactive file cache does not count as used, because the system can reclaim it.
    """
    limit = _number(root / "memory.max")
    if limit is not None:
        stat = dict(line.split() for line in (_text(root / "memory.stat") or "").splitlines())
        return limit, (_number(root / "memory.current") or 0) - int(stat.get("inactive_file", 0))
    limit = _number(root / "memory" / "memory.limit_in_bytes")
    if limit is None or limit > 1 << 60:  # cgroup v1 encodes "no limit" as a very large number
        return None, 0
    return limit, _number(root / "memory" / "memory.usage_in_bytes") or 0


def process_limits() -> list[tuple[int, int]]:
    """Read (limit, used), in bytes, for `ulimit -v` (address space) and `ulimit -d` (data) of this process, if set."""
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return []
    status, found = _status(), []
    for which, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(which)[0]
        if soft != resource.RLIM_INFINITY:
            found.append((soft, status[name] if name in status else resident_memory() or 0))
    return found


def _status() -> dict[str, int]:
    """Read the memory figures of /proc/self/status (VmHWM, VmData, ...), in bytes; an empty dict without /proc."""
    lines = re.findall(r"^(Vm\w+):\s+(\d+) kB", _text(Path("/proc/self/status")) or "", re.MULTILINE)
    return {name: int(size) * 1024 for name, size in lines}


def cpu_flags() -> frozenset[str]:
    """Read the CPU features by their Linux names (avx512f, amx_bf16, ...); an empty set on other systems."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def huge_pages() -> str | None:
    """Read the transparent huge page setting: always, madvise or never; None if the system has no such setting."""
    found = re.search(r"\[(\w+)\]", _text(HUGE_PAGES) or "")
    return found.group(1) if found else None


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:  # "max" for no limit
        return None
