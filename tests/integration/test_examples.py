"""The examples run as a reader would run them: from any folder, without a download, in seconds."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twotower.negatives import Pool, Sampled, Uniform

EXAMPLES = Path(__file__).parents[2] / "examples"

#: What each example prints if it did what it says.
PRINTED = {
    "quickstart.py": r"items of the user's own taste: 100%",
    "own_loop.py": r"expected count: full softmax loss 3\.\d+\nno correction: full softmax loss [4-9]\.",
    "custom_source.py": r"the counts are as claimed",
    "embed_in_processes.py": r"the retriever finds the same best item: 100% of 120 users",
    "compare_objectives.py": r"difference [+-]0\.\d+, 95 % interval",
    "serve_http.py": r'(?s)"items": \[\{.*"items": \[\{.*"status": 4(04|22).*\nstopped',
}


#: Start processes of their own, so they are run in one.
IN_PROCESSES = ("serve_http.py", "embed_in_processes.py")
#: tests/serving/test_embedder.py does the same.
LONG = "embed_in_processes.py"


def run_here(name, monkeypatch, capsys):
    """Run an example in the process of the test, and return what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "quickstart", raising=False)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def run_in_process(name, folder):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == LONG else name for name in PRINTED]
)
def test_example(name, tmp_path, monkeypatch, capsys):
    if name == "serve_http.py" and importlib.util.find_spec("fastapi") is None:
        pytest.skip("fastapi is not installed: pip install 'twotower[serve]'")
    monkeypatch.chdir(tmp_path)
    printed = run_in_process(name, tmp_path) if name in IN_PROCESSES else run_here(name, monkeypatch, capsys)
    assert re.search(PRINTED[name], printed), printed
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


def test_counts_of_the_custom_source_are_the_same_over_several_processes():
    spec = importlib.util.spec_from_file_location("custom_source", EXAMPLES / "custom_source.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = module.SameCategory(torch.tensor([0, 0, 0, 1, 1]), size=4)
    pool, positives = Pool(source, Sampled(Uniform(5), 3, per_row=True)), torch.tensor([0, 3, 4, 1])
    whole, part = (
        pool.draw(positives, generator=torch.Generator().manual_seed(1), rows=rows) for rows in (None, slice(1, 3))
    )
    assert len(whole.row_log_expected_count[1:3].unique()) > 1
    for name in ("row_items", "row_log_expected_count", "row_mask", "positive_log_count"):
        assert torch.equal(getattr(whole, name)[1:3], getattr(part, name)), name
