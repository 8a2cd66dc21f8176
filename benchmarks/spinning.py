"""Training time alone and next to a busy process: threads that spin while waiting, sleeping threads, one thread.

    python benchmarks/spinning.py [--data movielens-100k] [--epochs 1] [--rounds 3] [--limit 60] [--json FILE]

Runs complete `twotower train` processes, in turn within a round: one thread per core, the default of the command line
(GNU OpenMP spins for milliseconds); the same with GOMP_SPINCOUNT=1000 (threads sleep after microseconds); and one
thread. The busy process multiplies matrices in one thread and never waits. A run that exceeds --limit seconds is
stopped and counted with that time. Each time is reported with the steal time of a virtual machine, in seconds of one
core (proc(5)): a released core is not always returned at once.

Ideally, a training run with two threads that shares two cores with a busy thread gets three quarters of the machine and
takes 4/3 of its time alone; anything above is waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rounds import ratio

from twotower.serving.model_folder import library_versions
from twotower.system import hardware
from twotower.system.filesystem import write_text

WAYS = {"spinning": {}, "asleep": {"GOMP_SPINCOUNT": "1000"}, "one thread": {"OMP_NUM_THREADS": "1"}}
BUSY = "import torch; torch.set_num_threads(1); a = torch.rand(512, 512)\nwhile True: a @ a"


def train(data: str, epochs: int, way: dict[str, str], limit: float) -> float:
    """Time one training run with its evaluation, at most `limit` seconds."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("twotower")), "train", data, "--out", f"{folder}/run"]
        command += ["--set", f"training.max_epochs={epochs}"]
        start = time.perf_counter()
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=limit, env={**environment, **way})
        except subprocess.TimeoutExpired:
            return limit
        return time.perf_counter() - start


def stolen() -> float:
    """Return the steal time since boot in seconds of one core, or 0 if the system does not report it."""
    told = Path("/proc/stat")
    return int(told.read_text().split()[8]) / os.sysconf("SC_CLK_TCK") if told.exists() else 0.0


@contextmanager
def beside(busy: bool) -> Iterator[None]:
    """Run a process that keeps one core busy, if `busy`."""
    if not busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(3)  # wait until it has imported torch
        yield
    finally:
        other.kill()
        other.wait()


def measured(asked: argparse.Namespace, busy: bool) -> dict[str, Any]:
    """Time all variants in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    steal: dict[str, list[float]] = {name: [] for name in WAYS}
    with beside(busy):
        for turn in range(asked.rounds):
            for name, way in WAYS.items():
                before = stolen()
                seconds[name].append(round(train(asked.data, asked.epochs, way, asked.limit), 1))
                steal[name].append(round(stolen() - before, 1))
                result = f"{seconds[name][-1]} s, {steal[name][-1]} stolen"
                print(f"{'busy' if busy else 'alone'}, round {turn + 1}, {name}: {result}", flush=True)
    return {
        "busy_process": busy,
        "seconds": seconds,
        "stolen": steal,
        "medians": {name: statistics.median(times) for name, times in seconds.items()},
        "over_spinning": {name: ratio(times, seconds["spinning"]) for name, times in seconds.items()},
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens-100k", help="the data, as `twotower train` takes it")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a run is stopped")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    asked = parser.parse_args()
    train(asked.data, 1, {}, 600.0)  # the data is prepared once
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": asked.data,
        "epochs": asked.epochs,
        "seed": 0,
        "cores": hardware.cores(),
        "limit": asked.limit,
        "load_before": round(os.getloadavg()[0], 1),
        "runs": [measured(asked, busy) for busy in (False, True)],
        "versions": library_versions(),
    }
    if asked.json:
        write_text(asked.json, json.dumps(found, indent=1))
    print(json.dumps(found["runs"], indent=1))


if __name__ == "__main__":
    main()
