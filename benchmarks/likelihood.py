"""Full softmax loss of each model of a comparison, on training rows and test targets.

    python benchmarks/likelihood.py runs/compare-ml-1m-loo --json benchmarks/results/likelihood-ml-1m-loo.json

`twotower compare` shows which objective ranks best after its budget. This benchmark helps to explain why. For every
trained model, on the test targets and on a sample of training rows (no dropout, the history as it was at that row):

    loss          mean of -log P(y|x), the full softmax of the model's own scores and temperature, over all items
    scaled        the same with the scores multiplied by the optimal constant: the cost of a suboptimal temperature
    entropy       mean entropy of P(.|x): above the loss, the model is less confident than it could be

If a model trained with an estimate of this loss has a lower loss than the model trained with the loss itself, on
training rows as well as test targets, then it got further in the same number of steps. If its loss is lower only on
the test targets, it generalizes better.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.data import Split, TrainingBatches
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run import reread
from twotower.serving.model_folder import SavedModel, library_versions
from twotower.system.filesystem import write_text

BLOCK = 2048


def scaled_loss(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Minimize the mean loss over a positive factor of the logits; return the loss and the factor."""
    best = (float("inf"), 1.0)
    for factor in np.arange(0.6, 1.61, 0.05):
        loss = float(torch.nn.functional.cross_entropy(logits * factor, targets))
        best = min(best, (loss, float(factor)))
    return best


def numbers(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute the quantities of the module docstring."""
    log_p = logits.log_softmax(1)
    least, factor = scaled_loss(logits, targets)
    return {
        "loss": float(-log_p.gather(1, targets[:, None]).mean()),
        "scaled": least,
        "factor": factor,
        "entropy": float(-(log_p.exp() * log_p).sum(1).mean()),
    }


@torch.no_grad()
def measured(artifact: SavedModel, split: Split, rows: int) -> dict[str, Any]:
    """Measure on the test targets (one per query) and on `rows` training rows, the same for every model."""
    towers = artifact.towers.eval()
    length = artifact.config.history_length
    ranker = TowerRanker(towers, length)
    items, temperature = ranker.item_embeddings, float(towers.temperature)
    test = split.test
    asked = np.flatnonzero(np.diff(test.target_offsets) == 1)
    queries = ranker.embed(test.queries, (test.history_offsets, test.history_items))[asked]
    targets = torch.from_numpy(test.target_items[test.target_offsets[:-1][asked]].astype(np.int64))
    batches = TrainingBatches(split.train, BLOCK, history_length=length)
    chosen = np.random.default_rng(0).choice(len(split.train), size=min(rows, len(split.train)), replace=False)
    batch = batches.batch(np.sort(chosen))
    trained = towers.embed_queries(batch.queries, batch.history)
    return {
        "temperature": temperature,
        "test": numbers(queries @ items.T / temperature, targets),
        "training": numbers(trained @ items.T / temperature, batch.items),
    }


def main() -> None:
    """Measure every finished run of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="the folder of `twotower compare`")
    parser.add_argument("--data", help="current location of the data, if it has moved")
    parser.add_argument("--only", nargs="+", help="objectives; default: all")
    parser.add_argument("--rows", type=int, default=4096, help="number of training rows")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    runs = sorted(path.parent for path in asked.comparison.glob("runs/*/results.json"))
    found: dict[str, Any] = json.loads(asked.json.read_text())["runs"] if asked.json.exists() else {}
    split: Split | None = None
    for run in runs:
        if run.name in found or (asked.only and run.name.rpartition("-")[0] not in asked.only):
            continue
        if split is None:
            artifact, split = reread(run, asked.data)
        else:
            artifact = SavedModel.load(run / "model")
        found[run.name] = measured(artifact, split, asked.rows)
        print(run.name, json.dumps(found[run.name]), flush=True)
        stamp = {"versions": library_versions(), "date": datetime.now(UTC).isoformat(timespec="minutes")}
        write_text(asked.json, json.dumps({"rows": asked.rows, "runs": found, **stamp}, indent=1))


if __name__ == "__main__":
    main()
