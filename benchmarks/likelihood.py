"""How good a full softmax each model of a comparison has become: its loss over the catalog, in training and test.

    python benchmarks/likelihood.py runs/compare-ml-1m-loo --json benchmarks/results/likelihood-ml-1m-loo.json

`twotower compare` tells which objective ranks best after its budget. This tells why: for every trained model,
on the test targets and on a sample of training rows (no dropout, the history as it was at that row),

    loss          mean of -log P(y|x), the full softmax of the model's own scores and temperature, over all items
    scaled        the same with the scores multiplied by the one number that makes it least: what the temperature costs
    entropy       mean entropy of P(.|x): above the loss the model is less sure than it could be

A model that was trained with an estimate of this loss and has a lower one than the model that was trained with
the loss itself has gone further in the same number of steps, in training as well as in the test. One that is
lower in the test alone generalises better.
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
from twotower.evaluation.towers import TowerRanker
from twotower.files import write_text
from twotower.run import history_length, reread
from twotower.serving.artifact import Artifact, library_versions

BLOCK = 2048


def scaled_loss(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """The least mean loss over a positive factor of the logits, and the factor."""
    best = (float("inf"), 1.0)
    for factor in np.arange(0.6, 1.61, 0.05):
        loss = float(torch.nn.functional.cross_entropy(logits * factor, targets))
        best = min(best, (loss, float(factor)))
    return best


def numbers(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """What the module's docstring lists."""
    log_p = logits.log_softmax(1)
    least, factor = scaled_loss(logits, targets)
    return {
        "loss": float(-log_p.gather(1, targets[:, None]).mean()),
        "scaled": least,
        "factor": factor,
        "entropy": float(-(log_p.exp() * log_p).sum(1).mean()),
    }


@torch.no_grad()
def measured(artifact: Artifact, split: Split, rows: int) -> dict[str, Any]:
    """Loss on the test targets (one for each query) and on `rows` training rows, the same for every model."""
    towers = artifact.towers.eval()
    length = history_length(artifact.config)
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
    """Measure every finished training of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="the folder of `twotower compare`")
    parser.add_argument("--data", help="where the data is, if it has moved")
    parser.add_argument("--only", nargs="+", help="objectives; all where left out")
    parser.add_argument("--rows", type=int, default=4096, help="training rows")
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
            artifact = Artifact.load(run / "model")
        found[run.name] = measured(artifact, split, asked.rows)
        print(run.name, json.dumps(found[run.name]), flush=True)
        stamp = {"versions": library_versions(), "date": datetime.now(UTC).isoformat(timespec="minutes")}
        write_text(asked.json, json.dumps({"rows": asked.rows, "runs": found, **stamp}, indent=1))


if __name__ == "__main__":
    main()
