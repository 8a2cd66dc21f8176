"""Commands that derive files from a trained model: an index over its items, an export of its query tower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from twotower.cli.console import print_json, print_line
from twotower.cli.options import Command, Json, Run
from twotower.cli.ranks import ranks_of
from twotower.errors import InputError, counted

commands = typer.Typer()


@commands.command(cls=Command)
def index(
    directory: Run,
    kind: Annotated[str, typer.Option("--kind", help="exact, hnsw, ivfpq, int8, binary or pgvector.")],
    min_recall: Annotated[
        float | None, typer.Option("--min-recall", help="Reject an index with a lower recall of the exact top K.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="K at which recall is measured.")] = 100,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Known queries to measure recall on.")] = 500,
    width: Annotated[
        int | None,
        typer.Option("--width", min=1, help="Width of the indexed vectors, one of item_tower.nested; default: D."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=NUMBER", help="Index setting, e.g. links=48; may be repeated."),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Database URL for pgvector; default: PGHOST and related variables.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an index over a model's items, measure its recall, and save it in the model folder."""
    from twotower.serving import build_stored_index  # noqa: PLC0415

    settings: dict[str, Any] = dict(_setting(text) for text in overrides or [])
    if url is not None:
        settings["url"] = url
    with ranks_of(directory) as team:
        report = build_stored_index(
            directory, kind, k=k, min_recall=min_recall, queries=queries, settings=settings, width=width, team=team
        )
    if not team.ranks.is_first:
        return
    if as_json:
        print_json({"kind": "exact"} if report is None else report.to_dict())
    elif report is None:
        print_line("Exact search needs no index; any approximate index has been removed.")
    else:
        given = report.settings.get("width")
        narrow = "" if given is None else f"; width {given}, {report.settings['fetch']:g} times the candidates"
        recall = ", ".join(f"{value:.4f} at {name}" for name, value in report.recall.items())
        print_line(
            f"{report.kind}: {counted(report.num_items, 'item')} in {report.build_seconds:.1f} s, "
            f"{report.bytes / 2**20:.1f} MiB; "
            f"recall of the exact top {report.k} on {counted(report.num_queries, 'query', 'queries')}: "
            f"{recall}; effort {report.settings['effort']}{narrow}"
        )


@commands.command(cls=Command)
def export(
    directory: Run,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    format_: Annotated[str, typer.Option("--format", help="onnx or torch.")] = "onnx",
    as_json: Json = False,
) -> None:
    """Export the query tower for ONNX Runtime or torch.export, and check it against the original."""
    from twotower.serving.export import export_query_tower  # noqa: PLC0415

    report = export_query_tower(directory, out, format_)
    if as_json:
        print_json(report)
    else:
        print_line(
            f"{report['file']}: inputs {', '.join(report['inputs'])}; largest difference from the original "
            f"{report['largest_difference']:.1e}"
        )


def _setting(text: str) -> tuple[str, int]:
    key, equals, value = text.partition("=")
    if not equals or not value.strip().isdigit():
        raise InputError(f"--set {text}: expected name=number, such as links=48")
    return key.strip(), int(value)
