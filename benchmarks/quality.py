"""Quality of the default settings: leave-last-out, test split, full ranking, seen items excluded.

    python benchmarks/quality.py --data ../shared/data --only ml-100k --seeds 0 1 2

Trains the default configuration on each data set and seed, and evaluates it together with popularity, item-kNN and
EASE. Every finished run is written to benchmarks/results/quality.json immediately, so an interrupted benchmark resumes
where it stopped. Finished runs are not repeated unless --again is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import twotower as tt
from twotower.data import Split
from twotower.evaluation import evaluate_all
from twotower.ranking import EASE, ItemKNN, Popularity, Ranker
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "quality.json"

#: Name -> path below the data folder, column settings, and which queries have validation items.
DATA: dict[str, dict[str, Any]] = {
    "ml-100k": {"path": "ml-100k"},
    "online-retail": {"path": "online-retail/interactions.parquet"},
    "amazon-beauty": {"path": "amazon/beauty.txt"},
    "amazon-sports": {"path": "amazon/sports.txt"},
    "ml-1m-loo": {"path": "ml-1m-loo/sequences.parquet", "validation_queries": "validation_user"},
}


def split_of(name: str, root: Path) -> Split:
    """Read a data set and split off the last item of every query."""
    entry = DATA[name]
    data = tt.Interactions.read(root / entry["path"])
    return tt.splits.leave_last_out(data, validation_queries=entry.get("validation_queries"))


def baselines(split: Split) -> Mapping[str, Ranker]:
    """Make the baselines that a model must beat."""
    return {
        "popularity": Popularity(split.train),
        "item-kNN": ItemKNN(split.train),
        "EASE": EASE(split.train, l2=500.0 if len(split.train) > 500_000 else 100.0),
    }


def measure(name: str, root: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train with one seed and evaluate."""
    split = split_of(name, root)
    config = tt.Config.load(None, ["data.split=leave-last-out", f"training.seed={seed}", *overrides])
    started = time.perf_counter()
    model = tt.fit(split, config, progress=False)
    seconds = time.perf_counter() - started
    rankers = {"model": model.retriever, **baselines(split)}
    measured = evaluate_all(rankers, split.test, train=split.train, ks=(10, 20))
    for row in measured.rows:
        print(f"{name} seed {seed} {row.name:12s}", {k: round(v, 4) for k, v in row.values.items()}, flush=True)
    print(f"{name} seed {seed} trained {model.fit.epochs} epochs in {seconds:.0f} s", flush=True)
    return {
        "data": name,
        "seed": seed,
        "overrides": overrides,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "epochs": model.fit.epochs,
        "validation": model.fit.best,
        "curve": model.fit.history,
        "evaluation": measured.to_dict(),
        "config": config.model_dump(mode="json"),
        "versions": library_versions(),
        "machine": platform.processor() or platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def kept(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return runs


def key_of(run: dict[str, Any]) -> tuple[str, int, list[str]]:
    """Return the identity of a run."""
    return run["data"], run["seed"], run["overrides"]


def main() -> None:
    """Measure the requested runs that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="repeat finished runs")
    asked = parser.parse_args()
    for seed in asked.seeds:
        for name in asked.only:
            key = (name, seed, asked.overrides)
            if key in [key_of(run) for run in kept(asked.results)] and not asked.again:
                continue
            found = measure(name, asked.data, seed, asked.overrides)
            # Read again: another process may have finished a run in between.
            others = [run for run in kept(asked.results) if key_of(run) != key]
            write_text(asked.results, json.dumps([*others, found], indent=1))


if __name__ == "__main__":
    main()
