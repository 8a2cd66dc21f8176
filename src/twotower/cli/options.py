"""Arguments and options that several commands share."""

import json
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Data = Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, or the name of a data set.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, e.g. training.seed=1.")
]
Items = Annotated[str | None, typer.Option("--items", metavar="FILE", help="File with item features and titles.")]
MovedData = Annotated[str | None, typer.Option("--data", help="Current location of the data, if it has moved.")]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder written by `twotower train`.")]


def overrides(given: list[str] | None, items: str | None) -> list[str]:
    """Return the overrides of --set, with the file of --items."""
    return [*(given or []), *([] if items is None else [f"data.items={json.dumps(items)}"])]
