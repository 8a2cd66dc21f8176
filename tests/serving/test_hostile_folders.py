"""Model folders that someone else may have written: rejected in one line, whatever they claim."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from support.hostile_folders import OF_CHANGES, OF_INDEXES, OF_MODELS


def test_hostile_folders_are_refused_in_one_line_with_bounded_memory(tmp_path):
    """In a process that may use 2 GiB more than after loading a sound model: no hang, no abort, no raw exception."""
    expected = {**OF_MODELS, **OF_CHANGES}
    faiss = importlib.util.find_spec("faiss") is not None
    if faiss:
        expected |= OF_INDEXES
    assert len(expected) >= 78
    program = Path(__file__).parents[1] / "support" / "hostile_folders.py"
    environment = {name: value for name, value in os.environ.items() if name != "TWOTOWER_DATABASE"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "2", *(["faiss"] if faiss else [])],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    outcomes = {name: outcome for name, outcome, _ in map(json.loads, done.stdout.splitlines())}
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "one line"} == {}
    assert done.returncode == 0 and list(outcomes) == list(expected), done.stderr[-2000:]
