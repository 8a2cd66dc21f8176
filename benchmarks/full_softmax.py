"""Time and memory of the full softmax, compared with its matrix products alone, interleaved in one process.

    python benchmarks/full_softmax.py [--items 1000000] [--rows 1024] [--rounds 7] [--naive] [--memory] [--json FILE]

Computes the value and the gradients of queries and items, float32, D = 64. Each round times the three products of a
preallocated matrix [B, N]; the same products tile by tile; `tiled_full_softmax`; torch's `linear_cross_entropy`, if
available; and with --naive full logits and cross_entropy, which need 12 GiB at 1,000,000 items. `--memory` instead
measures the growth of the peak resident size beyond tables and gradients.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from memory import forget_peak, peak_mib, resident_mib
from torch.nn import functional as F
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

from twotower.losses import tiled_full_softmax
from twotower.losses.tiled.blocks import TILE_MEMORY

SEED, D, TEMPERATURE = 0, 64, 0.1


class Problem:
    """Make unit vectors, targets, and buffers for gradients."""

    def __init__(self, rows: int, number: int) -> None:
        rng = torch.Generator().manual_seed(SEED)
        self.query = F.normalize(torch.randn(rows, D, generator=rng), dim=1).requires_grad_()
        self.items = F.normalize(torch.randn(number, D, generator=rng), dim=1).requires_grad_()
        self.target = torch.randint(number, (rows,), generator=rng)
        self.by_query, self.by_items = torch.zeros(rows, D), torch.zeros(number, D)
        self.logits = torch.empty(0)

    def products(self) -> None:
        """Compute the matrix products alone, each in one call."""
        query, items = self.query.detach(), self.items.detach()
        if not len(self.logits):
            self.logits = torch.empty(len(query), len(items))
        torch.mm(query, items.T, out=self.logits)
        torch.mm(self.logits, items, out=self.by_query)
        torch.mm(self.logits.T, query, out=self.by_items)

    def tiled_products(self) -> None:
        """Compute the matrix products alone, tile by tile."""
        query, items = self.query.detach(), self.items.detach()
        size = max(TILE_MEMORY // (4 * len(items)), 1)
        buffer = torch.empty(size, len(items))
        for start in range(0, len(query), size):
            part = query[start : start + size]
            torch.mm(part, items.T, out=buffer[: len(part)])
            torch.mm(buffer[: len(part)], items, out=self.by_query[start : start + size])
            self.by_items.addmm_(buffer[: len(part)].T, part, beta=0 if start == 0 else 1)

    def run(self, loss: torch.Tensor) -> None:
        """Run backward and discard the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.query.grad = self.items.grad = None

    def tiled(self) -> None:
        """Compute the library's loss."""
        self.run(tiled_full_softmax(self.query, self.target, self.items, temperature=TEMPERATURE))

    def naive(self) -> None:
        """Compute the loss from all logits at once."""
        self.run(F.cross_entropy(self.query / TEMPERATURE @ self.items.T, self.target))

    def torchs(self) -> None:
        """Compute torch's own chunked loss."""
        options = LinearCrossEntropyOptions(batch_chunk_size=64)
        loss = F.linear_cross_entropy(self.query / TEMPERATURE, self.items, self.target, options=options)
        self.run(loss)


def extra_memory(problem: Problem) -> float:
    """Measure MiB beyond tables and gradients: the gradient of the items counts as part of the problem."""
    Problem(64, 2000).tiled()  # load the pages of the libraries first
    forget_peak()
    before = resident_mib()
    problem.tiled()
    return peak_mib() - before - problem.items.numel() * 4 / 2**20


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--naive", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time, for a busy machine, with --threads 1"
    )
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    problem = Problem(settings.rows, settings.items)
    result: dict[str, Any]
    if settings.memory:
        result = {"extra_mib": extra_memory(problem)}
        print(f"tiled: {result['extra_mib']:.1f} MiB beyond tables and gradients")
    else:
        calls: dict[str, Callable[[], None]] = {
            "products": problem.products,
            "tiled": problem.tiled,  # next to its reference: the speed of a shared machine changes within seconds
            "products, tiled": problem.tiled_products,
        }
        calls["linear_cross_entropy"] = problem.torchs
        if settings.naive:
            calls["naive"] = problem.naive
        clock = time.perf_counter if settings.clock == "wall" else time.process_time
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(settings.rounds + 1):
            for name, call in calls.items():
                start = clock()
                call()
                if turn:
                    seconds[name].append(clock() - start)
        base = seconds["products"]
        result = {
            name: {
                "median_s": statistics.median(times),
                "of_products": statistics.median(t / p for t, p in zip(times, base, strict=True)),
            }
            for name, times in seconds.items()
        }
        for name, row in result.items():
            print(f"{name:24} {row['median_s']:8.3f} s   {row['of_products']:6.2f} x products")
    if settings.json is not None:
        known = json.loads(settings.json.read_text()) if settings.json.exists() else {}
        known[f"{'memory' if settings.memory else 'time'}, B = {settings.rows}, N = {settings.items}"] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "clock": settings.clock,
            "seed": SEED,
            "rounds": settings.rounds,
            "result": result,
        }
        settings.json.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
