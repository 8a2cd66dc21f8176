"""What this process may use of the machine: cores, memory, pages; asked of the system, never guessed."""

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
    """Physical cores that this process may use, at least 1.

    Two hardware threads of one core share its arithmetic units, so matrix products gain nothing from the second. A
    container may own fewer cores than it sees: its quota counts.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        # Hardware threads of one core tell the same list of siblings.
        siblings = {_text(CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
        count = len(siblings)
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Cores that a container may use in all, by its control group; None without a limit."""
    second = (_text(root / "cpu.max") or "").split()
    if len(second) == 2 and second[0].isdigit():
        return int(second[0]) / int(second[1])
    quota, period = (_number(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota and period and quota > 0 else None


@dataclass(frozen=True)
class Memory:
    """Memory in bytes; None where the system does not tell.

    Attributes:
        total: of the machine.
        available: what can be had now without pushing others out, of the machine or of the container's limit.
        limit: what the container, `ulimit -v` or `ulimit -d` allows this process; None without a limit.
        resident: what this process holds now.
        peak: the most this process has held.
    """

    total: int | None
    available: int | None
    limit: int | None
    resident: int | None
    peak: int | None


def memory(processes: int = 1) -> Memory:
    """Ask the system.

    Args:
        processes: how many run here and need the same; each has its share of what the machine has available, and its
            own `ulimit` to itself.
    """
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(Path("/proc/meminfo")) or "", re.MULTILINE))
    total = int(table["MemTotal"]) * 1024 if "MemTotal" in table else _physical()
    available = int(table["MemAvailable"]) * 1024 if "MemAvailable" in table else total
    resident = resident_memory()
    group, used = memory_group()
    rooms = [available] if available is not None else []
    limits = []
    if group is not None:
        limits.append(group)
        rooms.append(group - used)
    rooms = [room // processes for room in rooms]
    for allowed, used in process_limits():
        limits.append(allowed)
        rooms.append(allowed - used)
    room = max(min(rooms), 0) if rooms else None
    return Memory(total, room, min(limits, default=None), resident, peak_memory())


def device_memory(accelerator: str) -> int | None:
    """Free memory of the CUDA device that this process trains on, bytes; None where it trains in main memory.

    What torch has of the device and does not use counts as free, for it gives it out again.

    Args:
        accelerator: as in section `training`; anything but "cpu" takes the machine's CUDA devices where it has some.
    """
    if accelerator == "cpu":
        return None
    import torch  # noqa: PLC0415  # most that ask this module train nothing

    if not torch.cuda.is_available():
        return None
    free: int = torch.cuda.mem_get_info()[0]
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def resident_memory() -> int | None:
    """What this process holds now, bytes; None where the system does not tell."""
    pages = (_text(Path("/proc/self/statm")) or "").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def peak_memory() -> int | None:
    """The most memory this process has held so far, bytes; None where the system does not tell."""
    # What `getrusage` tells on Linux begins at what the parent held when it started this process.
    told = _status()
    if "VmHWM" in told:
        return told["VmHWM"]
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_group(root: Path = CGROUP) -> tuple[int | None, int]:
    """(limit, used) of the container in bytes, without what the system can drop; (None, 0) without a limit."""
    limit = _number(root / "memory.max")
    if limit is not None:
        stat = dict(line.split() for line in (_text(root / "memory.stat") or "").splitlines())
        return limit, (_number(root / "memory.current") or 0) - int(stat.get("inactive_file", 0))
    limit = _number(root / "memory" / "memory.limit_in_bytes")
    if limit is None or limit > 1 << 60:  # version 1 says "none" with a very large number
        return None, 0
    return limit, _number(root / "memory" / "memory.usage_in_bytes") or 0


def process_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of each limit set on this process: `ulimit -v`, of addresses, and `ulimit -d`, of data."""
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return []
    told, found = _status(), []
    for which, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(which)[0]
        if soft != resource.RLIM_INFINITY:
            found.append((soft, told[name] if name in told else resident_memory() or 0))
    return found


def _status() -> dict[str, int]:
    """What Linux tells of this process's memory, bytes by name (VmHWM, VmData, ...); empty elsewhere."""
    lines = re.findall(r"^(Vm\w+):\s+(\d+) kB", _text(Path("/proc/self/status")) or "", re.MULTILINE)
    return {name: int(size) * 1024 for name, size in lines}


def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it (avx512f, amx_bf16, ...); empty elsewhere."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def huge_pages() -> str | None:
    """Transparent huge pages: always, madvise or never; None where the system has none."""
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
    except ValueError:  # "max"
        return None
