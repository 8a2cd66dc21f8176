"""Starts what starts ranks: a script of this folder in a process of its own, which has to end well."""

import os
import subprocess
import sys
from pathlib import Path


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
