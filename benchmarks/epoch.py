"""Seconds of an epoch of MovieLens-1M and its evaluation, compared with item-kNN and an equivalent plain PyTorch loop.

    python benchmarks/epoch.py [--data ../shared/data/ml-1m-loo/sequences.parquet] [--epochs 3] [--json FILE]

Ours: pooled history, B = 8192, D = 64, in-batch and 1,024 uniform candidates, duplicates removed, as in `twotower
train` without Lightning (`TrainingBatches`, `compute_loss`, `TableOptimizer`), then `TowerRanker`. Plain: the same
towers with the same initial weights and learning rate; everything else as a competent user would write it: padded rows
gathered by torch, a matrix of logits, log expected count subtracted, the row's own item masked among the other rows and
the uniform draws, cross_entropy, dense Adam, and the full score matrix with `topk` for evaluation. bfloat16: ours under
autocast, with the same initial weights and rows. The contenders alternate epoch by epoch. For item-kNN, fit and ranking
of our baseline are timed. The loader alone is timed over an additional epoch. Ctrl-C stops and reports what was
measured so far.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from memory import peak_mib
from torch.nn import functional as F

from twotower.config.run import Config
from twotower.data import Holdout, Interactions, KnownPositives, TrainingBatches
from twotower.evaluation.metrics import hits, ndcg_at
from twotower.objectives.build import build_objective, masks_known_positives
from twotower.ranking import ItemKNN
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run import read_data, split_data
from twotower.towers import TwoTower, build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.optimizer import parameter_groups

SEED, K, UNIFORM, LEARNING_RATE = 0, 10, 1024, 2e-3
SETTINGS = [
    "data.split=leave-last-out",
    "training.batch_size=8192",
    f"objective.sources=[{{in_batch: {{}}}}, {{uniform: {{size: {UNIFORM}}}}}]",
]


@dataclass
class Contender:
    """The times and scores of one contender, one entry per epoch."""

    train_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    ndcg: list[float] = field(default_factory=list)


def ndcg(ranked: np.ndarray, holdout: Holdout) -> float:
    """Compute the mean NDCG@10."""
    found = hits(ranked, holdout.target_offsets, holdout.target_items)
    return float(ndcg_at(found, np.diff(holdout.target_offsets), K).mean())


class Ours:
    """The library's components."""

    def __init__(self, config: Config, train: Interactions, towers: TwoTower, *, seed: int, low: bool = False) -> None:
        self.towers, self.length = towers, config.query_tower.history.length if config.query_tower.history else 0
        self.name, self.low = "bfloat16" if low else "ours", low
        self.objective = build_objective(config, train)
        self.batches = TrainingBatches(train, int(config.training.batch_size), history_length=self.length, seed=seed)
        self.known = KnownPositives(train) if masks_known_positives(config.objective) else None
        model = torch.nn.ModuleList([towers, self.objective])
        self.epochs = 0
        self.optimizer = TableOptimizer(parameter_groups(model, 0.0, lr=LEARNING_RATE), lr=LEARNING_RATE)

    def epoch(self, steps: int) -> None:
        """Train on the given number of batches."""
        self.towers.train()
        self.batches.set_epoch(self.epochs)
        self.epochs += 1
        for number, batch in enumerate(self.batches, 1):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low):
                loss, _, _ = compute_loss(self.towers, self.objective, batch, known_positives=self.known)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            progress(self.name, number, steps)
            if number == steps:
                break

    def rank(self, holdout: Holdout) -> np.ndarray:
        """Rank the holdout, [E, K]."""
        return TowerRanker(self.towers, self.length).rank(holdout, K, exclude_seen=True)


class Plain:
    """The same model in a plain PyTorch loop."""

    def __init__(self, config: Config, train: Interactions, towers: TwoTower) -> None:
        self.towers, self.length = towers, config.query_tower.history.length if config.query_tower.history else 0
        self.batch_size, self.num_items = int(config.training.batch_size), train.num_items
        self.items = torch.from_numpy(np.asarray(train.item_codes).astype(np.int64))
        self.user = torch.from_numpy(np.asarray(train.query_codes()).astype(np.int64))
        self.starts = torch.from_numpy(np.asarray(train.offsets).astype(np.int64))
        self.log_p = (torch.bincount(self.items, minlength=self.num_items).double() / len(self.items)).log()
        self.optimizer = torch.optim.Adam(towers.parameters(), lr=LEARNING_RATE)
        self.back = torch.arange(self.length, 0, -1)

    def history(self, user: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Return the histories [B, L], padded with -1."""
        at = end[:, None] - self.back
        return torch.where(at >= self.starts[user][:, None], self.items[at.clamp(min=0)], -1)

    def epoch(self, steps: int) -> None:
        """Train on the given number of batches."""
        self.towers.train()
        order = torch.randperm(len(self.items))
        for number, rows in enumerate(order.split(self.batch_size)[:steps], 1):  # type: ignore[no-untyped-call]
            positive, user = self.items[rows], self.user[rows]
            candidates = torch.unique(torch.cat([positive, torch.randint(self.num_items, (UNIFORM,))]))
            # Probability that B + U draws include the item: the correction for candidates without duplicates.
            absent = self.batch_size * torch.log1p(-self.log_p.exp()) + UNIFORM * math.log1p(-1.0 / self.num_items)
            log_kappa = torch.log(-torch.expm1(absent)).float()
            query = self.towers.embed_queries(user, self.history(user, rows))
            table = self.towers.embed_items(candidates)
            temperature = self.towers.temperature
            logits = query @ table.T / temperature - log_kappa[candidates]
            logits = logits.masked_fill(candidates == positive[:, None], -torch.inf)
            own = (query * self.towers.embed_items(positive)).sum(1, keepdim=True) / temperature
            target = torch.zeros(len(rows), dtype=torch.int64)
            loss = F.cross_entropy(torch.cat([own, logits], 1), target)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            progress("plain", number, steps)

    @torch.no_grad()
    def rank(self, holdout: Holdout) -> np.ndarray:
        """Rank from the full score matrix, [E, K]."""
        self.towers.eval()
        offsets = torch.from_numpy(holdout.history_offsets)
        items = torch.from_numpy(holdout.history_items.astype(np.int64))
        at = offsets[1:, None] - self.back
        history = torch.where(at >= offsets[:-1, None], items[at.clamp(min=0)], -1)
        queries = self.towers.embed_queries(torch.from_numpy(holdout.queries), history)
        scores = queries @ self.towers.embed_items(torch.arange(self.num_items)).T
        row = torch.repeat_interleave(torch.arange(len(holdout)), offsets.diff())
        scores[row, items] = -torch.inf
        return scores.topk(K, dim=1).indices.numpy()


def progress(name: str, step: int, steps: int) -> None:
    """Print progress on one line of the terminal."""
    if sys.stderr.isatty():
        end = "\n" if step == steps else ""
        sys.stderr.write(f"\r{name}: step {step} of {steps} {end}")


def run(name: str, way: Ours | Plain, taken: Contender, holdout: Holdout, steps: int) -> None:
    """Time an epoch and its evaluation."""
    began, cpu = time.perf_counter(), time.process_time()
    way.epoch(steps)
    trained = time.perf_counter()
    score = ndcg(way.rank(holdout), holdout)
    taken.evaluation_seconds.append(time.perf_counter() - trained)
    taken.train_seconds.append(trained - began)
    taken.processor_seconds.append(time.process_time() - cpu)
    taken.ndcg.append(score)
    print(
        f"{name:<6} epoch {len(taken.ndcg)}: {taken.train_seconds[-1]:7.1f} s, evaluation "
        f"{taken.evaluation_seconds[-1]:6.2f} s, NDCG@{K} {score:.4f}",
        flush=True,
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/ml-1m-loo/sequences.parquet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="of an epoch; default: all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--ways", nargs="+", choices=["ours", "bfloat16", "plain"], default=["ours", "bfloat16", "plain"]
    )
    parser.add_argument("--json", type=Path, default=None, help="runs of other seeds in it are kept")
    arguments = parser.parse_args()
    config = Config.load(None, SETTINGS)
    split = split_data(read_data(arguments.data, config.data), config.data)
    train, test = split.train, split.test
    config = config.resolved(len(train))
    torch.manual_seed(arguments.seed)
    towers = [build_towers(config, num_queries=train.num_queries, num_items=train.num_items) for _ in range(3)]
    for one in towers[1:]:
        one.load_state_dict(towers[0].state_dict())
    ours = Ours(config, train, towers[0], seed=arguments.seed)
    ways: dict[str, Ours | Plain] = {
        "ours": ours,
        "bfloat16": Ours(config, train, towers[1], seed=arguments.seed, low=True),
        "plain": Plain(config, train, towers[2]),
    }
    ways = {name: way for name, way in ways.items() if name in arguments.ways}
    steps = min(arguments.steps or len(ours.batches), len(ours.batches))
    rows = steps * ours.batches.batch_size
    print(f"{len(train):,} rows, {steps} steps of {ours.batches.batch_size:,}; {len(test):,} test queries", flush=True)

    taken = {name: Contender() for name in ways}
    results: dict[str, object] = {"epochs": taken, "rows_of_an_epoch": rows}
    try:
        began = time.perf_counter()
        knn = ItemKNN(train)
        fitted = time.perf_counter()
        score = ndcg(np.asarray(knn.rank(test, K, exclude_seen=True)), test)
        results["item_knn"] = {
            "fit_seconds": round(fitted - began, 3),
            "rank_seconds": round(time.perf_counter() - fitted, 3),
            "ndcg": score,
        }
        print(f"item-kNN: {results['item_knn']}", flush=True)
        for _ in range(arguments.epochs):
            for name, way in ways.items():
                run(name, way, taken[name], test, steps)
        began, cpu = time.perf_counter(), time.process_time()
        loader = TrainingBatches(train, ours.batches.batch_size, history_length=ours.length, seed=SEED + 1)
        for number, _ in enumerate(loader, 1):
            if number == steps:
                break
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        step_cpu = statistics.median(taken["ours"].processor_seconds)
        results["loader"] = {
            "rows_per_second": round(rows / seconds),
            "times_faster_than_the_step": round(statistics.median(taken["ours"].train_seconds) / seconds, 1),
            "processor_share_of_an_epoch": round(cpu_seconds / step_cpu, 3),
        }
        print(f"loader alone: {results['loader']}")
        base = taken["ours"]
        for name, other in taken.items():
            ratio = [
                (p + q) / (o + e)
                for o, e, p, q in zip(
                    base.train_seconds,
                    base.evaluation_seconds,
                    other.train_seconds,
                    other.evaluation_seconds,
                    strict=True,
                )
            ]
            results[f"{name}_over_ours"] = round(statistics.median(ratio), 2)
            print(f"{name} / ours, epoch with evaluation: {results[f'{name}_over_ours']}")
    except KeyboardInterrupt:
        results["interrupted"] = True
        print("interrupted; results so far are saved")
    if arguments.json:
        results["epochs"] = {name: asdict(value) for name, value in taken.items()}
        report = {
            "benchmark": "epoch",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": arguments.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
            },
            "settings": SETTINGS,
            "peak_mib": round(peak_mib(), 1),
            **results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        known[f"seed {arguments.seed}, {', '.join(ways)}"] = report
        arguments.json.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
