"""All objectives on one data set, as a table.

    python benchmarks/objectives.py --data ../shared/data/ml-100k --epochs 4

All objectives have the same initial weights, data order and number of epochs. Leave-last-out, full ranking, seen items
excluded. Finished runs are saved in benchmarks/results/objectives.json and not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import twotower as tt
from twotower.objectives.build import OBJECTIVES
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "objectives.json"


def measure(name: str, data: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train one objective and evaluate it on the test items."""
    # Ratings of 1 and 2 are the observed negatives of logistic-observed. The other objectives do not use them as
    # negatives, and none uses them as positives, so all train on the same positives.
    interactions = tt.Interactions.read(data, positive_label=3)
    split = tt.splits.leave_last_out(interactions)
    config = tt.Config.load(
        None,
        [
            f"objective={name}",
            f"training.max_epochs={epochs}",
            f"training.patience={epochs}",
            f"training.seed={seed}",
            "query_tower.history.length=20",  # a small budget, equal for all
        ],
    )
    started = time.perf_counter()
    model = tt.fit(split, config, progress=False)
    measured = tt.evaluate(model, split.test, ks=(10, 20), baselines=False)
    return {
        "objective": name,
        "seed": seed,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - started, 1),
        "values": measured["model"].values,
        "slices": measured["model"].slices,
        "best_epoch": int(np.argmax([row["NDCG@10"] for row in model.fit.history])) + 1,
        "queries": measured.num_queries,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    """Measure the objectives that are not finished yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of MovieLens 100K")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(asked.results.read_text()) if asked.results.exists() else []
    for name in asked.only:
        if any((run["objective"], run["seed"], run["epochs"]) == (name, asked.seed, asked.epochs) for run in runs):
            continue
        runs.append(measure(name, asked.data, asked.epochs, asked.seed))
        write_text(asked.results, json.dumps(runs, indent=1))
        print(name, {key: round(value, 4) for key, value in runs[-1]["values"].items()}, flush=True)
    columns = ("NDCG@10", "Recall@20", "coverage@20")
    table = pl.DataFrame(
        [
            {
                "objective": run["objective"],
                **{column: round(run["values"][column], 4) for column in columns},
                **{f"Recall@20 {name}": round(run["slices"][name]["Recall@20"], 4) for name in ("head", "mid", "tail")},
                "seconds": run["seconds"],
            }
            for run in runs
        ]
    ).sort("NDCG@10", descending=True)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160, fmt_str_lengths=40):
        print(table)


if __name__ == "__main__":
    main()
