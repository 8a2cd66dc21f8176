"""Fixture that starts, once, the three processes whose results the tests of this folder compare with one process."""

import pytest

from distributed.starting import start


@pytest.fixture(scope="session")
def done_by_ranks(tmp_path_factory):
    """Return the folder with the results of each rank: training cases, and sharded tables (tables.py)."""
    out = tmp_path_factory.mktemp("ranks")
    start("worker.py", str(out))
    return out
