"""The script for a machine with a GPU, as a dry run on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks/device.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


@pytest.mark.slow
def test_the_dry_run_measures_every_part(tmp_path):
    done = run("--device", "cpu", "--json", str(tmp_path / "device.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["tests"]["tests"] > 30 and found["tests"]["failed"] == []
    assert found["device"] == "cpu (dry run)"
    for name in ("step", "full softmax", "ranking"):
        for precision in ("float32", "tf32", "bfloat16"):
            row = found["parts"][name][precision]
            assert {"products", "ours", "plain", "compiled"} <= set(row)
            assert row["products"]["of_products"] == 1.0
            assert all(one["median_ms"] > 0 for one in row.values())
    assert found["parts"]["epoch"]["fit_s"] > 0 and found["parts"]["epoch"]["plain_loop_s"] > 0


def test_an_unknown_option_is_rejected():
    done = run("--gpu", "1")
    assert done.returncode == 2 and "unknown option --gpu" in done.stderr
