"""The command that changes a catalog: `twotower items`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower.cli_answers import listed
from twotower.errors import InputError
from twotower.terminal import Json, Run, console, print_json

commands = typer.Typer()


@commands.command()
def items(
    directory: Run,
    add: Annotated[
        Path | None, typer.Option("--add", metavar="FILE", help="Items that join: ids, columns, or embeddings.")
    ] = None,
    update: Annotated[
        Path | None, typer.Option("--update", metavar="FILE", help="Items that change; written likewise.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="IDS", help='Items that leave: "i1,i2,...", or @FILE of ids.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Add, change and remove items of a trained model's catalog, without training and without a new index.

    FILE is Parquet or CSV with a column of item ids. What a column of the item table says is kept. An item's embedding
    is the item tower's, by the declared features, or a column `embedding` with lists of numbers (Parquet).
    """
    from twotower.data.written import read_items  # noqa: PLC0415
    from twotower.serving import Retriever, save_changes  # noqa: PLC0415

    leaving = listed(remove, "--remove")
    if add is None and update is None and leaving is None:
        raise InputError("items: expected --add FILE, --update FILE or --remove IDS; found none of them")
    retriever = Retriever.load(directory)
    if leaving is not None:
        retriever.catalog.remove(leaving)
    if update is not None:
        retriever.catalog.update(read_items(update))
    if add is not None:
        retriever.catalog.add(read_items(add))
    told = save_changes(retriever.catalog, directory)
    if as_json:
        print_json(told)
        return
    console.print(
        f"Since training {told['joined']:,} items have joined the catalog, {told['changed']:,} have changed and "
        f"{told['left']:,} have left; the {retriever.index.kind} index has it. A running service swaps by itself.",
        highlight=False,
        soft_wrap=True,
    )
