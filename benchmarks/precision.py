"""Effect of bfloat16 products on model quality: float32 against bf16-mixed with equal settings and seeds.

    python benchmarks/precision.py [--data ../shared/data/ml-1m-loo/sequences.parquet] [--epochs 4] [--seeds 3]

MovieLens-1M, leave-last-out, pooled history, B = 8192, D = 64, in-batch and 1,024 uniform candidates. The best epoch by
validation is evaluated on the test queries with full ranking. The two precisions alternate seed by seed. Finished runs
are saved in benchmarks/results/precision.json and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import twotower as tt
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "precision.json"
PRECISIONS = ("32-true", "bf16-mixed")
SETTINGS = [
    "training.batch_size=8192",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 1024}}]",
]


def measure(precision: str, data: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train and evaluate once."""
    split = tt.splits.leave_last_out(tt.Interactions.read(data))
    settings = [
        f"training.precision={precision}",
        f"training.max_epochs={epochs}",
        f"training.patience={epochs}",
        f"training.seed={seed}",
    ]
    model = tt.fit(split, tt.Config.load(None, SETTINGS + settings), progress=False)
    measured = tt.evaluate(model, split.test, ks=(10, 20), baselines=False)
    return {
        "precision": precision,
        "seed": seed,
        "epochs": epochs,
        "values": measured["model"].values,
        "cpu_seconds_of_the_fit": round(model.fit.cpu_seconds, 1),
        "queries": measured.num_queries,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Measure the runs that are not finished yet, and print means and standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-1m-loo/sequences.parquet"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(asked.results.read_text()) if asked.results.exists() else []
    for seed in range(asked.seeds):
        for precision in PRECISIONS:
            if any((r["precision"], r["seed"], r["epochs"]) == (precision, seed, asked.epochs) for r in runs):
                continue
            runs.append(measure(precision, asked.data, asked.epochs, seed))
            write_text(asked.results, json.dumps(runs, indent=1) + "\n")
            print(precision, seed, {k: round(v, 4) for k, v in runs[-1]["values"].items()}, flush=True)
    runs = [run for run in runs if run["epochs"] == asked.epochs]
    for name in ("Recall@10", "Recall@20", "NDCG@10"):
        for precision in PRECISIONS:
            found = [run["values"][name] for run in runs if run["precision"] == precision]
            spread = statistics.stdev(found) if len(found) > 1 else float("nan")
            print(f"{name:10} {precision:12} {statistics.mean(found):.4f} (standard deviation {spread:.4f})")


if __name__ == "__main__":
    main()
