"""The command that searches for settings: `twotower tune`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from twotower.cli.console import console, messages, print_json, print_line, print_lines
from twotower.cli.options import Command, ConfigFile, Data, Items, Json, Overrides, overrides

commands = typer.Typer()


@commands.command(cls=Command)
def tune(
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder to write.")],
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="Time limit of the search, such as 90s, 30m or 2h.")
    ] = "30m",
    space: Annotated[
        Path | None, typer.Option("--space", metavar="FILE", help="YAML file with the settings to try.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Maximum number of training runs.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of training runs in parallel.")] = 1,
    config: ConfigFile = None,
    settings: Overrides = None,
    items: Items = None,
    no_refit: Annotated[
        bool, typer.Option("--no-refit", help="Do not train the chosen model on the validation and test rows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search for the settings that are best on the validation queries, train with them on all rows, and save to DIR.

    Run the same command again to resume an interrupted search, or with a larger --budget to continue a finished one.
    """
    from twotower.errors import Interrupted  # noqa: PLC0415  # heavy imports only when needed
    from twotower.study import Budget, tune_run  # noqa: PLC0415

    progress = messages if as_json else console
    try:
        found = tune_run(
            data,
            out,
            Budget.parse(budget),
            config=config,
            changes=tuple(overrides(settings, items)),
            space=space,
            trials=trials,
            workers=workers,
            refits=not no_refit,
            command=shlex.join(["twotower", *sys.argv[1:]]),
            on_message=lambda text: print_lines(text, to=progress),
        )
    except KeyboardInterrupt as stop:
        said = str(stop) if isinstance(stop, Interrupted) else "interrupted"
        print_line(f"twotower: {said}; run the same command again to resume", to=messages)
        raise typer.Exit(130) from stop
    if as_json:
        print_json(found.document)
        return
    console.print(found)
    print_lines(f"\nThe model is in {out}, the report of the search in {out / 'tune.html'}")
