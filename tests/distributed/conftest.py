"""Three processes that do all that the tests of this folder compare with one, started once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="session")
def done_by_ranks(tmp_path_factory):
    """Folder of what each rank has found: cases of training, and what tables.py does with tables that ranks share."""
    out = tmp_path_factory.mktemp("ranks")
    ended = subprocess.run(
        [sys.executable, str(WORKER), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout
    return out
