"""What is loaded when: Lightning takes seconds, so it is loaded to train and for nothing else."""

import subprocess
import sys


def test_only_training_loads_lightning():
    code = """
import sys
import twotower.audit, twotower.comparison, twotower.run.run_folder, twotower.study
from twotower.training import TableOptimizer, compute_loss
assert "pytorch_lightning" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
