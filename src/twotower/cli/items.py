"""The command that edits a catalog: `twotower items`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower.cli.console import print_json, print_line
from twotower.cli.options import Command, Json, Run
from twotower.cli.query import option_ids
from twotower.errors import InputError, counted

commands = typer.Typer()


@commands.command(cls=Command)
def items(
    directory: Run,
    add: Annotated[
        Path | None, typer.Option("--add", metavar="FILE", help="Items to add: ids with columns or embeddings.")
    ] = None,
    update: Annotated[
        Path | None, typer.Option("--update", metavar="FILE", help="Items to change; same format as --add.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="IDS", help='Items to remove: "i1,i2,...", or @FILE with ids.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Add, change and remove items in a trained model's catalog, without retraining or rebuilding the index.

    FILE is Parquet or CSV with a column of item ids. Columns of the item table are stored. An item's embedding is read
    from a column `embedding` with lists of numbers (Parquet), or computed by the item tower from the declared features.
    """
    from twotower.data.io.id_lists import read_items  # noqa: PLC0415
    from twotower.serving import Retriever, save_changes  # noqa: PLC0415

    removed = option_ids(remove, "--remove")
    if add is None and update is None and removed is None:
        raise InputError("items: expected --add FILE, --update FILE or --remove IDS; found none of them")
    retriever = Retriever.load(directory)
    if removed is not None:
        retriever.catalog.remove(removed)
    if update is not None:
        retriever.catalog.update(read_items(update))
    if add is not None:
        retriever.catalog.add(read_items(add))
    counts = save_changes(retriever.catalog, directory)
    if as_json:
        print_json(counts)
        return
    print_line(
        f"Since training, {counted(counts['joined'], 'item was', 'items were')} added to the catalog, "
        f"{counts['changed']:,} changed and {counts['left']:,} removed; the {retriever.index.kind} index is "
        "up to date. A running service reloads the model automatically."
    )
