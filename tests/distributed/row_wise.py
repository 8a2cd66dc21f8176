"""Run `twotower train` with sharded tables and write the outcome. Started by test_row_wise.py."""

import importlib
import json
import re
import resource
import shutil
import sys
from pathlib import Path

import faults

ROW_WISE = ["--set", "training.table_placement=row-wise"]


def run(data, out, size, more=()):
    return faults.codes(faults.start(faults.words(data, out, more), size, out.with_suffix(".log")))


def shared(data, folder):
    """Train with one process, with two and three that share tables; stop two, and resume with one, two and three."""
    found = {"one": run(data, folder / "one", 1)}
    for size, name in ((2, "two"), (3, "three")):
        found[name] = run(data, folder / name, size, ROW_WISE)
    found |= stopped(data, folder, ROW_WISE, {1: ROW_WISE, 2: ROW_WISE, 3: ROW_WISE})
    faults.SETTINGS.append(ROW_WISE[1])
    found["killed"] = faults.with_kills(data, folder / "killed", 2, seed=2)
    return found


def stopped(data, folder, more, again):
    """Stop two ranks, then resume with another number of ranks and other arguments."""
    found, out = {}, folder / "stopped"
    ranks = faults.start(faults.words(data, out, more), 2, out.with_suffix(".log"))
    while faults.steps_done(out) < 12 and faults.alive(ranks[0]):
        faults.time.sleep(0.005)
    for child in ranks.values():
        faults.os.kill(child, faults.signal.SIGTERM)
    found["stopped"], found["stopped at"] = faults.codes(ranks), faults.steps_done(out)
    for size, words in again.items():
        resumed = folder / f"resumed-{size}"
        shutil.copytree(out, resumed)
        found[resumed.name] = run(data, resumed, size, [*words, "--resume"])
    return found


def placed(data, folder):
    """Train with TorchRec: one, two, three processes; resumed, also by the built-in exchange; on new data; killed."""
    faults.SETTINGS.append("training.table_optimizer=rowwise-adagrad")
    faults.SETTINGS.append("query_tower={id_embedding: true, dropout: 0, history: {length: 5, heads: 2, dropout: 0}}")
    engine = ["--set", "training.table_engine=torchrec"]
    rows, each = [*ROW_WISE, *engine], ["--set", "training.table_placement={item: table-wise, query: row-wise}"]
    found = {"one": run(data, folder / "one", 1)}
    found |= {"two": run(data, folder / "two", 2, rows), "three": run(data, folder / "three", 3, each)}
    found |= stopped(data, folder, rows, {1: rows, 2: ROW_WISE, 3: each})
    for parent, size, more in (("one", 1, rows), ("one", 3, rows), ("two", 2, each)):
        again = folder / f"{parent}-{size}"
        june = data.with_name("june.parquet")
        found[again.name] = run(june, again, size, ["--from", str(folder / parent), *more])
    wrong = ["--set", "training.table_placement={items: row-wise}"]
    found["wrong"] = run(data, folder / "wrong", 2, wrong)
    found["adam"] = run(data, folder / "adam", 2, [*rows, "--set", "training.table_optimizer=adam"])
    faults.SETTINGS.extend([ROW_WISE[1], engine[1]])
    found["killed"] = faults.with_kills(data, folder / "killed", 2, seed=4)
    return found


def sequences(data, folder):
    """Train a sequence tower: one process; two with whole tables; two with sharded tables that are killed once."""
    inner = "{length: 5, dropout: 0, sequence: {blocks: 1, dropout: 0}}"
    tower = f"query_tower={{id_embedding: true, dropout: 0, history: {inner}}}"
    more = ["--set", tower, "--set", "training.weight_average=0.9"]
    found = {"one": run(data, folder / "one", 1, more), "two": run(data, folder / "two", 2, more)}
    found["shared"] = run(data, folder / "shared", 2, [*more, *ROW_WISE])
    mined = ["--set", "objective.sources=[{mined: {size: 4}}, {uniform: {size: 20}}]"]
    mined += ["--set", "training.table_optimizer=rowwise-adagrad"]  # Adam amplifies rounding
    found["mined-1"] = run(data, folder / "mined-1", 1, mined)
    found["mined-2"] = run(data, folder / "mined-2", 2, [*mined, *ROW_WISE])
    faults.SETTINGS.extend([tower, more[-1], ROW_WISE[1]])
    found["killed"] = faults.with_kills(data, folder / "killed", 1, seed=1)
    return found


def continued(data, folder):
    """Train on new data, from a model of one process and of two with sharded tables: by one, two and three."""
    june, gone = data.with_name("june.parquet"), data.with_name("gone.txt")
    parents = {"one": run(data, folder / "one", 1), "two": run(data, folder / "two", 2, ROW_WISE)}
    assert set(parents["one"] + parents["two"]) == {0}

    def go_on(parent, size, more=()):
        out = folder / f"{parent}-{size}"
        return run(june, out, size, ["--from", str(folder / parent), "--withdraw", str(gone), *more])

    found = {f"{parent}-1": go_on(parent, 1) for parent in parents}
    return found | {"one-2": go_on("one", 2, ROW_WISE), "one-3": go_on("one", 3, ROW_WISE), "two-2": go_on("two", 2)}


def limited(data, folder, room):
    """Run the same command with limited memory per process: with one process and with two."""
    # Imports are already in memory here: the limit is for data, tables and the memory of a step.
    importlib.import_module("twotower.run")
    importlib.import_module("twotower.training")
    importlib.import_module("torch.distributed.checkpoint")
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
    allowed = resource.getrlimit(resource.RLIMIT_DATA)
    more = ["--set", "item_tower.dimension=1024", "--set", "training.max_epochs=1", "--set", "training.batch_size=256"]
    more += ["--set", "training.checkpoint_every=null", "--set", "data.validation=0.002", "--set", "data.test=0.002"]
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, allowed[1]))
    found = {}
    for size in (1, 2):
        found[f"limited-{size}"] = run(data, folder / f"limited-{size}", size, more)
    again = ["--from", str(folder / "limited-2"), *more]
    found["again-2"] = run(data.with_name("later.parquet"), folder / "again-2", 2, again)
    resource.setrlimit(resource.RLIMIT_DATA, allowed)
    return found


WHAT = {"shared": shared, "placed": placed, "sequences": sequences, "continued": continued, "limited": limited}


def main(what, data, folder, *more):
    made = WHAT[what](data, folder, *map(int, more))
    (folder / "found.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
