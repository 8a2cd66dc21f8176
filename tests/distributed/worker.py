"""One rank of the test: trains every case it is part of and writes what came of it. Started by test_ranks.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import cases

from twotower.ranks import Ranks


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    groups = {2: dist.new_group([0, 1]), 3: None}
    for name, case in cases.CASES.items():
        if dist.get_rank() < case.size:
            found = cases.train(case, Ranks.current(groups[case.size]))
            torch.save(vars(found), out / f"{name}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
