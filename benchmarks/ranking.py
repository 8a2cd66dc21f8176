"""How long exact ranking takes beside the matrix product alone, measured side by side in one run.

    python benchmarks/ranking.py [--quick] [--json benchmarks/results/ranking.json]

Block by block of 1,024 queries, the product in the same tiles (`mm(out=)`, nothing kept) is timed and then the search,
so that a busy machine slows both. Reported: medians over repeats of the sums over blocks, and of their ratios.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twotower.index import ExactIndex

SEED = 0
ROWS, COLUMNS = 1024, 8192


def product_alone(queries: torch.Tensor, items: torch.Tensor, rows: int, columns: int) -> None:
    """Every score, computed in tiles and thrown away."""
    tiles: dict[tuple[int, int], torch.Tensor] = {}
    for top in range(0, len(queries), rows):
        for left in range(0, len(items), columns):
            q, x = queries[top : top + rows], items[left : left + columns]
            shape = (len(q), len(x))
            if shape not in tiles:
                tiles[shape] = torch.empty(shape)
            torch.mm(q, x.T, out=tiles[shape])


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_mib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_queries: int, num_items: int, dim: int, k: int, seen: int, repeats: int) -> dict[str, Any]:
    """Time one size: interleaved repeats of the product alone and of the search."""
    generator = torch.Generator().manual_seed(SEED)
    items = torch.randn(num_items, dim, generator=generator)
    queries = torch.randn(num_queries, dim, generator=generator)
    history = torch.randint(0, num_items, (num_queries * seen,), generator=generator).numpy()
    exclude = (np.arange(num_queries + 1) * seen, history)
    index = ExactIndex(items)
    index.search(queries[:ROWS], k)
    product_alone(queries[:ROWS], items, ROWS, COLUMNS)
    before = peak_mib()
    product, search = [], []
    blocks = [slice(top, min(top + ROWS, num_queries)) for top in range(0, num_queries, ROWS)]
    for _ in range(repeats):
        product.append(0.0)
        search.append(0.0)
        for block in blocks:
            part = exclude[0][: block.stop - block.start + 1], history[block.start * seen : block.stop * seen]
            product[-1] += timed(partial(product_alone, queries[block], items, ROWS, COLUMNS))
            search[-1] += timed(partial(index.search, queries[block], k, part, row_block=ROWS, column_tile=COLUMNS))
    result = {
        "queries": num_queries,
        "items": num_items,
        "dim": dim,
        "k": k,
        "excluded_per_query": seen,
        "repeats": repeats,
        "product_seconds": round(statistics.median(product), 4),
        "search_seconds": round(statistics.median(search), 4),
        "ratio": round(statistics.median(s / p for s, p in zip(search, product, strict=True)), 3),
        "peak_growth_mib": round(peak_mib() - before, 1),
        "score_matrix_mib": round(num_queries * num_items * 4 / 2**20, 1),
    }
    print(
        f"{num_queries:>6,} queries x {num_items:>9,} items, D = {dim}, top {k}: "
        f"search {result['search_seconds']:.3f} s, product {result['product_seconds']:.3f} s, "
        f"ratio {result['ratio']:.2f}, memory +{result['peak_growth_mib']:.0f} MiB "
        f"(all scores would be {result['score_matrix_mib']:,.0f} MiB)",
        flush=True,
    )
    return result


def main() -> None:
    """Measure the sizes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the queries")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; one is steadier on a busy machine")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    large = 1_000 if arguments.quick else 10_000
    results = [
        measure(6_040, 3_416, 64, 20, 160, repeats=7),
        measure(large, 1_000_000, 64, 100, 50, repeats=1 if not arguments.quick else 3),
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
