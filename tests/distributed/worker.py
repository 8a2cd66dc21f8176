"""The ranks of the test: each trains every case it is part of and writes the results. Started by conftest.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import cases
import engine_rows
import tables
from starting import run_ranks

from twotower.distributed import torchrec_tables
from twotower.distributed.communicator import Communicator

RANKS = 3


def work(out: Path, *, only_torchrec: bool) -> None:
    rank, groups = dist.get_rank(), {2: dist.new_group([0, 1]), 3: None}
    for name, case in (cases.WITH_TORCHREC if only_torchrec else cases.IN_GATE).items():
        if rank < case.size:
            found = cases.train(case, Communicator.current(groups[case.size]))
            torch.save(vars(found), out / f"{name}.{rank}.pt")
    for size, group in groups.items():
        if rank < size and not only_torchrec:
            tables.work(Communicator.current(group), out)
            engine_rows.work(Communicator.current(group), out)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torchrec_tables.library()  # once, before the ranks are forked
    sys.exit(run_ranks(RANKS, out, lambda: work(out, only_torchrec=len(sys.argv) > 2)) != 0)
