"""The command line, run in the process of a test."""

import sys

import pytest

from twotower.cli import main as cli


def command(path, patch, *given):
    """Run the command line in this process; training runs are separate processes."""
    patch.chdir(path)
    patch.setattr(sys, "argv", ["twotower", *map(str, given)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0
