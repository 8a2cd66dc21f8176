"""The command line, run in the process of a test: a process of its own would import for seconds before it works."""

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOWrapper
from types import SimpleNamespace

import pytest

from twotower.cli import main as cli
from twotower.comparison import processes


def command(path, patch, *given):
    """Run the command line in this process and return its exit code; `compare` trains in processes of their own."""
    patch.chdir(path)
    patch.setattr(sys, "argv", ["twotower", *map(str, given)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def train_here(patch):
    """Let `compare` train in this process, one run after the other; tests/comparison/test_compare.py does not."""
    patch.setattr(processes, "subprocess", SimpleNamespace(Popen=_TrainedHere, DEVNULL=None, STDOUT=None))


class _TrainedHere:
    """A run of `twotower train` that has ended when it is made."""

    def __init__(self, given, *, stdout, **options):
        del options
        log = TextIOWrapper(stdout, encoding="utf-8", write_through=True)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(log), redirect_stderr(log):
            patch.setattr(sys, "argv", ["twotower", *given[3:]])
            with pytest.raises(SystemExit) as stop:
                cli.main()
        log.detach()
        self.returncode = stop.value.code or 0

    def poll(self):
        return self.returncode
