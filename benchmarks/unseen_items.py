"""The mixed-negatives claim: ranking of items that never occur in training, with and without uniform candidates.

    python benchmarks/unseen_items.py --data ../shared/data/online-retail/interactions.parquet

A random 30 % of the catalog is removed from the training rows but stays in the catalog. In-batch candidates never
include these items, so nothing lowers their scores, and a full ranking fills up with untrained items. Uniform
candidates include them (Yang et al. 2020, "Mixed Negative Sampling", section 3.3).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import twotower as tt
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "unseen_items.json"

POOLS = {
    "in-batch alone": "[{in_batch: {}}]",
    "in-batch + 256 uniform": "[{in_batch: {}}, {uniform: {size: 256}}]",
    "in-batch + 1024 uniform": "[{in_batch: {}}, {uniform: {size: 1024}}]",
}


def main() -> None:
    """Train with each pool, and count items never seen in training among the top 10."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--share", type=float, default=0.3, help="share of the catalog that is held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    split = tt.splits.leave_last_out(tt.Interactions.read(asked.data))
    size = split.train.num_items
    unseen = np.zeros(size, dtype=bool)
    unseen[np.random.default_rng(asked.seed).permutation(size)[: round(asked.share * size)]] = True
    train = split.train.select(~unseen[np.asarray(split.train.item_codes)])
    held_out = replace(split, train=train)
    found: list[dict[str, Any]] = []
    for name, sources in POOLS.items():
        config = tt.Config.load(
            None,
            [
                f"objective.sources={sources}",
                f"training.max_epochs={asked.epochs}",
                f"training.seed={asked.seed}",
                f"training.patience={asked.epochs}",
            ],
        )
        model = tt.fit(held_out, config, progress=False)
        top = model.rank(split.test, 10, True)
        values = tt.evaluate(model, split.test, ks=(10,), baselines=False)["model"].values
        share = float(unseen[top].mean())
        print(
            f"{name}: {share:.1%} of the top 10 are items never seen; Recall@10 {values['Recall@10']:.4f}", flush=True
        )
        found.append({"pool": name, "sources": sources, "unseen_share_top10": share, "values": values})
    result = {
        "held_out_share": asked.share,
        "items": size,
        "queries": len(split.test),
        "epochs": asked.epochs,
        "seed": asked.seed,
        "pools": found,
        "versions": library_versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_text(asked.results, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
