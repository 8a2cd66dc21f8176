"""Text of data in a terminal: nothing in it is markup, a link, or a command to the terminal."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from twotower.system.terminal import cell, plain

HOSTILE = [
    "Song [live] 17",
    "AC/DC [/b] 2",
    "[b]bold[/b]",
    "[link=https://evil.example]here[/link]",
    "[@click=app.quit]x[/]",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "\x9b2J",
    "a\rb",
    "a\nb",
    "a\x08\x08b",
    "a\u202egnp.exe",
    "a\u2066b\u2069",
    "half \ud800",
    ":smile:",
    "\\[b]",
]


def printed(*renderables):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system="truecolor")
    console.print(*renderables)
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_shows_text_as_it_is(text):
    table = Table("item", "title")
    table.add_row(cell(7), cell(text))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", printed(table))  # the styles of the table itself
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert plain(text) in shown
    assert "https" not in printed(table).replace(plain(text), "")


def test_ordinary_text_is_not_changed():
    for text in ("Amélie", "東京物語", "a [b] c", "100 %", "👩‍👩‍👧", "می‌خواهم", ""):
        assert plain(text) == text
    assert cell(0.5).plain == "0.5000" and cell(None).plain == "None" and cell(2**60).plain == str(2**60)
