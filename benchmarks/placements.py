"""Step time of two single-threaded ranks with row-wise, column-wise and table-wise placement, and prefetched codes.

    python benchmarks/placements.py [--rounds 9] [--json benchmarks/results/placements.json]

The workload is the same as in benchmarks/ranks.py, with row-wise Adagrad. All placements run in the same two processes
and alternate every five steps. The last contender is row-wise with the codes of its steps exchanged before the clock
starts, as if a prefetch had exchanged them at no cost: an upper bound on the saving by prefetching.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ranks import LENGTH, SEED, STEPS, UNIFORM, Training, interactions, join, run
from rounds import how
from torch import Tensor

from twotower.data import Batch, Interactions
from twotower.distributed.partition import ColumnShard
from twotower.distributed.row_exchange import RowRequest, fetch_rows, request_rows
from twotower.system import tuning
from twotower.towers import EmbeddingTable

PLACEMENTS, KNOWN = ("row-wise", "column-wise", "table-wise"), "row-wise, codes exchanged before"


class Fetching:
    """A replacement of `EmbeddingTable.fetch` that counts the numbers sent, and can record and replay row requests."""

    def __init__(self) -> None:
        self.given = 0  # numbers to other ranks and to this one
        self.kept: list[RowRequest] = []
        self.keeps = False

    def fetch(self, table: EmbeddingTable, codes: Tensor) -> None:
        """Fetch the rows of some codes."""
        if table.part is None:
            return
        if self.kept and not self.keeps:
            asked = self.kept.pop(0)
        else:
            asked = request_rows(table.part, codes)
            width = table.part.own.stop - table.part.own.start
            self.given += len(asked.given) * (width if isinstance(table.part, ColumnShard) else table.embedding_dim)
        if self.keeps:
            self.kept.append(asked)
        table.fetched = fetch_rows(table.weight, table.part, asked)

    def keep(self, training: Training, batches: list[Batch]) -> None:
        """Record the row requests of the steps over these batches."""
        self.keeps, number = True, training.step_number
        for batch in batches:
            training.loss(batch)
            training.step_number += 1
        self.keeps, training.step_number = False, number


def turns(rank: int, folder: str, data: Interactions, args: argparse.Namespace, found: Any) -> None:
    """Run one of the two ranks: seconds per step of each contender and round, numbers sent per step and placement."""
    torch.set_num_threads(1)
    ranks, fetching = join(folder, rank, 2), Fetching()
    trainings = {one: Training(data, ranks, args, rule="rowwise-adagrad", layout=one) for one in PLACEMENTS}

    def fetch(self: EmbeddingTable, codes: Tensor) -> None:
        fetching.fetch(self, codes)

    EmbeddingTable.fetch = fetch  # type: ignore[method-assign]
    names = (*PLACEMENTS, KNOWN)
    times: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    given = dict.fromkeys(PLACEMENTS, 0)
    for number in range(args.rounds + 1):
        for name in names if number % 2 else reversed(names):
            training = trainings.get(name) or trainings["row-wise"]
            batches = [next(training.batches) for _ in range(STEPS)]
            if name == KNOWN:
                fetching.keep(training, batches)
            ranks.wait()
            fetching.given, start, busy = 0, time.perf_counter(), time.process_time()
            for batch in batches:
                training.step(batch)
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / STEPS)
                processor[name].append((time.process_time() - busy) / STEPS)
            if name in given:
                given[name] = fetching.given // STEPS
    found.put((rank, times, processor, given))


def main() -> None:
    """Summarize: medians of the slower rank, and of the ratios to row-wise within a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.clock = "wall"
    tuning.tune()
    data = interactions(args.items, args.items + 400_000)
    with tempfile.TemporaryDirectory() as folder:
        found = run(turns, [(rank, folder, data, args) for rank in range(2)])
    sizes = {"batch": args.batch, "items": args.items, "dimension": args.dimension, "history": LENGTH, "drawn": UNIFORM}
    result: dict[str, Any] = {"how": {**how(args), "seed": SEED}, "sizes": sizes}
    wall, busy = ({name: slower(found, place, name) for name in found[0][1]} for place in (1, 2))
    for name in wall:
        result[name] = {
            "a step, ms": round(1000 * statistics.median(wall[name]), 1),
            "over row-wise": ratio(wall[name], wall["row-wise"]),
            "of the processor, ms": round(1000 * statistics.median(busy[name]), 1),
            "of the processor, over row-wise": ratio(busy[name], busy["row-wise"]),
        }
        if name in PLACEMENTS:
            result[name]["numbers that each rank gives"] = [one[3][name] for one in found]
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def slower(found: list[tuple[Any, ...]], place: int, name: str) -> list[float]:
    """Return the times of the slower rank in each round."""
    return [max(pair) for pair in zip(*(one[place][name] for one in found), strict=True)]


def ratio(these: list[float], those: list[float]) -> float:
    """Return the median over rounds."""
    return round(statistics.median(a / b for a, b in zip(these, those, strict=True)), 3)


if __name__ == "__main__":
    main()
