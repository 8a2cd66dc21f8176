"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def run_examples(module: object) -> doctest.TestResults:
    """Run the examples of a module with nothing but what they import themselves."""
    return doctest.testmod(module, globs={})


def test_there_are_examples():
    assert "twotower.losses.softmax" in MODULES and len(MODULES) >= 7


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name):
    found = run_examples(importlib.import_module(name))
    assert found.attempted and not found.failed


def test_a_wrong_example_fails(capsys):
    class Wrong:
        """>>> 1 + 1
        3
        """

    Wrong.__module__, module = "wrong", type(doctest)("wrong")
    module.Wrong = Wrong
    assert run_examples(module).failed == 1
    assert "Expected" in capsys.readouterr().out
