"""Two single-threaded ranks against one rank with two threads at the same global batch; planned against actual memory.

    python benchmarks/ranks.py [--rounds 9] [--json benchmarks/results/ranks.json]

Both contenders train the same model on the same batches: pooled histories of 20, D = 64, a catalog of 200,000 items
(Zipf-like), in-batch and 1,024 uniform candidates, duplicates removed, Adam. They alternate every five steps; the
inactive one waits in a barrier. The communication of the pair is also timed alone. Then W ranks train on a large
catalog for a few steps, and their peak memory is compared with `twotower plan`. Finally, the measured step time is
compared with the planned one, using the rates that the same processes measured in the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from rounds import how
from torch import nn

from twotower.config.run import Config
from twotower.data import Batch, Interactions, TrainingBatches
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import placed_tables
from twotower.distributed.torchrec_tables import library
from twotower.objectives.build import build_objective
from twotower.system import hardware, tuning
from twotower.towers import build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.gradient_sync import GradientExchange
from twotower.training.machine_rates import measure_rates
from twotower.training.optimizer import parameter_groups
from twotower.training.placement import place_tables
from twotower.training.scale_plan import Rates, Workload, plan_scale
from twotower.training.seeds import draws_of

STEPS, LENGTH, UNIFORM, SEED = 5, 20, 1024, 0
Fork = get_context("fork")  # importing takes longer than the work


def interactions(items: int, rows: int) -> Interactions:
    """Generate rows with Zipf-like popularity, at least one for every item."""
    random = np.random.default_rng(SEED)
    drawn = (items * random.random(rows - items) ** 2.5).astype(np.int64)
    columns = {
        "user_id": random.integers(0, rows // 25, rows),
        "item_id": np.concatenate([np.arange(items), drawn]),
        "timestamp": random.permutation(rows),
    }
    return Interactions.from_frame(pl.DataFrame(columns))


class Training:
    """The training step of one rank, as the trainer runs it."""

    def __init__(
        self,
        data: Interactions,
        ranks: Communicator,
        args: argparse.Namespace,
        rule: str = "adam",
        layout: str = "replicated",
        engine: str = "builtin",
    ) -> None:
        config = Config.load(
            None,
            [
                f"item_tower.dimension={args.dimension}",
                f"query_tower.history.length={LENGTH}",
                f"training.batch_size={args.batch}",
                f"training.table_placement={layout}",
                f"training.table_engine={engine}",
                f"training.table_optimizer={rule}",
                f"objective.sources=[{{in_batch: {{}}}}, {{uniform: {{size: {UNIFORM}}}}}]",
            ],
        ).resolved(len(data))
        torch.manual_seed(SEED)
        self.ranks = ranks
        placement = place_tables(config, data, ranks)
        with placed_tables(placement.parts, placement.open_engine(args.dimension)):
            self.towers = build_towers(config, num_queries=data.num_queries, num_items=data.num_items).train()
        self.objective = build_objective(config, data).train()
        model = nn.ModuleList([self.towers, self.objective])
        self.optimizer = TableOptimizer(parameter_groups(model, 0.01, lr=1e-3, table_rule=rule), lr=1e-3)
        self.exchange = GradientExchange(model, ranks)
        self.batches = iter(TrainingBatches(data, args.batch, history_length=LENGTH, seed=SEED, ranks=ranks))
        self.step_number = 0

    def loss(self, batch: Batch) -> torch.Tensor:
        """Compute the rank's share of a batch's loss."""
        generator = draws_of(SEED, self.step_number, "cpu")
        return compute_loss(self.towers, self.objective, batch, self.ranks, generator=generator)[0]

    def step(self, batch: Batch | None = None) -> float:
        """Run one step on the rank's share of the loss, without computing the total loss of all ranks."""
        loss = self.loss(next(self.batches) if batch is None else batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.exchange.sum_gradients()
        self.optimizer.step()
        self.step_number += 1
        return float(loss.detach())


def join(folder: str, rank: int, size: int) -> Communicator:
    """Join a group of ranks through a file store."""
    if size == 1:
        return Communicator()
    store = dist.FileStore(f"{folder}/store-{size}", size)  # type: ignore[attr-defined]  # missing in __all__
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return Communicator.current()


def contend(place: int, folder: str, data: Interactions, args: argparse.Namespace, turn: Any, found: Any) -> None:
    """Run one contender: place 0 is the rank with two threads, 1 and 2 are the pair. The inactive one waits."""
    torch.set_num_threads(2 if place == 0 else 1)
    ranks = join(folder, 0, 1) if place == 0 else join(folder, place - 1, 2)
    training = Training(data, ranks, args)
    times: list[float] = []
    for number in range(args.rounds + 1):
        for whose in ("one", "pair"):
            turn.wait()
            if (whose == "one") == (place == 0):
                start = time.perf_counter()
                for _ in range(STEPS):
                    training.step()
                if number:  # the first round warms up
                    times.append((time.perf_counter() - start) / STEPS)
            turn.wait()
    alone = 0.0
    if place:  # the cost of a step's communication alone
        codes, vectors = torch.zeros(args.batch // 2, dtype=torch.int64), torch.zeros(5000, args.dimension)
        rows = torch.zeros(20_000, args.dimension)
        start = time.perf_counter()
        for _ in range(STEPS):
            ranks.gather(codes, [len(codes)] * 2)
            ranks.gather(vectors, [len(vectors)] * 2)
            ranks.gather(rows, [len(rows)] * 2)
        alone = (time.perf_counter() - start) / STEPS
    found.put((place, times, alone))


def hold(rank: int, size: int, folder: str, data: Interactions, args: argparse.Namespace, found: Any) -> None:
    """Run a few steps on a large catalog, and measure memory before the model and at the peak."""
    torch.set_num_threads(1)
    before = hardware.resident_memory() or 0
    training = Training(data, join(folder, rank, size), args, rule=args.rule, layout=args.layout, engine=args.engine)
    for _ in range(4):
        training.step()
    found.put((rank, before, hardware.peak_memory() or 0))


def run(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Fork one process for each tuple of arguments, and collect the results."""
    found = Fork.Queue()
    started = [Fork.Process(target=target, args=(*given, found)) for given in arguments]
    for child in started:
        child.start()
    collected = [found.get(timeout=600) for _ in started]
    for child in started:
        child.join()
    return sorted(collected)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Compute medians, and the median of the ratios within a round."""
    data = interactions(args.items, args.items + 400_000)
    turn = Fork.Barrier(3)
    with tempfile.TemporaryDirectory() as folder:
        one, first, second = run(contend, [(place, folder, data, args, turn) for place in range(3)])
    pair = [max(a, b) for a, b in zip(first[1], second[1], strict=True)]
    return {
        "batch": args.batch,
        "items": args.items,
        "one rank of two threads, ms": round(1000 * statistics.median(one[1]), 2),
        "two ranks of one thread, ms": round(1000 * statistics.median(pair), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(pair, one[1], strict=True)), 3),
        "exchanges alone, ms": round(1000 * max(first[2], second[2]), 2),
    }


def workload(data: Interactions, size: int, rule: str, layout: str, args: argparse.Namespace) -> Workload:
    """Describe the sizes of `TrainingProcess` as a workload."""
    return Workload(
        items=data.num_items,
        dimension=args.dimension,
        batch=args.batch,
        ranks=size,
        history=LENGTH,
        sampled=UNIFORM,
        optimizer="adam" if rule == "adam" else "rowwise-adagrad",
        layout=layout,  # type: ignore[arg-type]  # one of those below
    )


def clock(rank: int, size: int, folder: str, data: Interactions, args: argparse.Namespace, found: Any) -> None:
    """Measure rates and steps in turn on all ranks at once: seconds of the planned and of the actual step."""
    torch.set_num_threads(1)
    ranks = join(folder, rank, size)
    training = Training(data, ranks, args, rule=args.rule, layout=args.layout)
    work, planned, took = workload(data, size, args.rule, args.layout, args), [], []
    for number in range(args.rounds + 1):
        ranks.wait()
        plan = plan_scale(work, measure_rates(work))
        ranks.wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            training.step()
        if number:
            took.append((time.perf_counter() - start) / STEPS)
            planned.append(plan.step)
    found.put((rank, planned, took))


def times(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the planned and the measured step of the slower rank, as medians over the rounds."""
    results = []
    data = interactions(args.items, args.items + 400_000)
    for size, rule, layout in (
        (1, "adam", "replicated"),
        (1, "rowwise-adagrad", "replicated"),
        (2, "adam", "replicated"),
        (2, "rowwise-adagrad", "replicated"),
        (2, "rowwise-adagrad", "row-wise"),
    ):
        given = argparse.Namespace(**{**vars(args), "rule": rule, "layout": layout})
        with tempfile.TemporaryDirectory() as folder:
            ranks = run(clock, [(rank, size, folder, data, given) for rank in range(size)])
        planned, took = ([max(round_) for round_ in zip(*(rank[at] for rank in ranks), strict=True)] for at in (1, 2))
        results.append(
            {
                "ranks": size,
                "optimizer": rule,
                "layout": layout,
                "planned, ms": round(1000 * statistics.median(planned), 1),
                "took, ms": round(1000 * statistics.median(took), 1),
                "planned over taken": round(statistics.median(a / b for a, b in zip(planned, took, strict=True)), 3),
            }
        )
    return results


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the plan with the peak memory of every rank."""
    results = []
    data = interactions(args.large, args.large + 200_000)
    library()  # once, before the ranks are forked; its memory is in the process of every row
    for size, rule, layout, engine in (
        (1, "adam", "replicated", "builtin"),
        (2, "adam", "replicated", "builtin"),
        (2, "rowwise-adagrad", "replicated", "builtin"),
        (2, "adam", "row-wise", "builtin"),
        (2, "rowwise-adagrad", "row-wise", "builtin"),
        (2, "rowwise-adagrad", "row-wise", "torchrec"),
        (2, "rowwise-adagrad", "table-wise", "torchrec"),
    ):
        given = argparse.Namespace(**{**vars(args), "rule": rule, "layout": layout, "engine": engine})
        with tempfile.TemporaryDirectory() as folder:
            held = run(hold, [(rank, size, folder, data, given) for rank in range(size)])
        work = workload(data, size, rule, layout, args)
        before = max(found[1] for found in held)
        planned = plan_scale(work, Rates(1, 1, 1, 1, 1, 0, before)).moments["step"]
        peak = max(found[2] for found in held)
        results.append(
            {
                "ranks": size,
                "optimizer": rule,
                "layout": layout,
                "engine": engine if layout != "replicated" else None,
                "items": data.num_items,
                "before, MiB": before >> 20,
                "planned, MiB": round(planned / 2**20),
                "held, MiB": peak >> 20,
                "planned over held": round(planned / peak, 3),
            }
        )
    return results


def main() -> None:
    """Run the parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--large", type=int, default=2_000_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--only", choices=("speed", "memory", "times"), default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.clock = "wall"
    tuning.tune()
    result: dict[str, Any] = {"how": {**how(args), "seed": SEED, "cores": os.cpu_count()}}
    if args.only in (None, "speed"):
        result["speed"] = speed(args)
    if args.only in (None, "memory"):
        result["memory"] = memory(args)
    if args.only in (None, "times"):
        result["times"] = times(args)
    if args.json is not None:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        if args.only and before:  # the other parts keep their own settings
            result[f"how of {args.only}"] = result.pop("how")
        args.json.write_text(json.dumps(before | result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
