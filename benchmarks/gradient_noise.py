r"""Signal and noise of a training step: the item table's gradient over batches and draws, for several objectives.

    python benchmarks/gradient_noise.py runs/compare-ml-1m-loo/runs/full-softmax-0 --batches 48 \
        --json benchmarks/results/gradient_noise.json

`twotower audit` fixes the rows of a batch and redraws the candidates: it measures how well a pool estimates the full
softmax *of these rows*. A training step has a second source of noise, the rows themselves, and the two are not
independent if the candidates are the rows. Here both vary. For each objective, with the same batches and the same
dropout, these are measured over all coordinates of the item table and over the coordinates of each popularity third:

    signal   |E g|^2, from the product of two halves of the batches, which is unbiased by noise
    power    E |g|^2
    share    signal / power: 1 for a gradient without noise
    step     root mean square over coordinates of |E g_i| / sqrt(E g_i^2): how far Adam moves, in learning rates
    cosine   between the mean gradient and that of the full softmax on the same batches
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.config.run import Config, ObjectiveConfig
from twotower.data import Batch, TrainingBatches
from twotower.data.interactions import Interactions
from twotower.evaluation import popularity_thirds
from twotower.objectives.build import build_objective
from twotower.run import reread
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text
from twotower.towers import TwoTower
from twotower.training.step import compute_loss

OBJECTIVES: dict[str, dict[str, Any]] = {
    "full-softmax": {},
    "refined-logq": {},
    "in-batch-logq": {},
    "expected-count, in-batch": {"name": "expected-count", "sources": [{"in_batch": {}}]},
    "expected-count, in-batch and 1,024 uniform": {"name": "expected-count"},
    "expected-count, 1,024 by frequency": {
        "name": "expected-count",
        "sources": [{"frequency": {"size": 1024, "power": 1.0}}],
    },
    "mixed": {},
}


class Moments:
    """The first and second moments of a gradient, in two halves of the batches."""

    def __init__(self) -> None:
        self.halves: list[Tensor | None] = [None, None]
        self.counts = [0, 0]
        self.square: Tensor | float = 0.0

    def add(self, place: int, gradient: Tensor) -> None:
        """Add one batch."""
        half = place % 2
        held = self.halves[half]
        self.halves[half] = gradient.double() if held is None else held + gradient
        self.counts[half] += 1
        self.square = self.square + gradient.double() ** 2

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean gradient of each half."""
        first, second = self.halves
        assert first is not None and second is not None
        return first / self.counts[0], second / self.counts[1]

    def numbers(self, thirds: Tensor) -> dict[str, float]:
        """Compute the quantities of the module docstring."""
        first, second = self.means()
        power = torch.as_tensor(self.square) / sum(self.counts)
        found: dict[str, float] = {}
        negative_mask = {"": thirds >= 0, " head": thirds == 0, " mid": thirds == 1, " tail": thirds == 2}
        for name, rows in negative_mask.items():
            signal = float((first[rows] * second[rows]).sum())
            found[f"signal{name}"], found[f"power{name}"] = signal, float(power[rows].sum())
            found[f"share{name}"] = signal / float(power[rows].sum())
            squared = (first[rows] * second[rows]) / power[rows].clamp(min=1e-300)
            found[f"step{name}"] = float(squared.mean().clamp(min=0).sqrt())
        return found


def gradients(towers: TwoTower, settings: Config, train: Interactions, batches: list[Batch]) -> Moments:
    """Collect the item table's gradient of one objective over the batches."""
    objective = build_objective(settings, train)
    table = towers.item_tower.ids
    assert table is not None
    moments = Moments()
    for place, batch in enumerate(batches):
        torch.manual_seed(place)  # the same dropout for all, if they use the generator in the same order
        loss, _, _ = compute_loss(towers, objective, batch)
        moments.add(place, torch.autograd.grad(loss, table.weight)[0])
    return moments


def main() -> None:
    """Measure all objectives on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data", help="current location of the data, if it has moved")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--no-dropout", action="store_true", help="towers in evaluation mode")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    artifact, split = reread(asked.run, asked.data)
    train, towers = split.train, artifact.towers
    towers.train(not asked.no_dropout)
    rows = iter(TrainingBatches(train, asked.batch_size, history_length=artifact.config.history_length, seed=12345))
    batches = [next(rows) for _ in range(asked.batches)]
    thirds = torch.from_numpy(popularity_thirds(train.item_counts()))
    found: dict[str, Any] = {}
    means: dict[str, Tensor] = {}
    for name, fields in OBJECTIVES.items():
        objective = ObjectiveConfig.model_validate({"name": name, **fields})
        moments = gradients(towers, artifact.config.model_copy(update={"objective": objective}), train, batches)
        means[name] = torch.stack(moments.means()).mean(0)
        cosine = torch.nn.functional.cosine_similarity(means[name].flatten(), means["full-softmax"].flatten(), 0)
        found[name] = {**moments.numbers(thirds), "cosine": float(cosine)}
        print(f"{name:46s}", {k: round(v, 5) for k, v in found[name].items() if "power" not in k}, flush=True)
        document = {
            "model": asked.run.name,
            "batches": asked.batches,
            "batch_size": asked.batch_size,
            "dropout": not asked.no_dropout,
            "objectives": found,
            "threads": torch.get_num_threads(),
            "versions": library_versions(),
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
        }
        write_text(asked.json, json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
