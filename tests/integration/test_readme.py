"""Tests of the README: its shell and Python blocks, run in order in an empty folder, as a reader would."""

import re
import shlex
from pathlib import Path

import pytest

from support.command_line import command, train_here

README = Path(__file__).parents[2] / "README.md"

#: README commands that are not run here: other targets run them, or they would install the package again.
ELSEWHERE = ("make ", "git ", "pip ", "cd ", "python3 -m venv", ". .venv")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines = [line.split("  #")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith(("#", *ELSEWHERE))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, interactions_csv):
    """Make a folder with only the file of purchases that the README uses."""
    path = tmp_path_factory.mktemp("readme")
    interactions_csv(path / "purchases.csv")
    return path


def test_the_readme_has_commands():
    assert len(commands()) >= 5


def test_the_shell_commands_work(folder, monkeypatch, capsys):
    train_here(monkeypatch)
    for line in commands():
        words = shlex.split(line)
        if words[1] == "compare":
            words += ["--set", "training.max_epochs=3"]  # the comparison itself is tested in tests/comparison
        assert words[0] == "twotower", f"the README shows a command that no test runs: {line}"
        assert command(folder, monkeypatch, *words[1:]) == 0, f"{line}\n{capsys.readouterr()}"


def test_the_python_blocks_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
