"""Step time and memory as functions of catalog size and batch size.

    python benchmarks/scale.py [--parts catalogs,batches] [--threads 2] [--json FILE] [--plot docs/scale.svg]

A step is a complete training step: towers (one table of queries, one of items), in-batch candidates with correction and
masks, loss, backward, row-wise Adagrad on the tables. Catalogs differ only in N: the same Zipf-distributed popularity
ranks are mapped to random codes of each catalog, so every batch has the same number of distinct items and duplicates at
every size.

All sizes are timed in one process, one step of each in turn. Reported are medians over rounds, and medians of the
ratios within a round. On a busy machine, use `--clock cpu --threads 1` for CPU time. Memory is measured in a separate
process for each size: its peak minus its size before the model. `products` are the matrix products of the loss alone,
forward and backward, on the distinct items, in tiles.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from memory import peak_mib, resident_mib
from rounds import apply, bound, how, milliseconds, options, ratio, rounds_of
from scale_plot import plot

from twotower.data import Batch
from twotower.negatives import CountedFrequency, InBatch, Pool
from twotower.objectives.base import SampledSoftmax
from twotower.towers import ItemTower, QueryTower, TwoTower
from twotower.training import TableOptimizer, compute_loss
from twotower.training.optimizer import parameter_groups

SEED = 0
D = 64
NUM_QUERIES = 1_000_000
CATALOGS = [10**4, 10**5, 10**6, 10**7]
BATCHES = [2**power for power in range(10, 18)]
TILE = 256


class Step:
    """Training steps on one catalog, each with a new batch."""

    def __init__(self, num_items: int, rows: int, num_ranks: int, rule: str = "rowwise-adagrad") -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.rows, self.generator = rows, torch.Generator().manual_seed(SEED + 1)
        weight = 1.0 / torch.arange(1, num_ranks + 1, dtype=torch.float64)
        self.cumulated = weight.cumsum(0) / weight.sum()
        # A one-to-one map of rank to code: consecutive ranks have distant codes, as in a real catalog with sorted ids.
        self.codes = torch.randperm(num_items, generator=generator)[:num_ranks].clone()
        counts = torch.ones(num_items, dtype=torch.int64)
        counts[self.codes] += (weight * 1e7 / weight.sum()).long()
        torch.manual_seed(SEED)
        queries = QueryTower(NUM_QUERIES, D, hidden=[])
        self.towers = TwoTower(queries, ItemTower(num_items, D))
        for table in (queries.ids, self.towers.item_tower.ids):
            assert table is not None
            table.sparse = True
        self.objective = SampledSoftmax(Pool(InBatch(CountedFrequency(counts)), unique=True))
        groups = parameter_groups(self.towers, 0.01, lr=1e-3, table_rule=rule, table_lr=1e-2)
        self.optimizer = TableOptimizer(groups, lr=1e-3)
        self.distinct = 0

    def batch(self) -> Batch:
        """Draw the rows of the next step."""
        ranks = torch.searchsorted(self.cumulated, torch.rand(self.rows, dtype=torch.float64, generator=self.generator))
        queries = torch.randint(0, NUM_QUERIES, (self.rows,), generator=self.generator)
        items = self.codes[ranks.clamp(max=len(self.codes) - 1)]
        self.distinct = len(torch.unique(items))
        return Batch(torch.arange(self.rows), queries, items, torch.empty(self.rows, 0, dtype=torch.int64))

    def whole(self, batch: Batch) -> None:
        """Run a complete step: towers, candidates, loss, backward, optimizer."""
        self.optimizer.zero_grad()
        compute_loss(self.towers, self.objective, batch)[0].mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def tables(self, batch: Batch) -> None:
        """Run a step without candidates and loss: look up the distinct rows, backpropagate a sum, update them."""
        self.optimizer.zero_grad()
        distinct = torch.unique(batch.items)
        total = self.towers.embed_items(distinct).sum() + self.towers.embed_queries(batch.queries, None).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def products(rows: int, distinct: int) -> Callable[[], None]:
    """Return the minimum work of a loss: scores and the gradients of both sides, tile by tile."""
    query, items = torch.randn(rows, D), torch.randn(distinct, D)
    of_query, of_items = torch.empty(rows, D), torch.zeros(distinct, D)
    tile = torch.empty(TILE, distinct)

    def multiply() -> None:
        for top in range(0, rows, TILE):
            part = slice(top, min(top + TILE, rows))
            scores = tile[: part.stop - top]
            torch.mm(query[part], items.T, out=scores)
            torch.mm(scores, items, out=of_query[part])
            of_items.addmm_(scores.T, query[part])

    return multiply


def peak(num_items: int, rows: int, num_ranks: int) -> float:
    """Measure the peak MiB of this model and its steps, in a separate process."""
    command = [
        sys.executable,
        __file__,
        "--one",
        f"{num_items},{rows},{num_ranks}",
        "--threads",
        str(torch.get_num_threads()),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one(num_items: int, rows: int, num_ranks: int) -> None:
    """Print the memory of two steps."""
    before = resident_mib()
    step = Step(num_items, rows, num_ranks)
    for _ in range(2):
        step.whole(step.batch())
    print(peak_mib() - before)


def catalogs(rounds: int, *, rows: int = 8192, with_memory: bool = True) -> list[dict[str, Any]]:
    """Measure step time and memory at each N."""
    steps = {n: Step(n, rows, CATALOGS[0]) for n in CATALOGS}
    calls: dict[str, Callable[[], Callable[[], object]]] = {}
    for n, step in steps.items():
        calls[f"whole {n}"] = lambda step=step: bound(step.whole, step.batch())  # type: ignore[misc]
    for n, step in steps.items():
        calls[f"tables {n}"] = lambda step=step: bound(step.tables, step.batch())  # type: ignore[misc]
    for step in steps.values():  # for every size, so that their batches stay the same
        step.batch()
    multiply = products(rows, steps[CATALOGS[0]].distinct)
    calls["products"] = lambda: multiply
    times = rounds_of(calls, rounds)
    base = CATALOGS[0]
    found = []
    for n, step in steps.items():
        whole, tables = times[f"whole {n}"], times[f"tables {n}"]
        found.append(
            {
                "items": n,
                "rows": rows,
                "distinct": step.distinct,
                "step_ms": milliseconds(whole),
                "step_over_smallest": ratio(whole, times[f"whole {base}"]),
                "step_over_products": ratio(whole, times["products"]),
                "tables_ms": milliseconds(tables),
                "tables_over_smallest": ratio(tables, times[f"tables {base}"]),
                "tables_over_step": ratio(tables, whole),
            }
        )
    del steps, step, calls
    for row in found:
        if with_memory:
            row["peak_mib"] = round(peak(int(row["items"]), rows, base), 1)
        row["tables_mib"] = round((int(row["items"]) + NUM_QUERIES) * (D + 1) * 4 / 2**20, 1)
        print(row, flush=True)
    return found


def batches(
    rounds: int, sizes: Sequence[int], *, num_items: int = 10**6, with_memory: bool = True
) -> list[dict[str, Any]]:
    """Measure step time and memory at each B. Every size is timed together with its own products."""
    step = Step(num_items, BATCHES[0], num_items)
    found: list[dict[str, Any]] = []
    for rows in sizes:
        step.rows = rows
        step.batch()
        multiply = products(rows, step.distinct)
        times = rounds_of(
            {
                "whole": lambda: bound(step.whole, step.batch()),
                "products": lambda multiply=multiply: multiply,  # type: ignore[misc]
                "tables": lambda: bound(step.tables, step.batch()),
            },
            rounds,
        )
        row: dict[str, Any] = {
            "rows": rows,
            "items": num_items,
            "distinct": step.distinct,
            "rounds": rounds,
            "step_ms": milliseconds(times["whole"]),
            "products_ms": milliseconds(times["products"]),
            "step_over_products": ratio(times["whole"], times["products"]),
            "tables_over_step": ratio(times["tables"], times["whole"]),
        }
        if with_memory:
            row["peak_mib"] = round(peak(num_items, rows, num_items), 1)
        print(row, flush=True)
        found.append(row)
    return found


def memory_of_batches(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add peak memory to rows of `batches` that were timed earlier: a busy machine does not affect memory."""
    for row in rows:
        row["peak_mib"] = round(peak(int(row["items"]), int(row["rows"]), int(row["items"])), 1)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure the requested parts; results of other parts in the JSON file are kept."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        default="catalogs,batches",
        help="catalogs, batches, memory (peaks of batches timed earlier); empty: only plot existing results",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="others in the JSON file are kept")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also measure peaks")
    parser.add_argument("--plot", type=Path, default=None, help="where to draw the results in --json")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    apply(arguments)
    if arguments.one:
        one(*(int(part) for part in arguments.one.split(",")))
        return
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "catalogs": lambda: catalogs(arguments.rounds, with_memory=arguments.memory),
        "batches": lambda: batches(arguments.rounds, arguments.batches, with_memory=arguments.memory),
        "memory": lambda: memory_of_batches(report["batches"]),
    }
    report: dict[str, Any] = {"benchmark": "scale", "seed": SEED, "dimension": D}
    if arguments.json and arguments.json.exists():
        report = json.loads(arguments.json.read_text())
    for part in filter(None, arguments.parts.split(",")):
        found = measure[part]()
        if part == "batches":
            kept = [row for row in report.get(part, []) if row["rows"] not in arguments.batches]
            found = sorted(kept + found, key=lambda row: int(row["rows"]))
        report["batches" if part == "memory" else part] = found
        report.setdefault("how", {})[part] = how(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
