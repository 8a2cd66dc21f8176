"""The examples run as a reader would run them: from any folder, without a download, in seconds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

#: What each example prints if it did what it says.
PRINTED = {
    "quickstart.py": r"items of the user's own taste: 100%",
    "own_loop.py": r"expected count: full softmax loss 3\.\d+\nno correction: full softmax loss [4-9]\.",
    "custom_source.py": r"the counts are as claimed",
    "compare_objectives.py": r"difference [+-]0\.\d+, 95 % interval",
    "serve_http.py": r'(?s)"items": \[\{.*"items": \[\{.*"status": 4(04|22).*\nstopped',
}


def run_example(name, folder):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_example(name, tmp_path):
    if name == "serve_http.py" and importlib.util.find_spec("fastapi") is None:
        pytest.skip("fastapi is not installed: pip install 'twotower[serve]'")
    done = run_example(name, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(PRINTED[name], done.stdout), done.stdout
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
