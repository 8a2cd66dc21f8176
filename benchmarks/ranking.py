"""Time of exact ranking compared with the matrix product alone, interleaved in one process.

    python benchmarks/ranking.py [--quick] [--json benchmarks/results/ranking.json]

For each block of 2,048 queries it times the float32 product in tiles (`mm(out=)`, 1,024 x 2,048: the fastest here;
scores are discarded), the search as evaluation runs it, the search without its bfloat16 screen, and the exact index of
faiss if installed. Interleaving makes a busy machine slow all alike. Reported are medians over repeats of the sums over
blocks and of their ratios, in wall time and in CPU time, which a busy machine distorts less.
"""

import argparse
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_mib

from twotower.index import ExactIndex

SEED = 0
BLOCK, ROWS, COLUMNS = 2048, 1024, 2048


def product_alone(queries: torch.Tensor, items: torch.Tensor, rows: int, columns: int) -> None:
    """Compute every score in tiles and discard it."""
    tiles: dict[tuple[int, int], torch.Tensor] = {}
    for top in range(0, len(queries), rows):
        for left in range(0, len(items), columns):
            q, x = queries[top : top + rows], items[left : left + columns]
            shape = (len(q), len(x))
            if shape not in tiles:
                tiles[shape] = torch.empty(shape)
            torch.mm(q, x.T, out=tiles[shape])


def timed(call: Callable[[], object]) -> np.ndarray:
    """Measure wall and CPU seconds of one call."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter() - start, time.process_time() - cpu])


def measure(num_queries: int, num_items: int, dim: int, k: int, seen: int, repeats: int) -> dict[str, Any]:
    """Time one size: interleaved repeats of the product alone and of the search."""
    generator = torch.Generator().manual_seed(SEED)
    items = torch.randn(num_items, dim, generator=generator)
    queries = torch.randn(num_queries, dim, generator=generator)
    history = torch.randint(0, num_items, (num_queries * seen,), generator=generator).numpy()
    exclude = (np.arange(num_queries + 1) * seen, history)
    index = ExactIndex(items)
    index.search(queries[:BLOCK], k)
    product_alone(queries[:BLOCK], items, ROWS, COLUMNS)
    ways: dict[str, Callable[[slice, Any], object]] = {
        "product": lambda block, _: product_alone(queries[block], items, ROWS, COLUMNS),
        "search": lambda block, part: index.search(queries[block], k, part),
        "search without screen": lambda block, part: index.search(queries[block], k, part, screened=False),
    }
    if importlib.util.find_spec("faiss"):
        import faiss  # noqa: PLC0415

        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexFlatIP(dim)
        flat.add(items.numpy())
        # faiss does not support exclusions: that many more results would have to be requested and dropped.
        ways["faiss IndexFlatIP, no exclusions"] = lambda block, _: flat.search(queries[block].numpy(), k)
    before = peak_mib()
    blocks = [slice(top, min(top + BLOCK, num_queries)) for top in range(0, num_queries, BLOCK)]
    taken = {name: np.zeros((repeats, 2)) for name in ways}
    for repeat in range(repeats):
        for block in blocks:
            part = exclude[0][: block.stop - block.start + 1], history[block.start * seen : block.stop * seen]
            for name, way in ways.items():
                taken[name][repeat] += timed(partial(way, block, part))
    result: dict[str, Any] = {
        "queries": num_queries,
        "items": num_items,
        "dim": dim,
        "k": k,
        "excluded_per_query": seen,
        "repeats": repeats,
        "peak_growth_mib": round(peak_mib() - before, 1),
        "score_matrix_mib": round(num_queries * num_items * 4 / 2**20, 1),
    }
    print(
        f"{num_queries:>6,} queries x {num_items:>9,} items, D = {dim}, top {k}: memory "
        f"+{result['peak_growth_mib']:.0f} MiB (all scores would be {result['score_matrix_mib']:,.0f} MiB)",
        flush=True,
    )
    for name, values in taken.items():
        ratio, cpu_ratio = np.median(values / taken["product"], axis=0)
        result[name] = {
            "seconds": round(float(np.median(values[:, 0])), 4),
            "processor_seconds": round(float(np.median(values[:, 1])), 4),
            "ratio": round(float(ratio), 3),
            "processor_ratio": round(float(cpu_ratio), 3),
        }
        print(f"    {name:<34} {result[name]}", flush=True)
    return result


def main() -> None:
    """Measure all sizes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the queries")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; use 1 on a busy machine")
    parser.add_argument("--repeats", type=int, default=7, help="of the large search")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    large = 1_000 if arguments.quick else 10_000
    results = [
        measure(6_040, 3_416, 64, 20, 160, repeats=7),
        measure(large, 1_000_000, 64, 100, 50, repeats=arguments.repeats),
    ]
    if arguments.json:
        report = {
            "benchmark": "ranking",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": SEED,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
            },
            "tile": {"rows": ROWS, "columns": COLUMNS},
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
