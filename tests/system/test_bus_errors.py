"""A file truncated while it is mapped ends the process with a line."""

import subprocess
import sys

import numpy as np
import pytest

from twotower.system.bus_errors import mapped_file

PROGRAM = """
import os, sys, threading
import numpy as np
from twotower.system.bus_errors import report_bus_errors
if not report_bus_errors():
    sys.exit(77)
column = np.load(sys.argv[1], mmap_mode="r")
os.truncate(sys.argv[1], 200)
if sys.argv[2] == "thread":
    reader = threading.Thread(target=lambda: print(column.sum()))
    reader.start()
    reader.join()
else:
    print(column.sum())
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_truncated_file_is_named(tmp_path, where):
    path = tmp_path / "item_codes.npy"
    np.save(path, np.arange(1_000_000))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path), where], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this system reports no addresses of bus errors")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"twotower: {path}: truncated, or on a disk that failed")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_file_at_an_address(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000))
    column = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert mapped_file(column.ctypes.data + 8000) == str(tmp_path / "a.npy")
    assert mapped_file(1) is None
