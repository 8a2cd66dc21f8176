"""Time and peak memory to prepare, open, split and sample synthetic interactions.

    python benchmarks/scale_data.py --rows 100000000 --json benchmarks/results/scale_data.json

Every step runs in a separate process, so that its peak memory is measured alone. Item popularity is Zipf-like.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from memory import peak_mib

from twotower import __version__
from twotower.data import Interactions, TrainingBatches, by_time

SHARD_ROWS = 5_000_000


def write(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write Parquet shards with unordered rows; ids are integers with gaps."""
    rng = np.random.default_rng(args.seed)
    (folder / "shards").mkdir()
    for shard, start in enumerate(range(0, args.rows, SHARD_ROWS)):
        n = min(SHARD_ROWS, args.rows - start)
        pl.DataFrame(
            {
                "user_id": rng.integers(0, args.users, n) * 7 + 10**12,
                "item_id": (args.items * rng.random(n) ** 2.5).astype(np.int64) * 3 + 11,
                "timestamp": rng.integers(1_600_000_000, 1_700_000_000, n),
            }
        ).write_parquet(folder / "shards" / f"part-{shard:05d}.parquet")
    return {"bytes": sum(p.stat().st_size for p in (folder / "shards").iterdir())}


def prepare(folder: Path, _args: argparse.Namespace) -> dict[str, Any]:
    """Read the shards for the first time."""
    data = Interactions.read(folder / "shards", cache=folder / "prepared")
    return {
        "rows": len(data),
        "queries": data.num_queries,
        "items": data.num_items,
        "duplicates": data.account.count("duplicates"),
        "bytes": sum(p.stat().st_size for p in (folder / "prepared").rglob("*") if p.is_file()),
    }


def reopen(folder: Path, _args: argparse.Namespace) -> dict[str, Any]:
    """Read again, from the cache."""
    return {"rows": len(Interactions.read(folder / "shards", cache=folder / "prepared"))}


def sample(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make batches of rows with histories directly from the memory-mapped arrays."""
    data = Interactions.open(folder / "prepared")
    batches = iter(TrainingBatches(data, args.batch, history_length=50, seed=args.seed))
    started = time.perf_counter()
    for _ in range(args.batches):
        next(batches)
    seconds = time.perf_counter() - started
    return {
        "batches": args.batches,
        "batch_size": args.batch,
        "history": 50,
        "rows_per_second": args.batches * args.batch / seconds,
    }


def split(folder: Path, _args: argparse.Namespace) -> dict[str, Any]:
    """Split by time."""
    made = by_time(Interactions.open(folder / "prepared"))
    return {"train": len(made.train), "test_queries": len(made.test), "test_targets": len(made.test.target_items)}


STEPS = {f.__name__: f for f in (write, prepare, reopen, sample, split)}


def main() -> None:
    """Run all steps, print and write their time and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        started = time.perf_counter()
        said = STEPS[args.step](args.folder, args)
        peak = peak_mib() / 1024
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_gib": peak, **said}))
        return
    folder = Path(tempfile.mkdtemp(prefix="scale-data-", dir=args.folder))
    steps: dict[str, Any] = {}
    try:
        for name in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--step", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            steps[name] = json.loads(done.stdout.splitlines()[-1])
            told = {k: v for k, v in steps[name].items() if k not in ("seconds", "peak_gib")}
            print(
                f"{name:8} {steps[name]['seconds']:9.3f} s  peak {steps[name]['peak_gib']:6.2f} GiB  {told}", flush=True
            )
    finally:
        shutil.rmtree(folder)
    result = {
        "benchmark": "scale_data",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "rows": args.rows,
        "users": args.users,
        "items": args.items,
        "steps": steps,
        "import_peak_gib": _import_peak(),
        "versions": {
            "twotower": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "polars": pl.__version__,
            "torch": torch.__version__,
        },
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _import_peak() -> float:
    """Measure the peak memory of a process that only imports the library, for comparison."""
    code = "import twotower.data; from twotower.system import hardware; print(hardware.peak_memory() / 2**30)"
    return float(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
