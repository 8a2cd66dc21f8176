"""Commands to prepare for training: known data sets, feature suggestions, and the state of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from twotower.cli.console import print_json, print_lines, print_table
from twotower.cli.options import Command, ConfigFile, Data, Items, Json

commands = typer.Typer()


@commands.command(cls=Command)
def datasets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Data set to fetch.")] = None,
    as_json: Json = False,
) -> None:
    """List the known data sets, or fetch one and print its account."""
    from twotower.data.datasets import registry as known  # noqa: PLC0415

    if name is not None:
        data = known.load(name)
        if as_json:
            print_json(data.account.to_dict())
        else:
            print_lines(data.account)
        return
    rows = known.available()
    if as_json:
        print_json(rows)
        return
    shown = [
        (row["name"], row["description"], row["size"], row["terms"], "yes" if row["cached"] else "no") for row in rows
    ]
    print_table(("name", "description", "size", "terms", "downloaded"), shown, "Data sets")


@commands.command(cls=Command)
def features(
    data: Data,
    items: Items = None,
    queries: Annotated[str | None, typer.Option("--queries", metavar="FILE", help="File with query features.")] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Suggest a feature kind for each column of the tables and interactions, with reasons, as YAML to paste."""
    from twotower import run  # noqa: PLC0415
    from twotower.config.run import Config  # noqa: PLC0415
    from twotower.features.suggest import as_yaml  # noqa: PLC0415

    found = run.propose_features(data, Config.load(config).data, items=items, queries=queries)
    if as_json:
        print_json({side: [one.to_dict() for one in columns] for side, columns in found.items()})
        return
    for side, columns in found.items():
        title = "interactions (request context)" if side == "context" else f"{side} table"
        rows = [
            (
                one.column,
                "-" if one.declared is None else one.declared.kind,
                one.why,
                "" if one.distinct is None else f"{one.distinct:,}",
                f"{one.missing:.1%}",
            )
            for one in columns
        ]
        print_table(("column", "kind", "why", "distinct", "missing"), rows, title)
    print_lines(f"\nAs settings; adjust them as needed:\n\n{as_yaml(found)}")


@commands.command(cls=Command)
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, threads, memory and missing extras."""
    from twotower.cli.doctor import examine  # noqa: PLC0415

    found = examine()
    if as_json:
        print_json(found)
        return
    for section, rows in found.items():
        print_table(("property", "value"), [(name, str(value)) for name, value in rows.items()], section)
