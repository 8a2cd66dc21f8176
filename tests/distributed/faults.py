"""Run `twotower train` in forked ranks, kill some, resume, and write the outcome. Started by test_faults.py.

It replaces torchrun, because importing takes longer than all of the training here: it sets the same variables, restarts
all ranks when one has died, and counts the restarts. test_faults.py also has a run under torchrun itself.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import twotower.run  # modules are imported once, before the ranks are forked
import twotower.training.fit  # noqa: F401
from twotower.cli import main as cli

SETTINGS = [
    "item_tower.dimension=8",
    "query_tower={dropout: 0, history: {length: 5, heads: 2, dropout: 0}}",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}, {memory: {size: 60}}]",
    "training={batch_size: 64, learning_rate: 0.01, warmup_steps: 5, accelerator: cpu, max_epochs: 2, "
    "checkpoint_every: 3, exchange_timeout: 60}",
    "evaluation.baselines=false",
]


def words(data, out, more=()):
    return ["train", str(data), "--out", str(out), *(w for s in SETTINGS for w in ("--set", s)), *more]


def steps_done(out):
    """Return the steps of the last checkpoint, 0 if there is none yet."""
    try:
        state = json.loads((out / "checkpoints" / "last.ckpt" / "state.json").read_text())
    except (OSError, ValueError):
        return 0
    return next(value for key, value in state["dict"] if key == "global_step")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments, size, log, restarts=0, largest_file=None):
    """Fork `size` ranks; return rank -> process id. `largest_file` limits file sizes in bytes, as `ulimit -f`."""
    port, ranks = free_port(), {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            if size > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
                os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            output = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["twotower", *arguments]
            code = 0
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks[rank] = child
    return ranks


def codes(ranks):
    """Return the exit code of every rank; minus the signal if one killed it."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks.values()]


def alive(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def with_kills(data, out, kills, seed):
    """Kill a rank at random steps, `kills` times, and restart all ranks each time."""
    draw = random.Random(seed)
    ends = []
    while True:
        goal = steps_done(out) + draw.randrange(1, 7)  # a little further each time: 76 steps are enough for ten kills
        ranks = start(words(data, out), 2, out.with_suffix(".log"), restarts=len(ends))
        if len(ends) < kills:
            while steps_done(out) < goal and alive(ranks[0]) and alive(ranks[1]):
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.05))
            os.kill(ranks[draw.randrange(2)], signal.SIGKILL)
        ends.append(codes(ranks))
        if ends[-1] == [0, 0] or len(ends) > kills:
            return ends


def stopped(data, out, at):
    """Send SIGTERM to both ranks in the middle of training."""
    ranks = start(words(data, out), 2, out.with_suffix(".log"))
    while steps_done(out) < at and alive(ranks[0]):
        time.sleep(0.005)
    for child in ranks.values():
        os.kill(child, signal.SIGTERM)
    return codes(ranks)


def hung(data, out):
    """Suspend one of two ranks in the middle; record how the other ends, and after how many seconds."""
    ranks = start(words(data, out, ["--set", "training.exchange_timeout=8"]), 2, out.with_suffix(".log"))
    while steps_done(out) < 6 and alive(ranks[0]):
        time.sleep(0.005)
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    ended = os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1])
    seconds = time.monotonic() - began
    os.kill(ranks[1], signal.SIGKILL)
    os.waitpid(ranks[1], 0)
    return [ended, seconds]


def full(data, out):
    """Limit files to 20,000 bytes, less than a checkpoint; then lift the limit and restart the run."""
    first = codes(start(words(data, out), 1, out.with_suffix(".log"), largest_file=20_000))
    left = sorted(str(p.relative_to(out)) for p in out.rglob("*partial*"))
    return [first, left, codes(start(words(data, out, ["--force"]), 1, out.with_suffix(".log")))]


def sharded(data, out):
    """Train two ranks on a folder of shards; then remove a shard, so that the run cannot be resumed."""
    shards = data.with_name("shards")
    first = codes(start(words(shards, out), 2, out.with_suffix(".log")))
    (shards / "part-2.parquet").unlink()
    return [first, codes(start(words(shards, out, ["--resume"]), 2, out.with_suffix(".lost")))]


def main(data, folder, kills):
    found = {
        "one": codes(start(words(data, folder / "one"), 1, folder / "one.log")),
        "two": codes(start(words(data, folder / "two"), 2, folder / "two.log")),
        "killed": with_kills(data, folder / "killed", kills, seed=kills),
        "stopped": stopped(data, folder / "stopped", 12),
        "stopped at": steps_done(folder / "stopped"),
    }
    if kills <= 2:  # once is enough
        found |= {
            name: act(data, folder / name) for name, act in (("hung", hung), ("full", full), ("sharded", sharded))
        }
    for size in (1, 3):
        shutil.copytree(folder / "stopped", folder / f"resumed-{size}")
        out = folder / f"resumed-{size}"
        found[out.name] = codes(start(words(data, out, ["--resume"]), size, folder / f"{out.name}.log"))
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
