"""What is loaded when: Lightning and torch.distributed.checkpoint take seconds, so they are loaded to train only."""

import subprocess
import sys


def test_only_training_loads_what_takes_seconds():
    code = """
import sys
import twotower.audit, twotower.comparison, twotower.run.run_folder, twotower.study
from twotower.training import TableOptimizer, compute_loss
assert not {"pytorch_lightning", "torch.distributed.checkpoint", "sympy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
