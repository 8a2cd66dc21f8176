"""Helpers that start a script of this folder in a separate process, and the ranks that it forks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def start(script: str, *arguments: str, timeout: float = 900) -> None:
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, ended.stdout


def workers(agents: list[subprocess.Popen]) -> dict[int, int]:
    """Find the processes that torchrun has started: rank -> process id."""
    ranks = {}
    for agent in agents:
        for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks |= {int(word[5:]): int(pid) for word in environment if word.startswith(b"RANK=")}
    return ranks


def run_ranks(size: int, out: Path, work: Callable[[], None]) -> int:
    """Fork the ranks of a gloo group, each of which does the work; return 0 if all succeed.

    Modules are imported once, before the ranks are forked, because importing takes longer than the work.
    """
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            dist.init_process_group("gloo", store=dist.FileStore(str(out / "store"), size), rank=rank, world_size=size)
            work()
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)
