"""Step time and memory against the size of the catalog and of the batch, and what the optimizer adds to a step.

    python benchmarks/scale.py [--parts catalogs,batches,optimizers] [--threads 2] [--json FILE] [--plot docs/scale.svg]

A step is the whole of it: towers (one table of queries, one of items), in-batch candidates with correction and masks,
loss, backward, row-wise Adagrad on the tables. Catalogs differ in N alone: the same ranks, drawn by Zipf's law, stand
for random codes of each catalog, so every batch has the same distinct items and duplicates at every size.

All sizes are timed in one process, one step of each in turn; reported are medians over rounds, and medians of the
ratios within a round. On a busy machine `--clock cpu --threads 1` counts processor time instead. Memory is the peak of
a process of its own for each size, less what it held before its model. `products` are the matrix products of the loss
alone, forward and backward, on the distinct items, in tiles.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower import machine, process
from twotower.data import Batch
from twotower.losses.objectives import SampledSoftmax
from twotower.negatives import CountedFrequency, InBatch, Pool
from twotower.towers import EmbeddingTable, ItemTower, QueryTower, TwoTower
from twotower.training import TableOptimizer, batch_loss
from twotower.training.optimizers import parameter_groups

SEED = 0
D = 64
NUM_QUERIES = 1_000_000
CATALOGS = [10**4, 10**5, 10**6, 10**7]
BATCHES = [2**power for power in range(10, 18)]
TILE = 256


class Step:
    """Training steps on one catalog, each with a batch of its own."""

    def __init__(self, num_items: int, rows: int, num_ranks: int, rule: str = "rowwise-adagrad") -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.rows, self.generator = rows, torch.Generator().manual_seed(SEED + 1)
        weight = 1.0 / torch.arange(1, num_ranks + 1, dtype=torch.float64)
        self.cumulated = weight.cumsum(0) / weight.sum()
        # Rank -> code, one to one: consecutive ranks lie far apart, as sorted ids of a real catalog do.
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
        """Rows of the next step."""
        ranks = torch.searchsorted(self.cumulated, torch.rand(self.rows, dtype=torch.float64, generator=self.generator))
        queries = torch.randint(0, NUM_QUERIES, (self.rows,), generator=self.generator)
        items = self.codes[ranks.clamp(max=len(self.codes) - 1)]
        self.distinct = len(torch.unique(items))
        return Batch(torch.arange(self.rows), queries, items, torch.empty(self.rows, 0, dtype=torch.int64))

    def whole(self, batch: Batch) -> None:
        """Towers, candidates, loss, backward, optimizer."""
        self.optimizer.zero_grad()
        batch_loss(self.towers, self.objective, batch)[0].mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def tables(self, batch: Batch) -> None:
        """The same without candidates and loss: look up the distinct rows, give each a gradient, move them."""
        self.optimizer.zero_grad()
        distinct = torch.unique(batch.items)
        total = self.towers.embed_items(distinct).sum() + self.towers.embed_queries(batch.queries, None).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def products(rows: int, distinct: int) -> Callable[[], None]:
    """What a loss cannot do without: scores, and the gradients of both sides, tile by tile."""
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


#: What is read before and after a call; `--clock cpu` for a busy machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = {"read": CLOCKS["wall"]}


def seconds(call: Callable[[], object]) -> float:
    """Time of one call, by the clock chosen."""
    read = _clock["read"]
    start = read()
    call()
    return read() - start


def rounds_of(calls: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round warms up and does not count. Preparing is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, prepare in calls.items():
            taken = seconds(prepare())
            if turn:
                times[name].append(taken)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def milliseconds(times: Sequence[float]) -> float:
    """Median, in thousandths of a second."""
    return round(statistics.median(times) * 1000, 2)


def peak(num_items: int, rows: int, num_ranks: int) -> float:
    """MiB that a process of its own held at most for this model and its steps."""
    command = [sys.executable, __file__, "--one", f"{num_items},{rows},{num_ranks}", "--threads", str(threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one(num_items: int, rows: int, num_ranks: int) -> None:
    """Print the memory of two steps."""
    before = machine.resident_memory() or 0
    step = Step(num_items, rows, num_ranks)
    for _ in range(2):
        step.whole(step.batch())
    print(((machine.peak_memory() or 0) - before) / 2**20)


def threads() -> int:
    """Threads of torch."""
    return torch.get_num_threads()


def catalogs(rounds: int, rows: int = 8192) -> list[dict[str, Any]]:
    """Step time and memory at each N."""
    steps = {n: Step(n, rows, CATALOGS[0]) for n in CATALOGS}
    calls: dict[str, Callable[[], Callable[[], object]]] = {}
    for n, step in steps.items():
        calls[f"whole {n}"] = lambda step=step: _bound(step.whole, step.batch())  # type: ignore[misc]
    for n, step in steps.items():
        calls[f"tables {n}"] = lambda step=step: _bound(step.tables, step.batch())  # type: ignore[misc]
    steps[CATALOGS[0]].batch()
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
        row["peak_mib"] = round(peak(int(row["items"]), rows, base), 1)
        row["tables_mib"] = round((int(row["items"]) + NUM_QUERIES) * (D + 1) * 4 / 2**20, 1)
        print(row, flush=True)
    return found


def batches(rounds: int, num_items: int = 10**6, largest: int = BATCHES[-1]) -> list[dict[str, Any]]:
    """Step time and memory at each B. Every size is timed beside its own products."""
    step = Step(num_items, BATCHES[0], num_items)
    found = []
    for rows in (size for size in BATCHES if size <= largest):
        step.rows = rows
        step.batch()
        multiply = products(rows, step.distinct)
        times = rounds_of(
            {
                "whole": lambda: _bound(step.whole, step.batch()),
                "products": lambda multiply=multiply: multiply,  # type: ignore[misc]
                "tables": lambda: _bound(step.tables, step.batch()),
            },
            rounds,
        )
        row = {
            "rows": rows,
            "items": num_items,
            "distinct": step.distinct,
            "step_ms": milliseconds(times["whole"]),
            "products_ms": milliseconds(times["products"]),
            "step_over_products": ratio(times["whole"], times["products"]),
            "tables_over_step": ratio(times["tables"], times["whole"]),
            "peak_mib": round(peak(num_items, rows, num_items), 1),
        }
        print(row, flush=True)
        found.append(row)
    return found


def optimizers(rounds: int, rows: int = 8192) -> list[dict[str, Any]]:
    """Look-up, backward and update of one table of a million rows, ids with duplicates, by each optimizer."""
    step = Step(10**4, rows, 10**4)
    step.codes, num_items = torch.randperm(10**6)[: 10**4], 10**6
    upstream = torch.randn(rows, D)
    pairs: dict[str, tuple[nn.Embedding, torch.optim.Optimizer]] = {}
    for name, sparse, make in (
        ("twotower adam", True, lambda p: TableOptimizer(p, lr=1e-3)),
        ("twotower rowwise-adagrad", True, lambda p: TableOptimizer(p, lr=1e-2, rule="rowwise-adagrad")),
        ("torch SparseAdam", True, lambda p: torch.optim.SparseAdam(p, lr=1e-3)),
        ("torch Adagrad, sparse", True, lambda p: torch.optim.Adagrad(p, lr=1e-2)),
        ("torch AdamW, dense", False, lambda p: torch.optim.AdamW(p, lr=1e-3)),
    ):
        table = EmbeddingTable(num_items, D)
        table.sparse = sparse
        pairs[name] = table, make(list(table.parameters()))

    def update(table: nn.Embedding, optimizer: torch.optim.Optimizer, items: Tensor) -> None:
        optimizer.zero_grad()
        table(items).backward(upstream)
        optimizer.step()

    times = rounds_of(
        {
            name: lambda pair=pair: _bound(update, *pair, step.batch().items)  # type: ignore[misc]
            for name, pair in pairs.items()
        },
        rounds,
    )
    found = []
    for name, (embedding, optimizer) in pairs.items():
        state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        row = {
            "optimizer": name,
            "ms": milliseconds(times[name]),
            "over_rowwise_adagrad": ratio(times[name], times["twotower rowwise-adagrad"]),
            "state_over_table": round(state / embedding.weight.nbytes, 3),
        }
        print(row, flush=True)
        found.append(row)
    return found


def _bound(call: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: call(*arguments)


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory against N and against B, as SVG."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scale"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    parts = [(results["catalogs"], "items", "catalog size N"), (results["batches"], "rows", "batch size B")]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex="col")
    for column, (rows, key, label) in enumerate(parts):
        at = [row[key] for row in rows]
        axes[0, column].plot(at, [row["step_ms"] for row in rows], "o-", color="#33566e", label="whole step")
        limit = [row["step_ms"] / row["step_over_products"] for row in rows]
        axes[0, column].plot(at, limit, "s--", color="#b5651d", label="matrix products alone")
        axes[1, column].plot(at, [row["peak_mib"] for row in rows], "o-", color="#33566e", label="peak memory")
        if key == "items":
            own = [row["tables_mib"] for row in rows]
            axes[1, column].plot(at, own, "s--", color="#b5651d", label="tables and their state")
        axes[0, column].set(xscale="log", yscale="log", ylabel="ms per step")
        axes[1, column].set(xscale="log", yscale="log", xlabel=label, ylabel="MiB")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3, which="both")
            axis.legend(frameon=False)
        if key == "items":
            axes[0, column].set_ylim(min(limit) / 3, max(row["step_ms"] for row in rows) * 3)
    axes[0, 0].set_title(f"B = {parts[0][0][0]['rows']:,}, the same distinct items at every N")
    axes[0, 1].set_title(f"N = {parts[1][0][0]['items']:,}")
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main() -> None:
    """Measure the parts asked for; results of others in the JSON file are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="catalogs,batches,optimizers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--largest-batch", type=int, default=BATCHES[-1])
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time; wants --threads 1")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    parser.add_argument("--plot", type=Path, default=None, help="where to draw the results in --json")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tuning = process.tune()
    _clock["read"] = CLOCKS[arguments.clock]
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        one(*(int(part) for part in arguments.one.split(",")))
        return
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "catalogs": lambda: catalogs(arguments.rounds),
        "batches": lambda: batches(arguments.rounds, largest=arguments.largest_batch),
        "optimizers": lambda: optimizers(arguments.rounds),
    }
    report: dict[str, Any] = {"benchmark": "scale", "seed": SEED, "dimension": D}
    if arguments.json and arguments.json.exists():
        report = json.loads(arguments.json.read_text())
    for part in filter(None, arguments.parts.split(",")):
        report[part] = measure[part]()
        report.setdefault("how", {})[part] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rounds": arguments.rounds,
            "threads": threads(),
            "clock": arguments.clock,
            "load": round(os.getloadavg()[0], 1),
            "kept_below": tuning.kept_below,
            "huge_pages": machine.huge_pages(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
