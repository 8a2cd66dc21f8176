"""Run commands in one process and in forked ranks, and leave their outputs. Started by test_commands.py."""

import json
import shutil
import sys
import time
from pathlib import Path

import twotower.comparison  # modules are imported once, before the ranks are forked
import twotower.run
import twotower.serving.batch  # noqa: F401
from twotower.index.approximate import code_store

sys.path.insert(0, str(Path(__file__).parent))

from faults import codes, start

SETTINGS = [
    "item_tower.dimension=8",
    "query_tower={dropout: 0, history: {length: 5, heads: 2, dropout: 0}}",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
    "training={batch_size: 256, learning_rate: 0.01, warmup_steps: 5, accelerator: cpu, max_epochs: 1, "
    "exchange_timeout: 60}",
    "evaluation.baselines=[popularity, item-kNN]",
]


def words(settings=SETTINGS):
    return [word for one in settings for word in ("--set", one)]


def commands(folder, run):
    """Return the commands on one run folder; their outputs are in it, and in the logs."""
    queries = str(folder / "queries.parquet")
    index = ["--queries", "30", "-k", "5", "--json"]
    return {
        "evaluate": ["evaluate", run, "--json"],
        "audit": [
            "audit",
            run,
            "--rows",
            "8",
            "--draws",
            "6",
            "--batches",
            "20",
            "--per-query",
            f"{run}/audit.parquet",
            "--json",
        ],
        "file": ["recommend", run, "--input", queries, "--output", f"{run}/recs.parquet", "--json"],
        "shards": ["recommend", run, "--input", queries, "--output", f"{run}/recs", "--shards", "--json"],
        "int8": ["index", run, "--kind", "int8", "--min-recall", "0.5", *index],
        "hnsw": ["index", run, "--kind", "hnsw", *index],
        "floor": ["index", run, "--kind", "binary", "--min-recall", "1", "--set", "effort=1", "-k", "50"],
        "suggest": ["audit", run, "--suggest", "--rows", "4", "--draws", "2", "--json"],
        "similar": ["similar", run, "--item", "3"],
        "one query": ["recommend", run, "--query", "u001"],
        "pgvector": ["index", run, "--kind", "pgvector"],
    }


def main(folder, only):
    code_store.PART = 30  # four parts of the 100 items
    ends, seconds = {}, {}
    data = folder / "planted.parquet"
    ends["train"] = codes(start(["train", str(data), "--out", str(folder / "run-1"), *words()], 1, folder / "train"))
    shutil.copytree(folder / "run-1", folder / "run-2")
    for size in (1, 2):
        for name, command in commands(folder, str(folder / f"run-{size}")).items():
            if name in only:
                began = time.monotonic()
                ends[f"{name}-{size}"] = codes(start(command, size, folder / f"{name}-{size}"))
                seconds[f"{name}-{size}"] = time.monotonic() - began
    (folder / "ends.json").write_text(json.dumps(ends))
    print(seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
