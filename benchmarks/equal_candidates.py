"""Comparison of objectives at an equal number of candidates per row.

    python benchmarks/equal_candidates.py --data ../shared/data --only online-retail --out runs/equal --seeds 3

Every row has 1,023 candidates with every objective except full softmax, which uses all items:

    uniform                        1,023 uniform draws
    in-batch forms, refined-logq   the 511 other rows and the 512 previous rows (a cross-batch memory: the same
                                   proposal, with current embeddings)
    mixed forms                    the 511 other rows and 512 uniform draws
    head + mixed                   the 256 most frequent items, the 511 other rows, 256 uniform draws from the tail

Copies of an item are merged before the towers run, so the number of *distinct* candidates, which determines the cost
of a step, differs; it is measured over 50 batches and written to `candidates.json`. Initial weights, row order, batch
size (512), epochs, learning rate and towers are the same for all objectives. `twotower compare` does the rest: finished
runs are not repeated, interrupted ones are resumed, and the report has intervals, coverage and popularity deciles.
Start with one seed and add more later.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import twotower as tt
from twotower.comparison import compare_run
from twotower.data import TrainingBatches
from twotower.objectives.build import build_objective
from twotower.run import read_data, split_data
from twotower.system.filesystem import write_text

BATCH, DRAWN, HEAD = 512, 1023, 256
REST = DRAWN - (BATCH - 1)
ROWS: list[dict[str, Any]] = [{"in_batch": {}}, {"memory": {"size": REST}}]
MIXED: list[dict[str, Any]] = [{"in_batch": {}}, {"uniform": {"size": REST}}]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "full-softmax": {"name": "full-softmax"},
    "uniform": {"name": "sampled-softmax-uniform", "sources": [{"uniform": {"size": DRAWN}}]},
    "in-batch": {"name": "in-batch", "sources": ROWS},
    "in-batch-logq": {"name": "in-batch-logq", "sources": ROWS},
    "in-batch-logq-all": {"name": "in-batch-logq-all", "sources": ROWS},
    "refined-logq": {"name": "refined-logq", "sources": ROWS},
    "mixed": {"name": "mixed", "sources": MIXED},
    "mixed-by-source": {"name": "mixed-by-source", "sources": MIXED},
    "expected-count-in-batch": {"name": "expected-count", "sources": ROWS},
    "expected-count-mixed": {"name": "expected-count", "sources": MIXED},
    "expected-count-head-mixed": {
        "name": "expected-count",
        "sources": [{"head": {"size": HEAD}}, {"in_batch": {}}, {"uniform": {"size": REST - HEAD}}],
    },
}
COMMON = [
    f"training.batch_size={BATCH}",
    "query_tower.history.length=20",
    "training.patience=100",
    "evaluation.ks=[10, 20]",
]
DATA: dict[str, tuple[str, list[str]]] = {
    "online-retail": ("online-retail/interactions.parquet", ["data.split=time"]),
    "amazon-beauty": ("amazon/beauty.txt", ["data.split=leave-last-out"]),
    "ml-1m-loo": (
        "ml-1m-loo/sequences.parquet",
        ["data.split=leave-last-out", "data.validation_queries=validation_user"],
    ),
}


def written(out: Path, names: list[str], fields: dict[str, Any]) -> list[str]:
    """Write the objectives as YAML files for `twotower compare`."""
    folder = out / "objectives"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_text(folder / f"{name}.yaml", yaml.safe_dump({**OBJECTIVES[name], **fields}, sort_keys=False))
    return [f"{name}={folder / name}.yaml" for name in names]


def distinct(config: tt.Config, source: str, names: list[str], batches: int = 50) -> dict[str, dict[str, float]]:
    """Measure the mean number of candidates of a batch: drawn and distinct."""
    split = split_data(read_data(source, config.data), config.data)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        torch.manual_seed(0)
        objective = build_objective(
            config.model_copy(
                update={"objective": tt.Config.model_validate({"objective": OBJECTIVES[name]}).objective}
            ),
            split.train,
        )
        rows, drawn_sizes, distinct_sizes = iter(TrainingBatches(split.train, BATCH)), [], []
        for _ in range(batches):
            drawn = objective.pool.draw(next(rows).items)
            live = drawn.items[torch.isfinite(drawn.log_expected_count)]
            drawn_sizes.append(len(drawn.items))
            distinct_sizes.append(len(torch.unique(live)))
        # The first batch has an empty memory, which does not affect the median.
        found[name] = {
            "drawn": float(torch.tensor(drawn_sizes, dtype=torch.float64).median()),
            "distinct": float(torch.tensor(distinct_sizes, dtype=torch.float64).median()),
        }
    return found


def main() -> None:
    """Compare on the requested data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--objective-set", dest="fields", action="append", default=[], metavar="FIELD=VALUE", help="for all objectives"
    )
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    fields = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in asked.fields)}
    for name in asked.only:
        path, protocol = DATA[name]
        out = asked.out / name
        config = tt.Config.load(None, [*protocol, *COMMON, f"training.max_epochs={asked.epochs}", *asked.overrides])
        objectives = written(out, asked.objectives, fields)
        numbers = distinct(config, str(asked.data / path), asked.objectives)
        write_text(out / "candidates.json", json.dumps(numbers, indent=1))
        compare_run(
            str(asked.data / path),
            out,
            config,
            objectives,
            seeds=asked.seeds,
            audited=False,
            command=shlex.join(["python", *sys.argv]),
        )


if __name__ == "__main__":
    main()
