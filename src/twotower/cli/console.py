"""Output to the console or as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower.system.terminal import cell, plain

if TYPE_CHECKING:
    import polars as pl


#: Results go to stdout; progress goes to stderr when stdout is JSON.
console = Console()
messages = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    # json.dumps escapes only the first 32 of the characters that control a terminal.
    sys.stdout.write(re.sub("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", _escape, text) + "\n")


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def print_line(text: object, *, to: Console = console, style: str = "") -> None:
    """Print one line of text unchanged, without wrapping or interpreting markup."""
    to.print(Text(plain(text), style=style), soft_wrap=True)


def print_lines(text: object, *, to: Console = console) -> None:
    """Print text of several lines, each as `print_line` does."""
    for line in str(text).split("\n"):
        print_line(line, to=to)


def print_frame(title: str, frame: pl.DataFrame) -> None:
    """Print a data frame as a table, floats with four decimals."""
    print_line(title, style="italic")  # a table title would wrap at the width of the table
    print_table(frame.columns, frame.iter_rows())


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print rows as a table, without interpreting markup in cells."""
    table = Table(title=None if title is None else cell(title), title_justify="left")
    for name in header:
        table.add_column(cell(name))
    for row in rows:
        table.add_row(*map(cell, row))
    console.print(table)
