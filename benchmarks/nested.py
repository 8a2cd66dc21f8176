"""Nested embeddings: the metrics at each width, next to a model that is trained at that width alone.

    python benchmarks/nested.py --data ../shared/data --only ml-100k-loo online-retail --seeds 0 1 2

For each data set (as in defaults.py) and seed: one model with item_tower.nested, D = 128, ranked by its first 16, 32,
64 and all coordinates; the same ranking by the first coordinates of a model that was trained at D = 128 only; and a
model trained at each width alone. All other settings are the defaults. Recorded are Recall@20 and NDCG@10 on the test,
and the time of training. "share" is the nested model's metric over that of the model of the width, means over seeds.
Finished models are in the results file and are not trained again.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defaults import SETS

import twotower as tt
from twotower.config.run import Config
from twotower.data import Split
from twotower.evaluation import evaluate
from twotower.ranking import Ranker
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "nested.json"
WIDTHS = (16, 32, 64, 128)
METRICS = ("Recall@20", "NDCG@10")

#: The models of a seed: one with nested widths, and one for each width alone.
MODELS = ("nested", *map(str, WIDTHS))


def measured(ranker: Ranker, split: Split) -> dict[str, float]:
    """Return the metrics on the test queries."""
    row = evaluate(ranker, split.test, train=split.train, ks=(10, 20), baselines=False).rows[0]
    return {name: round(row.values[name], 6) for name in METRICS}


def run(split: Split, seed: int, name: str) -> dict[str, Any]:
    """Train one model with the defaults, and measure it at its widths; the widest one also at all narrower widths."""
    width = WIDTHS[-1] if name == "nested" else int(name)
    nested = list(WIDTHS[:-1]) if name == "nested" else []
    config = Config.load(None, [f"training.seed={seed}", f"item_tower={{dimension: {width}, nested: {nested}}}"])
    model = tt.fit(split, config, progress=False)
    widths = WIDTHS if width == WIDTHS[-1] else (width,)
    return {
        "cpu_seconds": round(model.fit.cpu_seconds, 1),
        "epochs": model.fit.epochs,
        "widths": {str(one): measured(model.at_width(one), split) for one in widths},
    }


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Average the finished seeds, by width and metric; `share` is nested over trained at the width."""
    done = [models for models in seeds.values() if len(models) == len(MODELS)]
    found: dict[str, Any] = {"seeds": len(done)}
    for width in map(str, WIDTHS) if done else ():
        found[width] = {}
        for metric in METRICS:
            nested, alone, cut = (
                np.array([models[name]["widths"][width][metric] for models in done])
                for name in ("nested", width, str(WIDTHS[-1]))
            )
            found[width][metric] = {
                "nested": round(float(nested.mean()), 4),
                "trained at the width": round(float(alone.mean()), 4),
                "cut from the plain model": round(float(cut.mean()), 4),
                "share": round(float(nested.mean() / alone.mean()), 4),
                "share by seed": (nested / alone).round(4).tolist(),
            }
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
        entry = document["data"].setdefault(name, {"queries": len(split.test), "seeds": {}})
        for seed, kind in ((seed, kind) for seed in given.seeds for kind in MODELS):
            models = entry["seeds"].setdefault(str(seed), {})
            if kind in models:
                continue
            models[kind] = run(split, seed, kind)
            entry["summary"] = summary(entry["seeds"])
            document |= {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "threads": torch.get_num_threads(),
                "versions": library_versions(),
            }
            write_text(given.out, json.dumps(document, indent=1))
            print(f"{name}, seed {seed}, {kind}: {json.dumps(models[kind])}", flush=True)
        print(f"{name}: {json.dumps(entry['summary'], indent=1)}", flush=True)


if __name__ == "__main__":
    main()
