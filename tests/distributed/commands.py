"""Run commands in one process and in forked ranks, and leave their outputs. Started by test_commands.py."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import twotower.comparison  # modules are imported once, before the ranks are forked
import twotower.run
import twotower.serving.batch  # noqa: F401
from twotower.distributed.communicator import Communicator
from twotower.index.approximate import code_store

sys.path.insert(0, str(Path(__file__).parent))

from faults import alive, codes, start

SETTINGS = [
    "item_tower={dimension: 8, nested: [4]}",
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
        "hnsw": ["index", run, "--kind", "hnsw", *index],
        "int8": ["index", run, "--kind", "int8", "--min-recall", "0.5", *index],
        "suggest": ["audit", run, "--suggest", "--rows", "4", "--draws", "2", "--json"],
        "similar": ["similar", run, "--item", "3"],
        "one query": ["recommend", run, "--query", "u001"],
        "pgvector": ["index", run, "--kind", "pgvector"],
    }


def comparison(folder, out):
    """Return the command that compares two objectives, with few rows for the audit."""
    names = ["--objectives", "in-batch,in-batch-logq", "--seeds", "1"]
    return ["compare", str(folder / "planted.parquet"), "--out", str(out), *names, *words(SETTINGS[:2] + SETTINGS[3:])]


def killed(command, folder, name, until):
    """Kill rank 1 of two when `until()` is true; return how both end, and what is left in the folder."""
    ranks = start(command, 2, folder / name)
    while not until() and alive(ranks[0]) and alive(ranks[1]):
        time.sleep(0.02)
    os.kill(ranks[1], signal.SIGKILL)
    return codes(ranks)


def dying(command, folder, name, call):
    """Run two ranks, of which rank 1 is killed at its n-th exchange of rows; return how both end."""
    gather, calls = Communicator.gather, []

    def counted(self, values, sizes=None):
        calls.append(self.rank)
        if calls == [1] * call:
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(self, values, sizes)

    Communicator.gather = counted
    try:
        return codes(start(command, 2, folder / name))
    finally:
        Communicator.gather = gather


def compare(folder):
    """Compare in one process and in two ranks, and kill a rank while the others wait for it."""
    one, two, hit = (folder / name for name in ("one", "two", "hit"))
    ends = {"one": codes(start(comparison(folder, one), 1, folder / "one.log"))}
    ends["two"] = codes(start(comparison(folder, two), 2, folder / "two.log"))
    begun = hit / "runs" / "in-batch-logq-0" / "config.yaml"
    ends["hit"] = killed(comparison(folder, hit), folder, "hit.log", begun.exists)
    ends["left"] = [name for name in ("results.json", "report.html", "audit.json") if (hit / name).exists()]
    time.sleep(1)  # training processes of the killed rank get SIGTERM
    ends["again"] = codes(start(comparison(folder, hit), 2, folder / "again.log"))
    return ends


def kill(folder):
    """Kill a rank of each other command in the middle, then run the command again."""
    run, ends = folder / "run-2", {}
    data = folder / "many.parquet"
    recommend = ["recommend", str(run), "--input", str(data), "--output", str(run / "many.parquet"), "--json"]
    parts = run / ".many.parquet.parts"
    ends["recommend"] = killed(recommend, folder, "kill-recommend", lambda: len(list(parts.glob("*.parquet"))) > 4)
    ends["recommend left"] = [(run / "many.parquet").exists(), len(list(parts.glob("part-*.parquet"))) > 0]
    ends["recommend again"] = codes(start([*recommend, "--resume"], 2, folder / "again-recommend"))
    before = (run / "report.html").stat().st_mtime_ns
    for name, call in (("evaluate", 3), ("audit", 1), ("int8", 2)):
        ends[name] = dying(commands(folder, str(run))[name], folder, f"kill-{name}", call)
    ends["evaluate left"] = (run / "report.html").stat().st_mtime_ns == before
    ends["index left"] = sorted(path.name for path in (run / "model" / "index").iterdir())
    ends["partial"] = [str(path) for path in run.rglob(".*") if path.name != ".twotower-run"]
    return ends


def main(folder, only):
    code_store.PART = 30  # four parts of the 100 items
    if only == ["compare"]:
        (folder / "ends.json").write_text(json.dumps(compare(folder)))
        return
    ends = {}
    data = folder / "planted.parquet"
    ends["train"] = codes(start(["train", str(data), "--out", str(folder / "run-1"), *words()], 1, folder / "train"))
    shutil.copytree(folder / "run-1", folder / "run-2")
    for size in (1, 2):
        for name, command in commands(folder, str(folder / f"run-{size}")).items():
            if name in only:
                ends[f"{name}-{size}"] = codes(start(command, size, folder / f"{name}-{size}"))
    if "kill" in only:
        ends["kill"] = kill(folder)
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
