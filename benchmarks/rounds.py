"""Timing for the table benchmarks: the contenders run in turn, and medians are taken over rounds."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from twotower.system import hardware, tuning

#: The clock read before and after a call; use `--clock cpu` on a busy machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = {"read": CLOCKS["wall"]}


def seconds(call: Callable[[], object]) -> float:
    """Time one call with the selected clock."""
    read = _clock["read"]
    start = read()
    call()
    return read() - start


def rounds_of(calls: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Measure seconds of each call in each round. The first round is a warm-up; preparation is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, prepare in calls.items():
            taken = seconds(prepare())
            if turn:
                times[name].append(taken)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def milliseconds(times: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(statistics.median(times) * 1000, 2)


def bound(call: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    """Bind the arguments of a call, to time it later."""
    return lambda: call(*arguments)


def how(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe the environment of a result."""
    settings = tuning.tuning()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "load": round(os.getloadavg()[0], 1),
        "kept_below": settings.kept_below if settings else None,
        "huge_pages": hardware.huge_pages(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def options(description: str) -> argparse.ArgumentParser:
    """Make the parser with the options that the table benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=hardware.cores())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU time, with --threads 1")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    return parser


def apply(arguments: argparse.Namespace) -> None:
    """Apply the options to this process."""
    tuning.tune()
    torch.set_num_threads(arguments.threads)
    _clock["read"] = CLOCKS[arguments.clock]
