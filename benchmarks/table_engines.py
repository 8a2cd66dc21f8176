"""Step time of two single-threaded ranks with row-wise tables in the built-in exchange and in TorchRec, side by side.

    python benchmarks/table_engines.py [--rounds 9] [--only codes] [--json benchmarks/results/table_engines.json]

All contenders run in the same two processes and alternate every five steps. `steps`: the workload of
benchmarks/ranks.py, with row-wise Adagrad. `rows`: only the fetch and the update of P distinct rows of a table of 2
million, with a random gradient, each rank its own rows. `codes`: the share of a step that TorchRec's input pipeline
could overlap with the step before, which is the exchange of codes; the ranks wait for each other before it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import LENGTH, SEED, STEPS, UNIFORM, Training, interactions, join, run
from rounds import how
from torch import nn
from torchrec.distributed.types import NoWait

from twotower.data import Interactions
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard, placed_tables
from twotower.distributed.torchrec_tables import TorchRecTables, library
from twotower.system import tuning
from twotower.towers import EmbeddingTable
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.training import TableOptimizer
from twotower.training.gradient_sync import GradientExchange
from twotower.training.optimizer import parameter_groups

#: Name -> engine and placement.
CONTENDERS = {
    "built-in, row-wise": ("builtin", "row-wise"),
    "TorchRec, row-wise": ("torchrec", "row-wise"),
    "TorchRec, table-wise": ("torchrec", "table-wise"),
}
BASE = next(iter(CONTENDERS))
ROWS, COUNTS = 2_000_000, (5_000, 20_000)


class Rows:
    """The fetch and the update of distinct rows of one table, on one rank."""

    def __init__(self, ranks: Communicator, engine: str, width: int) -> None:
        parts = {"item": RowShard(ranks, ROWS)}
        with placed_tables(parts, TorchRecTables(parts, width) if engine == "torchrec" else None):
            self.table = EmbeddingTable(ROWS, width, name="item")
        model = nn.ModuleDict({"item": self.table})
        self.optimizer = TableOptimizer(parameter_groups(model, 0, lr=0.01, table_rule="rowwise-adagrad"), lr=0.01)
        self.exchange = GradientExchange(model, ranks)
        self.random = np.random.default_rng(ranks.rank)
        self.count = 0

    def step(self) -> None:
        """Fetch, look up, and update `count` rows."""
        codes = torch.from_numpy(self.random.choice(ROWS, self.count, replace=False))
        self.optimizer.zero_grad()
        if self.table.engine is None:
            self.table.fetch(codes)
        else:
            self.table.fetched = self.table.engine.fetch({"item": codes})["item"]
        self.table(codes).sum().backward()
        self.exchange.sum_gradients()
        self.optimizer.step()


def alternate(
    ranks: Communicator, steps: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds and processor seconds per step of each contender and round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in steps if number % 2 else reversed(steps):
            ranks.wait()
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                steps[name]()
            if number:  # the first round warms up
                spent = (time.perf_counter() - start) / STEPS, (time.process_time() - busy) / STEPS
                times[name].append(spent)
    return times


def contend(rank: int, folder: str, data: Interactions, args: argparse.Namespace, found: Any) -> None:
    """Run one of the two ranks."""
    torch.set_num_threads(1)
    ranks = join(folder, rank, 2)
    trainings = {
        name: Training(data, ranks, args, rule="rowwise-adagrad", layout=layout, engine=engine)
        for name, (engine, layout) in CONTENDERS.items()
    }
    steps = alternate(ranks, {name: training.step for name, training in trainings.items()}, args.rounds)
    del trainings
    rows: dict[int, Any] = {}
    by_rows = {name: engine for name, (engine, way) in CONTENDERS.items() if way == "row-wise"}
    tables = {name: Rows(ranks, engine, args.dimension) for name, engine in by_rows.items()}
    for count in COUNTS:
        for table in tables.values():
            table.count = count
        rows[count] = alternate(ranks, {name: table.step for name, table in tables.items()}, args.rounds)
    found.put((rank, steps, rows))


def exchange_codes(rank: int, folder: str, data: Interactions, args: argparse.Namespace, found: Any) -> None:
    """Run one of the two ranks; time its steps and, in them, the exchange of codes."""
    torch.set_num_threads(1)
    ranks = join(folder, rank, 2)
    training = Training(data, ranks, args, rule="rowwise-adagrad", layout="row-wise", engine="torchrec")
    module = shared_tables_of(training.towers)[0].engine._module
    exchange, spent = module.input_dist, np.zeros(2)

    def timed(*asked: Any) -> Any:
        ranks.wait()
        start, busy = time.perf_counter(), time.process_time()
        codes = exchange(*asked).wait().wait()
        spent[:] += time.perf_counter() - start, time.process_time() - busy
        return NoWait(NoWait(codes))

    module.input_dist = timed
    times = []
    for _ in range(args.rounds + 1):
        spent[:] = 0
        (whole,) = alternate(ranks, {"TorchRec": training.step}, 1)["TorchRec"]
        times.append([*whole, *spent / (2 * STEPS)])  # of the warm-up and the round
    found.put((rank, np.median(times[1:], 0).tolist()))


def summarized(of_ranks: list[dict[str, list[tuple[float, float]]]]) -> dict[str, Any]:
    """Return medians over rounds of the slower rank, and of the ratios to the built-in exchange within a round."""
    slower = {name: np.max([one[name] for one in of_ranks], axis=0) for name in of_ranks[0]}  # [rounds, 2]
    result = {}
    for name, times in slower.items():
        (wall, busy), ratios = np.median(times, 0), np.median(times / slower[BASE], 0)
        result[name] = {
            "a step, ms": round(1000 * float(wall), 1),
            "over built-in": round(float(ratios[0]), 2),
            "of the processor, ms": round(1000 * float(busy), 1),
            "of the processor, over built-in": round(float(ratios[1]), 2),
        }
    return result


def main() -> None:
    """Run both parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--only", choices=("codes",), default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.clock = "wall"
    tuning.tune()
    library()  # once, before the ranks are forked
    data = interactions(args.items, args.items + 400_000)
    sizes = {"batch": args.batch, "items": args.items, "dimension": args.dimension, "history": LENGTH, "drawn": UNIFORM}
    result: dict[str, Any] = {}
    if args.only is None:
        with tempfile.TemporaryDirectory() as folder:
            found = run(contend, [(rank, folder, data, args) for rank in range(2)])
        result = {
            "how": {**how(args), "seed": SEED},
            "sizes": sizes,
            "steps": summarized([one[1] for one in found]),
            "rows": {f"{count} of {ROWS}": summarized([one[2][count] for one in found]) for count in COUNTS},
        }
    with tempfile.TemporaryDirectory() as folder:
        found = run(exchange_codes, [(rank, folder, data, args) for rank in range(2)])
    whole, busy, codes, busy_codes = np.max([one[1] for one in found], 0)  # of the slower rank
    result["codes"] = {
        "how": {**how(args), "seed": SEED},
        "sizes": sizes,
        "a step, ms": round(1000 * whole, 1),
        "of it the exchange of codes, ms": round(1000 * codes, 2),
        "of the processor, ms": round(1000 * busy, 1),
        "of it the exchange of codes, of the processor, ms": round(1000 * busy_codes, 2),
    }
    if args.json is not None:
        before = json.loads(args.json.read_text()) if args.only and args.json.exists() else {}
        args.json.write_text(json.dumps(before | result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
