"""The ranks of the test: each trains every case it is part of and writes what came of it. Started by test_ranks.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import cases
import tables

from twotower.ranks import Ranks

RANKS = 3


def work(rank: int, out: Path) -> None:
    store = dist.FileStore(str(out / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    groups = {2: dist.new_group([0, 1]), 3: None}
    for name, case in cases.CASES.items():
        if rank < case.size:
            found = cases.train(case, Ranks.current(groups[case.size]))
            torch.save(vars(found), out / f"{name}.{rank}.pt")
    for size, group in groups.items():
        if rank < size:
            tables.work(Ranks.current(group), out)
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path) -> int:
    """Imports once and becomes several, for importing takes longer than the work."""
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            work(rank, out)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) != 0)
