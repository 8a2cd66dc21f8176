"""Output to the console or as JSON, and arguments that several commands share."""

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


#: Results go to stdout; progress goes to stderr when stdout is JSON.
console = Console()
messages = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder written by `twotower train`.")]


def print_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def print_frame(title: str, frame: pl.DataFrame) -> None:
    """Print a data frame as a table, floats with four decimals."""
    console.print(title, style="italic", highlight=False, markup=False, soft_wrap=True)
    table = Table(*frame.columns)  # the table's own title would wrap at the width of its columns
    for row in frame.iter_rows():
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
