"""Time to draw and look up negatives: 10^6 draws from 10^7 items by frequency, compared with other methods.

    python benchmarks/sampling.py [--items 10000000] [--draws 1000000] [--json benchmarks/results/sampling.json]

All methods draw in turn in every round, so that a busy machine slows all alike. Reported are the setup time and medians
over rounds of wall time and CPU time. The lower bound for comparison is one random 8-byte read from a table of N per
draw.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_mib

from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Weighted

SEED = 0


class TextbookAlias:
    """Walker's alias method in its usual form: two tables, two random numbers."""

    def __init__(self, table: torch.Tensor) -> None:
        self.threshold = (table >> 32).float() / (1 << 31)
        self.alias = table & 0xFFFFFFFF

    def __call__(self, size: int) -> torch.Tensor:
        """Draw the given number of items."""
        slot = torch.randint(len(self.alias), (size,))
        return torch.where(torch.rand(size) < self.threshold[slot], slot, self.alias[slot])


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Measure median wall and CPU milliseconds of each call, in turn."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            call()
            if number:  # the first round warms up
                wall[name].append(1e3 * (time.perf_counter() - began))
                cpu[name].append(1e3 * (time.process_time() - cpu_began))
    return {
        name: {"ms": round(statistics.median(wall[name]), 2), "cpu_ms": round(statistics.median(cpu[name]), 2)}
        for name in calls
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--draws", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-slow", action="store_true", help="without multinomial and choice")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    # Counts of a Zipf(1) catalog, in random order of the codes.
    counts = torch.from_numpy(rng.permutation(np.ceil(1e7 / np.arange(1, arguments.items + 1))))
    began = time.perf_counter()
    proposal = Weighted(counts)
    setup = time.perf_counter() - began
    print(f"{arguments.items:,} items, {arguments.draws:,} draws; set-up of the table {setup:.1f} s", flush=True)

    size = (arguments.draws,)
    cumulated = (counts.double() / counts.double().sum()).cumsum(0)
    textbook = TextbookAlias(proposal.table.packed)
    anywhere = torch.randint(arguments.items, size)
    drawn = proposal.sample(size)
    calls: dict[str, Callable[[], object]] = {
        "Weighted.sample": lambda: proposal.sample(size),
        "alias table, two numbers and two tables": lambda: textbook(arguments.draws),
        "searchsorted in the cumulated weights": lambda: torch.searchsorted(cumulated, torch.rand(size).double()),
        "one random read of 8 bytes": lambda: proposal.table.packed.index_select(0, anywhere),
        "log_prob of the draws": lambda: proposal.log_prob(drawn),
    }
    results = times(calls, arguments.rounds)
    if not arguments.skip_slow:
        share = (counts / counts.sum()).numpy()
        weights = counts.float()
        slow: dict[str, Callable[[], object]] = {
            "numpy.random.Generator.choice(p=)": lambda: rng.choice(arguments.items, arguments.draws, p=share)
        }
        if arguments.items < 2**24:  # the limit of torch.multinomial
            slow["torch.multinomial"] = lambda: torch.multinomial(weights, arguments.draws, replacement=True)
        results |= times(slow, 1)

    # All steps of a batch with its draws: expected counts, accidental hits, merging of copies.
    frequency = CountedFrequency(counts.long())
    pool = Pool(InBatch(frequency), Sampled(proposal, size=8192))
    positives = proposal.sample((8192,))
    candidates = pool.draw(positives)
    results |= times(
        {
            "a batch: draw of the pool, B = 8192 in-batch + 8192": lambda: pool.draw(positives),
            "a batch: copies merged": candidates.collapse,
        },
        arguments.rounds,
    )
    for name, value in results.items():
        print(f"  {name:<55} {value['ms']:>9.1f} ms  (processor {value['cpu_ms']:.1f} ms)")
    if arguments.json:
        report: dict[str, Any] = {
            "benchmark": "sampling",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": SEED,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
            },
            "items": arguments.items,
            "draws": arguments.draws,
            "rounds": arguments.rounds,
            "setup_seconds": round(setup, 2),
            "peak_mib": round(peak_mib(), 1),
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
