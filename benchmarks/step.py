"""Time of one in-batch training step, compared with its matrix products and plain PyTorch, interleaved in one process.

    python benchmarks/step.py [--rows 8192] [--rounds 7] [--compile] [--memory] [--json benchmarks/results/step.json]

A step has 1,000,000 users and 1,000,000 items, drawn by Zipf's law. Both are looked up in tables and normalized. The
candidates are the batch's items, corrected by their expected count, with the row's own item and 20 known positives
masked; then backward and row-wise Adagrad. Measured are `compute_loss` and `TableOptimizer`, as in training. Each round
also times:

- products: the three matrix products of the loss, [B, D] x [D, B], [B, B] x [B, D] twice, into preallocated memory;
- plain: the same as a competent user would write it, nn.Embedding(sparse=True), one matrix of logits, log q subtracted,
  copies of the row's own item masked (not the known ones: less work than ours), cross_entropy, torch.optim.Adagrad;
- plain, dense Adam: the same with dense gradients and torch.optim.Adam (`--dense`; a round takes seconds);
- compiled: plain with its loss under torch.compile (`--compile`; with `--tuned` the allocator keeps its memory).

`--memory` instead measures the memory of the loss beyond its inputs: growth of the peak resident size.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from memory import forget_peak, peak_mib, resident_mib
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.data import Batch
from twotower.negatives import CountedFrequency, InBatch, Pool
from twotower.objectives import Embedded, SampledSoftmax
from twotower.training import TableOptimizer, compute_loss

SEED, D, N, KNOWN, TEMPERATURE = 0, 64, 1_000_000, 20, 0.1
#: Allocator settings that return nothing to the system: no page faults after the first step.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


#: Wall time, or the CPU time of all threads of this process.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Towers(nn.Module):
    """Two tables of unit vectors."""

    def __init__(self, *, sparse: bool = True) -> None:
        super().__init__()
        self.users, self.items = (nn.Embedding(N, D, sparse=sparse) for _ in range(2))
        self.temperature = torch.tensor(TEMPERATURE)
        self.repeats_queries = True

    def embed_queries(self, queries: Tensor, history: Tensor | None = None) -> Tensor:
        """Embed queries, [B] -> [B, D]."""
        del history
        return F.normalize(self.users(queries), dim=-1)

    def embed_items(self, items: Tensor) -> Tensor:
        """Embed items, [M] -> [M, D]."""
        return F.normalize(self.items(items), dim=-1)


class Known:
    """The known positives: some items for each user, drawn by popularity."""

    def __init__(self, probability: Tensor, generator: torch.Generator) -> None:
        self.items = torch.multinomial(probability, 50_000 * KNOWN, replacement=True, generator=generator)
        self.items = self.items.view(50_000, KNOWN)

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the known positives as (row, item) pairs."""
        row = torch.arange(len(queries))[:, None].expand(-1, KNOWN)
        return row.reshape(-1), self.items[queries % 50_000].reshape(-1)


def zipf() -> Tensor:
    """Compute Zipf probabilities of N codes."""
    weight = 1.0 / torch.arange(1, N + 1, dtype=torch.float64)
    return weight / weight.sum()


class Ours:
    """The training step of the library."""

    def __init__(self, towers: Towers, known: Known, *, unique: bool, low: bool = False) -> None:
        self.towers, self.known, self.low = towers, known, low
        self.objective = SampledSoftmax(Pool(InBatch(CountedFrequency(zipf())), unique=unique))
        self.optimizer = TableOptimizer([{"params": list(towers.parameters())}], lr=1e-3, rule="rowwise-adagrad")

    def __call__(self, users: Tensor, items: Tensor) -> None:
        """Run one step."""
        batch = Batch(rows=users, queries=users, items=items, history=users[:, None][:, :0])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low):
            loss, _, _ = compute_loss(self.towers, self.objective, batch, known_positives=self.known)  # type: ignore[arg-type]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def plain_loss(query: Tensor, item: Tensor, items: Tensor, log_count: Tensor) -> Tensor:
    """Compute the corrected softmax loss over the batch, with copies of the row's own item masked."""
    logits = query @ item.T / TEMPERATURE
    own = torch.arange(len(items), device=items.device)
    corrected = logits - log_count[None, :]
    same = items[:, None] == items[None, :]
    corrected = corrected.masked_fill(same, float("-inf"))
    corrected = torch.where(own[:, None] == own[None, :], logits, corrected)
    return F.cross_entropy(corrected, own)


class Plain:
    """The step in plain PyTorch."""

    def __init__(self, towers: Towers, loss: Callable[..., Tensor] = plain_loss, *, dense: bool = False) -> None:
        self.towers, self.loss = towers, loss
        make = torch.optim.Adam if dense else torch.optim.Adagrad
        self.optimizer = make(towers.parameters(), lr=1e-3)
        self.log_p = zipf().log().float()

    def __call__(self, users: Tensor, items: Tensor) -> None:
        """Run one step."""
        log_count = self.log_p[items] + torch.tensor(len(items) - 1.0).log()
        loss = self.loss(self.towers.embed_queries(users), self.towers.embed_items(items), items, log_count)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Products:
    """The matrix products of the loss alone, into preallocated memory."""

    def __init__(self, rows: int) -> None:
        self.query, self.item = (F.normalize(torch.randn(rows, D), dim=1) for _ in range(2))
        self.logits, self.by_query, self.by_item = torch.empty(rows, rows), torch.empty(rows, D), torch.empty(rows, D)

    def __call__(self, users: Tensor, items: Tensor) -> None:
        """Run the products of one step."""
        del users, items
        torch.mm(self.query, self.item.T, out=self.logits)
        torch.mm(self.logits, self.item, out=self.by_query)
        torch.mm(self.logits.T, self.query, out=self.by_item)


def rounds(
    steps: dict[str, Callable[[Tensor, Tensor], None]], rows: int, count: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time every step in every round. All steps of a round use the same batch; two rounds are warm-up."""
    rng = torch.Generator().manual_seed(SEED)
    probability = zipf()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 2):
        users, items = (torch.multinomial(probability, rows, replacement=True, generator=rng) for _ in range(2))
        for name, step in steps.items():
            start = clock()
            step(users, items)
            if turn >= 2:
                seconds[name].append(clock() - start)
    return seconds


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Time all steps interleaved; return medians of the times and of the ratios within a round."""
    torch.manual_seed(SEED)
    towers, known = Towers(), Known(zipf(), torch.Generator().manual_seed(SEED))
    steps: dict[str, Callable[[Tensor, Tensor], None]] = {
        "products": Products(settings.rows),
        "kept": Ours(towers, known, unique=False),
        "unique": Ours(towers, known, unique=True),
        "kept, bfloat16 products": Ours(towers, known, unique=False, low=True),
    }
    if not settings.compile:
        steps["plain"] = Plain(towers)
        if settings.dense:
            steps["plain, dense Adam"] = Plain(Towers(sparse=False), dense=True)
    else:
        steps["compiled"] = Plain(towers, torch.compile(plain_loss))
    seconds = rounds(steps, settings.rows, settings.rounds, CLOCKS[settings.clock])
    base = seconds["products"]
    return {
        name: {
            "median_ms": 1e3 * statistics.median(times),
            "of_products": statistics.median(t / p for t, p in zip(times, base, strict=True)),
            "times_kept": statistics.median(t / o for t, o in zip(times, seconds["kept"], strict=True)),
            "times_unique": statistics.median(t / o for t, o in zip(times, seconds["unique"], strict=True)),
        }
        for name, times in seconds.items()
    }


def loss_memory(rows: int, *, unique: bool, repeated: bool) -> float:
    """Measure the growth of the peak resident size in MiB while the loss and its gradients are computed.

    Queries are distinct, or repeated by Zipf's law.
    """
    rng = torch.Generator().manual_seed(SEED)
    items = torch.multinomial(zipf(), rows, replacement=True, generator=rng)
    objective = SampledSoftmax(Pool(InBatch(CountedFrequency(zipf())), unique=unique))
    known = Known(zipf(), rng)
    users = torch.multinomial(zipf(), rows, replacement=True, generator=rng) if repeated else torch.arange(rows)
    _, user = torch.unique(users, return_inverse=True)
    query = F.normalize(torch.randn(int(user.max()) + 1, D, generator=rng), dim=1)[user].requires_grad_()
    torch.mm(query.detach()[:64], query.detach()[:64].T)
    drawn = objective.draw(items, known_positives=known.pairs(users))
    table = F.normalize(torch.randn(rows, D, generator=rng), dim=1)
    positive, candidates = table.clone().requires_grad_(), table[: len(drawn.items)].clone().requires_grad_()
    embedded = Embedded(query, positive, candidates, repeated_queries=True)
    forget_peak()
    before = resident_mib()
    objective.mean(embedded, drawn, temperature=TEMPERATURE).backward()  # type: ignore[no-untyped-call]
    return peak_mib() - before


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--repeated", action="store_true", help="with --memory: queries by Zipf's law")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time, for a busy machine, with --threads 1"
    )
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.tuned and os.environ.get("MALLOC_MMAP_THRESHOLD_") != TUNED["MALLOC_MMAP_THRESHOLD_"]:
        sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **TUNED}, check=False).returncode)
    if settings.memory:
        result: dict[str, Any] = {"kept": loss_memory(settings.rows, unique=False, repeated=settings.repeated)}
        print(f"{result['kept']:.1f} MiB beyond its inputs, B = {settings.rows}")
    else:
        result = measure(settings)
        for name, row in result.items():
            print(
                f"{name:28} {row['median_ms']:8.1f} ms  {row['of_products']:6.2f} x products  "
                f"{row['times_kept']:6.2f} x kept  {row['times_unique']:6.2f} x unique"
            )
    if settings.json is not None:
        mode = (
            "memory" + ", repeated queries" * settings.repeated
            if settings.memory
            else "compiled"
            if settings.compile
            else "default"
        )
        mode += ", tuned allocator" if settings.tuned else ""
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "clock": settings.clock,
            "seed": SEED,
            "rounds": settings.rounds,
            "result": result,
        }
        known = json.loads(settings.json.read_text()) if settings.json.exists() else {}
        known[f"{mode}, B = {settings.rows}, {settings.threads} threads, {settings.clock} clock"] = about
        settings.json.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
