"""Memory of a served model after loading and after requests, in multiples of its catalog.

    python benchmarks/serving_memory.py [--items 300000] [--kinds exact,hnsw,ivfpq] [--json FILE]

An untrained model is written to a folder, with an index next to it. For each kind, a new process loads the model and
requests the best 100 items of 200 queries with the popularity dial at 1, the same at 0.5, and the neighbours of an
item. Reported is the growth since the imports, divided by the size of the item embeddings (N x D float32): private
(anonymous) memory, and file pages, which the system shares between processes and can reclaim. The item table of the
tower is as large as the embeddings and is included.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from twotower.config.run import Config
from twotower.data.schema.vocabulary import Vocabulary
from twotower.serving.model_folder import SavedModel, library_versions
from twotower.serving.stored_index import build_stored_index
from twotower.towers import build_towers

SEED = 0
QUERIES = 2000
ASKED = 200
#: Interactions of each query.
LENGTH = 20

ASK = """
import gc, json, sys
from twotower.serving import Retriever
import twotower.index.approximate.index, twotower.data.loading.histories, twotower.ranking.tower_ranker
if sys.argv[2] not in ("exact",):
    import faiss
def held():
    gc.collect()
    rows = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
    return [int(rows[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]
start, told = held(), {}
model = Retriever.load(sys.argv[1])
def note(name):
    told[name] = [now - then for now, then in zip(held(), start)]
note("loaded")
asked = list(range(int(sys.argv[3])))
model.recommend(asked, k=100)
note("asked")
model.recommend(asked, k=100, popularity=0.5)
note("asked with the dial turned")
model.similar([1], k=10)
note("asked for neighbours")
print(json.dumps(told))
"""


def model(folder: Path, items: int, dim: int) -> None:
    """Write a model folder with the given number of items."""
    config = Config.load(None, [f"item_tower.dimension={dim}", "query_tower.history.length=10"])
    torch.manual_seed(SEED)
    towers = build_towers(config, num_queries=QUERIES, num_items=items).eval()
    rng = np.random.default_rng(SEED)
    SavedModel(
        config=config,
        towers=towers,
        item_embeddings=towers.item_embeddings(),
        item_counts=torch.from_numpy(rng.zipf(1.5, items).clip(max=10_000)),
        queries=Vocabulary(pl.Series("id", range(QUERIES))),
        items=Vocabulary(pl.Series("id", range(items))),
        history_offsets=np.arange(QUERIES + 1) * LENGTH,
        history_items=rng.integers(0, items, QUERIES * LENGTH).astype(np.int32),
    ).save(folder)


def main() -> None:
    """Measure all kinds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--kinds", default="exact,hnsw,ivfpq")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    one = arguments.items * arguments.dim * 4
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model(folder, arguments.items, arguments.dim)
        for kind in arguments.kinds.split(","):
            # A poor graph is as large as a good one and is built faster.
            settings = {"hnsw": {"build_effort": 16}, "ivfpq": {"clusters": 256}}.get(kind)
            build_stored_index(folder, kind, queries=20, settings=settings)
            command = [sys.executable, "-c", ASK, str(folder), kind, str(ASKED)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            results[kind] = {
                name: {"own": round(own / one, 2), "of files": round(files / one, 2)}
                for name, (own, files) in told.items()
            }
            print(kind, json.dumps(results[kind]), flush=True)
    if arguments.json:
        report = {
            "benchmark": "serving_memory",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": SEED,
            "versions": library_versions(),
            "python": platform.python_version(),
            "asked": {"items": arguments.items, "dim": arguments.dim, "embeddings_mib": round(one / 2**20, 1)},
            "times_the_embeddings": results,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
