"""A catalog of 10^8 synthetic items: embedded, indexed and asked part by part, in bounded memory.

    python benchmarks/hundred_million.py FOLDER [--items 100000000] [--json FILE]
    torchrun --nproc_per_node 2 benchmarks/hundred_million.py FOLDER

A small model (D = 16) is trained on synthetic purchases of items with two features: a category, and a vector of 8
numbers. Then:

- `embed`: the item tower embeds N new items from their features, a part of 2^20 items at a time, into one file in
  bfloat16. A part that is complete is not embedded again.
- `index`: int8 codes of the items, as `twotower index --kind int8` writes them: a file for each part.
- `ask`: known queries with their histories are answered from the mapped files, for the top 100.
- `exact`: the same queries by exact search, a block of items at a time, for the recall.

Several ranks share the parts of `embed` and `index` and the items of `exact`. Times are of rank 0 and include writing.
Memory is that of rank 0: `anonymous` is private memory, and `resident` also counts the mapped pages that happen to be
in memory, which the system takes back if it needs them. FOLDER needs 56 bytes for each item.
"""

import argparse
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file

import twotower as tt
from twotower.distributed.launch import Coordinator, Launch, joined_processes
from twotower.index.approximate.build import exact_answers, recall_of
from twotower.index.approximate.code_store import Int8Store
from twotower.index.approximate.index import ApproximateIndex
from twotower.index.catalog import Vectors
from twotower.serving.model_folder import library_versions
from twotower.serving.queries import stored_histories
from twotower.training.machine_rates import measure_rates
from twotower.training.scale_plan import Workload, plan_scale

D, CATEGORIES, NUMBERS = 16, 400, 8
PART, BLOCK = 1 << 20, 1 << 17
EMBEDDINGS = "items.safetensors"
SETTINGS = [
    f"item_tower={{dimension: {D}, hidden: [32], features: [{{column: category, kind: categorical}}, "
    "{column: numbers, kind: dense, normalise: false}]}",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 256}}]",
    "training={max_epochs: 4, batch_size: 512, accelerator: cpu, question: next, recent_prior: false}",
]


def features(count: int, seed: int) -> pl.DataFrame:
    """Draw the features of some items."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((count, NUMBERS), dtype=np.float32)
    return pl.DataFrame(
        {"category": rng.integers(CATEGORIES, size=count), "numbers": pl.Series(numbers, dtype=pl.Array(pl.Float32, 8))}
    )


def train(folder: Path) -> None:
    """Train the model on purchases of 4,000 items: a query likes some categories and a direction of the numbers."""
    rng, items, queries = np.random.default_rng(0), 4000, 3000
    table = features(items, seed=1).with_columns(pl.arange(items).alias("item_id"))
    taste = rng.standard_normal((queries, NUMBERS))
    liked = rng.random((queries, CATEGORIES)) < 0.1
    score = taste @ table["numbers"].to_numpy().T + 3.0 * liked[:, table["category"].to_numpy()]
    bought = np.argsort(-(score + rng.gumbel(size=score.shape)), axis=1)[:, :20]
    rows = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(queries), 20),
            "item_id": bought.ravel(),
            "timestamp": np.tile(np.arange(20), queries) + 1_700_000_000,
        }
    )
    table = table.with_columns(pl.col("numbers").cast(pl.List(pl.Float32)))
    split = tt.splits.leave_last_out(tt.Interactions.from_frame(rows, items=table))
    tt.fit(split, tt.Config.load(overrides=SETTINGS), progress=False).save(folder)


def embed(model: Path, folder: Path, count: int, team: Coordinator) -> None:
    """Write the embeddings of N items into one safetensors file, the missing parts only."""
    path, done = folder / EMBEDDINGS, folder / "embedded"
    header = json.dumps(
        {"embeddings": {"dtype": "BF16", "shape": [count, D], "data_offsets": [0, 2 * D * count]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    if team.ranks.is_first and not path.exists():
        done.mkdir(parents=True)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 2 * D * count)
    team.broadcast_text("file", "made")
    embedder = tt.serving.Embedder(model, "items")
    parts = range(0, count, PART)
    for start in parts[team.ranks.part(len(parts))]:
        if (done / str(start)).exists():
            continue
        with path.open("r+b") as file:
            file.seek(8 + len(header) + 2 * D * start)
            for first in range(start, min(start + PART, count), BLOCK):
                rows = min(BLOCK, start + PART - first, count - first)
                frame = embedder(features(rows, seed=first + 2))
                vectors = torch.from_numpy(frame["embedding"].to_numpy().copy()).to(torch.bfloat16)
                file.write(vectors.view(torch.uint8).numpy().data)
        (done / str(start)).touch()
    team.all_at_once(lambda: None, "embedded")


def index(vectors: Vectors, folder: Path, team: Coordinator) -> dict[str, Any]:
    """Write the codes; return the settings to load them with."""
    folder.mkdir(exist_ok=True)
    shape = vectors.num_items, vectors.dim
    return team.all_at_once(
        lambda: Int8Store.write(folder, lambda rows: vectors.rows(rows).numpy(), shape, team.ranks), "codes"
    )


def questions(model: Path, count: int) -> torch.Tensor:
    """Embed known queries with their histories."""
    retriever = tt.Retriever.load(model, exact=True)
    codes = np.sort(np.random.default_rng(5).choice(len(retriever.artifact.queries), count, replace=False))
    return retriever.embed(codes, stored_histories(retriever.artifact, codes))


class Watch:
    """Time and memory of the steps, kept in a file, so that a resumed run has those of the first part.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a block."""
        peaks, ended = {"RssAnon": 0, "VmRSS": 0}, threading.Event()

        def look() -> None:
            while True:
                for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]))
                if ended.wait(0.05):
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        began, used = time.monotonic(), time.process_time()
        yield
        seconds, cpu = time.monotonic() - began, time.process_time() - used
        ended.set()
        thread.join()
        self.steps[name] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "peak_anonymous_mib": round(peaks["RssAnon"] / 1024),
            "peak_resident_mib": round(peaks["VmRSS"] / 1024),
        }
        self.path.write_text(json.dumps(self.steps), encoding="utf-8")
        print(name, self.steps[name], flush=True)


def plan(items: int) -> dict[str, Any]:
    """Plan a training run on a billion items, as `twotower plan` does, with the rates of this machine."""
    workload = Workload(
        items=items, dimension=D, batch=8192, ranks=64, optimizer="rowwise-adagrad", precision="bfloat16",
        layout="row-wise",
    )  # fmt: skip
    found = plan_scale(workload, measure_rates(workload, link=12e9, latency=20e-6), 80 * 2**30).to_dict()
    return {name: value for name, value in found.items() if name != "rates"}


def disk(folder: Path) -> dict[str, int]:
    """Return the bytes of the embeddings and of the codes."""
    codes = sum(path.stat().st_size for path in (folder / "codes").iterdir())
    return {"embeddings": (folder / EMBEDDINGS).stat().st_size, "codes": codes}


def main() -> None:
    """Embed, index, ask and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=10**8)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--efforts", default="1,2")
    parser.add_argument("--embed", action="store_true", help="stop after the embeddings; a later run continues")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder, count, k = arguments.folder, arguments.items, 100
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch(folder / f"steps-{Launch.of_environment().rank}.json")
    with joined_processes(timeout=600, accelerator="cpu") as team:
        first = team.ranks.is_first
        model = folder / "model"
        if first and not model.exists():
            train(model)
        team.broadcast_text("model", "trained")
        if "embed" not in watch.steps:
            with watch.step("embed"):
                embed(model, folder, count, team)
        if arguments.embed:
            return
        sample = questions(model, arguments.queries)
        with watch.step("open"):
            vectors = Vectors(load_file(folder / EMBEDDINGS)["embeddings"])
        with watch.step("index"):
            settings = index(vectors, folder / "codes", team)
        with watch.step("exact"):
            best = exact_answers(vectors, sample, k, team.ranks)
        asked: dict[str, Any] = {}
        for effort in map(int, arguments.efforts.split(",")):
            found = ApproximateIndex(vectors, Int8Store.load(folder / "codes", {**settings, "effort": effort}))
            with watch.step(f"ask, effort {effort}"):
                found.search(sample[: team.ranks.shares(len(sample))[0]], k)
            asked[str(effort)] = {
                "recall": round(recall_of(found, sample, best, team.ranks), 5),
                "seconds_per_query": round(watch.steps[f"ask, effort {effort}"]["seconds"] / len(sample), 3),
            }
        with watch.step("one query"):
            found.search(sample[:1], k)
    if not first:
        return
    result = {
        "items": count,
        "dimension": D,
        "ranks": team.ranks.size,
        "threads": torch.get_num_threads(),
        "k": k,
        "queries": len(sample),
        "steps": watch.steps,
        "asked": asked,
        "disk_bytes": disk(folder),
        "plan_of_a_billion": plan(10**9),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
