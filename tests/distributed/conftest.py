"""Three processes that do all that the tests of this folder compare with one, started once."""

import pytest

from distributed.starting import start


@pytest.fixture(scope="session")
def done_by_ranks(tmp_path_factory):
    """Folder of what each rank has found: cases of training, and what tables.py does with tables that ranks share."""
    out = tmp_path_factory.mktemp("ranks")
    start("worker.py", str(out))
    return out
