"""Queries a second and latency of every kind of index beside faiss's flat index, measured side by side in one run.

    python benchmarks/serving_index.py [--items 1000000] [--kinds exact,hnsw,ivfpq] [--json FILE]
    python benchmarks/serving_index.py --kinds pgvector --items 100000 --url postgresql://...

Two catalogs of unit vectors. `clustered`: items scattered around 1,000 centres, queries too, as the towers of a trained
model lie. `random`: independent directions, the worst case of every approximate index, for no item is much nearer
than the next. Rounds are interleaved: in every round each kind answers the same queries, one by one and in batches, so
that a busy machine slows all of them. Reported: queries a second (median over rounds), p50 and p99 of single queries,
the ratio to IndexFlatIP of the same rounds, recall of the top K, seconds of the build, and growth of resident memory.
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.index import ExactCatalog, Index, build_index
from twotower.index.build import exact_answers, recall_of

SEED = 0
#: Columns of a tile of the product.
COLUMNS = 8192


class Flat:
    """faiss's exact index, called as plainly as it can be."""

    def __init__(self, items: Tensor) -> None:
        self._flat = faiss.IndexFlatIP(items.shape[1])
        self._flat.add(items.numpy())

    def search(self, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and items."""
        scores, found = self._flat.search(queries.numpy(), k)
        return scores, found


class Product:
    """The matrix product of a batch alone, in tiles that are written over; nothing is ranked."""

    def __init__(self, items: Tensor) -> None:
        self._items = items
        self._tiles: dict[tuple[int, int], Tensor] = {}

    def search(self, queries: Tensor, _: int) -> None:
        """Every score, and none kept."""
        for left in range(0, len(self._items), COLUMNS):
            tile = self._items[left : left + COLUMNS]
            shape = (len(queries), len(tile))
            if shape not in self._tiles:
                self._tiles[shape] = torch.empty(shape)
            torch.mm(queries, tile.T, out=self._tiles[shape])


def vectors(kind: str, count: int, dim: int, seed: int) -> Tensor:
    """Unit vectors [count, D]: items and queries of one kind share their centres."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, dim, generator=generator)
    if kind == "clustered":
        centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(SEED))
        drawn = centres[torch.randint(0, 1000, (count,), generator=generator)] + 0.7 * drawn
    return F.normalize(drawn, dim=1)


def resident_mib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(catalog: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All kinds on one catalog."""
    items = vectors(catalog, arguments.items, arguments.dim, SEED + 1)
    batches = arguments.rounds * arguments.batch
    queries = vectors(catalog, max(batches, 1), arguments.dim, SEED + 2)
    sample = queries[:200]
    best = exact_answers(items, sample, arguments.k)
    searched: dict[str, Any] = {"product": Product(items)}
    told: dict[str, dict[str, Any]] = {"product": {}}
    for kind in ["flat", *arguments.kinds.split(",")]:
        before, start = resident_mib(), time.perf_counter()
        index: Any
        if kind == "flat":
            index, built = Flat(items), dict[str, Any]()
        elif kind == "exact":
            index, built = ExactCatalog(items), dict[str, Any]()
            index.search(sample[:1], arguments.k)  # lays the items out
        else:
            settings = {"url": arguments.url, "table": "twotower_benchmark"} if kind == "pgvector" else {}
            index, report = build_index(
                kind, items, {"sample": sample}, k=arguments.k, min_recall=arguments.min_recall, settings=settings
            )
            built = {
                "settings": {n: v for n, v in report.settings.items() if n != "url"},
                "engine_mib": report.bytes >> 20,
            }
            start = time.perf_counter() - report.build_seconds
        told[kind] = {
            "build_seconds": round(time.perf_counter() - start, 2),
            "resident_growth_mib": round(resident_mib() - before),
            "recall": 1.0 if kind == "flat" else round(_recall(index, sample, best), 4),
            **built,
        }
        searched[kind] = index
        print(f"{catalog}: {kind} built, {told[kind]}", flush=True)
    single: dict[str, list[float]] = {name: [] for name in searched}
    batch: dict[str, list[float]] = {name: [] for name in searched}
    for number in range(-1, arguments.rounds):  # round -1 warms up
        rows = queries[max(number, 0) * arguments.batch : (max(number, 0) + 1) * arguments.batch]
        for name, index in searched.items():
            start = time.perf_counter()
            index.search(rows, arguments.k)
            took = time.perf_counter() - start
            ones = []
            for row in range(arguments.singles):
                start = time.perf_counter()
                index.search(rows[row : row + 1], arguments.k)
                ones.append(time.perf_counter() - start)
            if number >= 0:
                batch[name].append(took)
                single[name] += ones
    for name in searched:
        told[name] |= {
            "batch_queries_per_second": round(arguments.batch / statistics.median(batch[name]), 1),
            "batch_seconds_p50_p99": _quantiles(batch[name]),
            "batch_time_over_flat": _ratio(batch[name], batch["flat"]),
            "batch_time_over_product": _ratio(batch[name], batch["product"]),
            "single_queries_per_second": round(1 / statistics.median(single[name]), 1),
            "single_seconds_p50_p99": _quantiles(single[name]),
            "single_time_over_flat": _ratio(single[name], single["flat"]),
        }
        print(f"{catalog}: {name}: {told[name]}", flush=True)
    return told


def _recall(index: Index, sample: Tensor, best: Tensor) -> float:
    return recall_of(index, sample, best)


def _quantiles(seconds: list[float]) -> list[float]:
    return [round(float(np.quantile(seconds, q)), 6) for q in (0.5, 0.99)]


def _ratio(one: list[float], other: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--singles", type=int, default=20, help="single queries in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", default="exact,hnsw,ivfpq")
    parser.add_argument("--catalogs", default="clustered,random")
    parser.add_argument("--min-recall", type=float, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--url", default="", help="database of pgvector")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        faiss.omp_set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    results = {catalog: measure(catalog, arguments) for catalog in arguments.catalogs.split(",")}
    if arguments.json:
        report = {
            "benchmark": "serving_index",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": SEED,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "faiss": faiss.__version__,
                "numpy": np.__version__,
                "polars": polars.__version__,
            },
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "load_at_start_and_end": [load, os.getloadavg()[0]],
            },
            "asked": {n: v for n, v in vars(arguments).items() if n not in ("json", "url")},
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
