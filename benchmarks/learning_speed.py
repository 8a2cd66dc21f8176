"""Which candidates lower the full softmax loss fastest, with equal initial weights, rows and steps.

    python benchmarks/learning_speed.py --data ../shared/data/online-retail --seeds 0

Id towers (one vector per query and item, cosine, temperature fixed at 0.1), B = 1,024, Adam with a constant learning
rate. Every objective estimates the same loss. After every half epoch, that loss itself is computed over the whole
catalog on 4,096 training rows and on the test targets (leave-last-out). `frequency` draws as many items as the batch
has rows, from the same distribution but independently of the rows; `in-batch` differs only in that the candidates are
the rows.
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
from torch import Tensor
from torch.nn import functional as F

import twotower as tt
from twotower.data import Split, TrainingBatches
from twotower.objectives.build import build_objective
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text
from twotower.towers import TwoTower, build_towers
from twotower.training.optimizer import TableOptimizer, parameter_groups
from twotower.training.step import compute_loss

RESULTS = Path(__file__).parent / "results" / "learning_speed.json"
BATCH = 1024
TOWERS = [
    "query_tower.id_embedding=true",
    "query_tower.history=null",
    "query_tower.hidden=[]",
    "query_tower.dropout=0",
    "objective.temperature=0.1",
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "full-softmax": {"name": "full-softmax"},
    "in-batch, copies kept": {"name": "expected-count", "sources": [{"in_batch": {}}], "unique": False},
    "frequency, copies kept": {
        "name": "expected-count",
        "sources": [{"frequency": {"size": BATCH - 1, "power": 1.0}}],
        "unique": False,
    },
    "in-batch and 1,024 uniform": {"name": "expected-count"},
}


@torch.no_grad()
def losses(towers: TwoTower, split: Split, rows: Tensor) -> dict[str, float]:
    """Compute the mean full softmax loss on training rows and on test targets."""
    items = towers.item_embeddings()
    test = split.test
    asked = {
        "training": (split.train.query_codes()[rows.numpy()], split.train.item_codes[rows.numpy()]),
        "test": (np.repeat(test.queries, np.diff(test.target_offsets)), test.target_items),
    }
    found = {}
    for name, (queries, targets) in asked.items():
        embedded = towers.embed_queries(torch.from_numpy(np.asarray(queries, dtype=np.int64)), None)
        wanted = torch.from_numpy(np.asarray(targets, dtype=np.int64))
        found[name] = float(F.cross_entropy(embedded @ items.T / towers.temperature, wanted))
    return found


def train(split: Split, fields: dict[str, Any], seed: int, epochs: int, rate: float) -> list[dict[str, float]]:
    """Train, and record the losses after every half epoch."""
    config = tt.Config.load(None, TOWERS)
    changed = config.objective.model_dump(exclude={"name", "sources", "unique"}) | fields
    config = config.model_copy(update={"objective": type(config.objective).model_validate(changed)})
    torch.manual_seed(seed)
    towers = build_towers(config, num_queries=split.train.num_queries, num_items=split.train.num_items)
    objective = build_objective(config, split.train)
    optimizer = TableOptimizer(parameter_groups(towers, 0.0, lr=rate), lr=rate)
    batches = TrainingBatches(split.train, BATCH, seed=seed)
    rows = torch.from_numpy(np.random.default_rng(0).choice(len(split.train), size=4096, replace=False))
    curve: list[dict[str, float]] = [{"epoch": 0.0, **losses(towers, split, rows)}]
    half = len(batches) // 2
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for step, batch in enumerate(batches, 1):
            loss, _, _ = compute_loss(towers, objective, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step == half or step == len(batches):
                curve.append({"epoch": epoch + (0.5 if step == half else 1.0), **losses(towers, split, rows)})
    return curve


def main() -> None:
    """Train every objective with every seed; finished ones are not repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    split = tt.splits.leave_last_out(tt.Interactions.read(asked.data))
    runs: list[dict[str, Any]] = json.loads(asked.results.read_text())["runs"] if asked.results.exists() else []
    for seed in asked.seeds:
        for name, fields in OBJECTIVES.items():
            key = {"objective": name, "seed": seed, "epochs": asked.epochs, "learning_rate": asked.learning_rate}
            if any({k: run[k] for k in key} == key for run in runs):
                continue
            started = time.process_time()
            curve = train(split, fields, seed, asked.epochs, asked.learning_rate)
            runs.append({**key, "curve": curve, "cpu_seconds": round(time.process_time() - started, 1)})
            shown = [(row["epoch"], round(row["training"], 3), round(row["test"], 3)) for row in curve]
            print(name, seed, shown, runs[-1]["cpu_seconds"], flush=True)
            stamp = {"threads": torch.get_num_threads(), "versions": library_versions()}
            document = {"data": str(asked.data), "batch": BATCH, "settings": TOWERS, "runs": runs, **stamp}
            write_text(
                asked.results,
                json.dumps({**document, "date": datetime.now(UTC).isoformat(timespec="minutes")}, indent=1),
            )


if __name__ == "__main__":
    main()
