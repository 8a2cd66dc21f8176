"""Fixture that starts, once, the three processes whose results the tests of this folder compare with one process."""

import pytest
from filelock import FileLock

from distributed.starting import start


@pytest.fixture(scope="session")
def done_by_ranks(tmp_path_factory, worker_id):
    """Return the folder with the results of each rank: training cases, and sharded tables (tables.py).

    The processes of pytest-xdist share it: the first one that needs it starts the ranks.
    """
    if worker_id == "master":
        out = tmp_path_factory.mktemp("ranks")
        start("worker.py", str(out))
        return out
    out = tmp_path_factory.getbasetemp().parent / "ranks"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            work = tmp_path_factory.mktemp("ranks")
            start("worker.py", str(work))
            work.rename(out)
    return out
