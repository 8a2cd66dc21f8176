"""How the benchmarks of tables take their time: one call of each kind in turn, medians over rounds."""

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

from twotower import machine, process

#: What is read before and after a call; `--clock cpu` for a busy machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = {"read": CLOCKS["wall"]}


def seconds(call: Callable[[], object]) -> float:
    """Time of one call, by the clock chosen."""
    read = _clock["read"]
    start = read()
    call()
    return read() - start


def rounds_of(calls: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round warms up and does not count. Preparing is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, prepare in calls.items():
            taken = seconds(prepare())
            if turn:
                times[name].append(taken)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def milliseconds(times: Sequence[float]) -> float:
    """Median, in thousandths of a second."""
    return round(statistics.median(times) * 1000, 2)


def bound(call: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    """The call with its arguments, to be timed later."""
    return lambda: call(*arguments)


def how(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result was got with."""
    tuning = process.tuning()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "load": round(os.getloadavg()[0], 1),
        "kept_below": tuning.kept_below if tuning else None,
        "huge_pages": machine.huge_pages(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def options(description: str) -> argparse.ArgumentParser:
    """The options that the table benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time; wants --threads 1")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    return parser


def apply(arguments: argparse.Namespace) -> None:
    """Set the process up as the options say."""
    process.tune()
    torch.set_num_threads(arguments.threads)
    _clock["read"] = CLOCKS[arguments.clock]
