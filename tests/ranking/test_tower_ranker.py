"""Tests of the progress bar of a long ranking: on a terminal, after a delay, on standard error."""

import io
import sys

import pytest
import torch

from twotower.index import ExactIndex
from twotower.ranking.tower_ranker import SlowProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("patience", "terminal", "shown"), [(0.0, True, True), (60.0, True, False), (0.0, False, False)]
)
def test_it_appears_where_it_should(monkeypatch, capsys, patience, terminal, shown):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with SlowProgress("ranking queries", patience) as progress:
        ExactIndex(torch.rand(300, 4)).search(torch.rand(9, 4), 3, row_block=4, column_tile=100, progress=progress)
    assert ("ranking queries" in stream.getvalue()) == shown
    assert not capsys.readouterr().out
