"""What commands share: consoles, tables, JSON, and the arguments that mean the same everywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

#: Results go to stdout, what is told on the way to stderr where stdout is JSON.
console = Console()
messages = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder that `twotower train` made.")]


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def print_frame(title: str, frame: pl.DataFrame) -> None:
    """A data frame as a table, numbers with four places."""
    console.print(title, style="italic", highlight=False, markup=False, soft_wrap=True)
    table = Table(*frame.columns)  # a title of its own is folded to the width of its columns
    for row in frame.iter_rows():
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
