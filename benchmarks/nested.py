"""Nested embeddings: the metrics at each width, next to a model that is trained at that width alone.

    python benchmarks/nested.py --data ../shared/data --only ml-100k-loo online-retail --seeds 0 1 2

For each data set (as in defaults.py) and seed: one model with item_tower.nested, D = 128, ranked by its first 16, 32,
64 and all coordinates; the same ranking by the first coordinates of a model that was trained at D = 128 only; and a
model trained at each width alone. All other settings are the defaults. Recorded are Recall@20 and NDCG@10 on the test,
and the time of training. "share" is the nested model's metric over that of the model of the width, means over seeds,
and p the paired test over queries, averaged over seeds. Finished runs are in the results file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defaults import SETS
from numpy.typing import NDArray

import twotower as tt
from twotower.config.run import Config
from twotower.data import Split
from twotower.evaluation import evaluate, paired_comparison
from twotower.ranking import Ranker
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "nested.json"
WIDTHS = (16, 32, 64, 128)
METRICS = ("Recall@20", "NDCG@10")

PerQuery = dict[str, NDArray[np.float64]]


def measured(ranker: Ranker, split: Split) -> PerQuery:
    """Return the metrics of each test query."""
    row = evaluate(ranker, split.test, train=split.train, ks=(10, 20), baselines=False).rows[0]
    return {name: row.per_query[name] for name in METRICS}


def trained(split: Split, seed: int, settings: list[str]) -> tuple[tt.Model, float]:
    """Train with the defaults and some settings; return the model and its CPU seconds."""
    config = Config.load(None, [f"training.seed={seed}", *settings])
    model = tt.fit(split, config, progress=False)
    return model, model.fit.cpu_seconds


def run(split: Split, seed: int) -> dict[str, Any]:
    """Train and measure all models of one seed."""
    nested, seconds = trained(split, seed, [f"item_tower={{dimension: {WIDTHS[-1]}, nested: {list(WIDTHS[:-1])}}}"])
    of_nested = {width: measured(nested.at_width(width), split) for width in WIDTHS}
    of_width, cut, cpu = {}, {}, {"nested": round(seconds, 1)}
    for width in WIDTHS:
        model, seconds = trained(split, seed, [f"item_tower.dimension={width}"])
        of_width[width] = measured(model.ranker, split)
        cpu[str(width)] = round(seconds, 1)
        if width == WIDTHS[-1]:
            towers = model.artifact.towers
            towers.nested = WIDTHS[:-1]
            cut = {width: measured(model.at_width(width), split) for width in WIDTHS}
    rows = {}
    for width in WIDTHS:
        rows[str(width)] = {
            name: {
                "nested": float(of_nested[width][name].mean()),
                "trained at the width": float(of_width[width][name].mean()),
                "cut from the plain model": float(cut[width][name].mean()),
                "p": paired_comparison(of_nested[width][name], of_width[width][name]).p_value,
            }
            for name in METRICS
        }
    return {"queries": len(of_nested[WIDTHS[0]][METRICS[0]]), "widths": rows, "cpu_seconds": cpu}


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Average over seeds."""
    found: dict[str, Any] = {}
    for width in map(str, WIDTHS):
        found[width] = {}
        for name in METRICS:
            rows = [one["widths"][width][name] for one in seeds.values()]
            means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            means["share"] = means["nested"] / means["trained at the width"]
            found[width][name] = {key: round(value, 4) for key, value in means.items()}
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=sorted(SETS), default=["ml-100k-loo", "online-retail"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    document = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"data": {}}
    for name in given.only:
        split = SETS[name](given.data)
        entry = document["data"].setdefault(name, {"seeds": {}})
        for seed in given.seeds:
            if str(seed) in entry["seeds"]:
                continue
            start = time.perf_counter()
            entry["seeds"][str(seed)] = run(split, seed)
            entry["summary"] = summary(entry["seeds"])
            document |= {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "threads": torch.get_num_threads(),
                "versions": library_versions(),
            }
            write_text(given.out, json.dumps(document, indent=1))
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
            for width, row in entry["summary"].items():
                print(f"  {width:>4}", dict(row), flush=True)


if __name__ == "__main__":
    main()
