"""The cost of checksums and durable writes for checkpoints, files of the size of a model, and prepared data.

python benchmarks/checksums.py --mib 256 --rows 5000000 --json benchmarks/results/checksums.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import torch

from twotower.data import Interactions
from twotower.serving.model_folder import library_versions
from twotower.system import filesystem, hardware
from twotower.system.checksums import CHECKSUMS
from twotower.training.checkpoint import io


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each call, in ascending order."""
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        found.append(round(time.perf_counter() - begin, 4))
    return sorted(found)


def nothing(*given: object, **named: object) -> None:
    """Do nothing."""


def checkpoints(folder: Path, mib: int, rounds: int) -> dict[str, list[float]]:
    """Save and load a checkpoint of a given size, with and without checksums and fsync."""
    state = {"state_dict": {"table": torch.randn(mib << 12, 64)}, "epoch": 0}  # 2^12 rows of 64 float32 are one MiB
    target, store = folder / "last.ckpt", io.SafeCheckpointIO()

    def save() -> None:
        store.save_checkpoint(state, target)

    found = {"save": seconds(save, rounds), "load": seconds(lambda: store.load_checkpoint(target), rounds)}
    with mock.patch.object(filesystem, "synchronize", nothing):
        found["save without fsync"] = seconds(save, rounds)
        with mock.patch.object(io, "write_checksums", nothing):
            found["save without either"] = seconds(save, rounds)
    found["load without checksums"] = seconds(lambda: store.load_checkpoint(target), rounds)
    return found


def prepared(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Save and open prepared data with a given number of rows, with and without checksums."""
    rng = np.random.default_rng(0)
    frame = {
        "user": rng.integers(0, rows // 50, rows),
        "item": rng.integers(0, 20_000, rows),
        "time": np.arange(rows) + 1_600_000_000,
    }
    source = folder / "a.parquet"
    pl.DataFrame(frame).write_parquet(source)
    begin = time.perf_counter()
    Interactions.read(source, cache=folder / "cache")
    found: dict[str, Any] = {"prepare": round(time.perf_counter() - begin, 3)}
    found["mib"] = sum(path.stat().st_size for path in (folder / "cache").iterdir()) >> 20
    found["open"] = seconds(lambda: Interactions.open(folder / "cache"), rounds)
    (folder / "cache" / CHECKSUMS).unlink()
    found["open without checksums"] = seconds(lambda: Interactions.open(folder / "cache"), rounds)
    return found


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "benchmark": "checksums",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "cores": hardware.cores(),
            "checkpoint_mib": arguments.mib,
            "checkpoint_seconds": checkpoints(Path(folder), arguments.mib, arguments.rounds),
            "prepared_rows": arguments.rows,
            "prepared": prepared(Path(folder), arguments.rows, arguments.rounds),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
