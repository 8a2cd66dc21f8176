"""The command that looks ahead: `twotower plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from twotower.errors import InputError
from twotower.terminal import Json, console, print_json

if TYPE_CHECKING:
    from twotower.planning import ScalePlan

commands = typer.Typer()

OPTIMIZERS, PRECISIONS = ("adam", "rowwise-adagrad"), ("float32", "bfloat16")
LAYOUTS, DEVICES = ("replicated", "row-wise", "column-wise", "table-wise"), ("cpu", "cuda")


@commands.command()
def plan(
    items: Annotated[float, typer.Option("--items", metavar="N", help="Items of the catalog, such as 1e9.")],
    dimension: Annotated[int, typer.Option("--dimension", metavar="D", help="Width of the embeddings.")] = 64,
    batch: Annotated[int, typer.Option("--batch", help="Rows of a step over all ranks.")] = 8192,
    ranks: Annotated[int, typer.Option("--ranks", metavar="W", help="Processes, one a device.")] = 1,
    queries: Annotated[float, typer.Option("--queries", help="Rows of the query table; 0 without one.")] = 0,
    history: Annotated[int, typer.Option("--history", min=0, metavar="L", help="Items of a history.")] = 50,
    sampled: Annotated[int, typer.Option("--sampled", min=0, help="Candidates beside those of the batch.")] = 1024,
    hidden: Annotated[str, typer.Option("--hidden", help="Widths of the query tower's layers, with commas.")] = "128",
    optimizer: Annotated[str, typer.Option("--optimizer", help="Of tables: adam or rowwise-adagrad.")] = "adam",
    precision: Annotated[str, typer.Option("--precision", help="Of tables: float32 or bfloat16.")] = "float32",
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="replicated: whole tables on every rank; row-wise, column-wise: a W-th on each; table-wise: on one.",
        ),
    ] = "replicated",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; its rates are measured here.")] = "cpu",
    device_memory: Annotated[
        float | None, typer.Option("--device-memory", metavar="GIB", help="Memory of each rank.")
    ] = None,
    link: Annotated[
        float | None, typer.Option("--link", metavar="GB/S", help="Between ranks; this machine's loopback unless told.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option("--latency", metavar="US", help="Of one exchange, microseconds.")
    ] = None,
    rates_file: Annotated[
        Path | None,
        typer.Option("--rates", metavar="FILE", help="What --json printed elsewhere; nothing is measured."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory of each rank, bytes exchanged and time of a step, before anything is trained."""
    for name, value, known in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("precision", precision, PRECISIONS),
        ("layout", layout, LAYOUTS),
        ("device", device, DEVICES),
    ):
        if value not in known:
            raise InputError(f"--{name}: expected {' or '.join(known)}, found {value!r}")
    if not all(width.strip().isdigit() for width in hidden.split(",") if width.strip()):
        raise InputError(f"--hidden: expected widths such as 256,128, found {hidden!r}")
    from twotower.planning import Workload, plan_scale, read_rates  # noqa: PLC0415

    workload = Workload(
        items=int(items),
        dimension=dimension,
        batch=batch,
        ranks=ranks,
        queries=int(queries),
        history=history,
        sampled=sampled,
        hidden=tuple(int(width) for width in hidden.split(",") if width.strip()),
        optimizer=optimizer,  # type: ignore[arg-type]  # checked above
        precision=precision,  # type: ignore[arg-type]
        layout=layout,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
    )
    sent, waited = None if link is None else link * 1e9, None if latency is None else latency * 1e-6
    if rates_file is None:
        from twotower.measuring_rates import measure_rates  # noqa: PLC0415  # torch

        rates = measure_rates(workload, link=sent, latency=waited)
    else:
        rates = read_rates(rates_file)
        rates = replace(
            rates, link=rates.link if sent is None else sent, latency=rates.latency if waited is None else waited
        )
    found = plan_scale(workload, rates, None if device_memory is None else device_memory * 2**30)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found: ScalePlan) -> None:
    from twotower.planning import HELD  # noqa: PLC0415  # as above

    for title, parts, scale, unit in (
        ("Memory of a rank in a training step", found.memory, 2**30, "GiB"),
        ("Sent by a rank in a step", found.exchanged, 1e6, "MB"),
        ("Time of a step", found.seconds, 1e-3, "ms"),
    ):
        if not parts:
            continue
        table = Table("what", unit, title=title, title_justify="left")
        for name, value in sorted(parts.items(), key=lambda part: -part[1]):
            table.add_row(name, f"{value / scale:,.2f}")
        table.add_row("together", f"{sum(parts.values()) / scale:,.2f}")
        console.print(table)
    rows = found.workload.batch / found.step
    console.print(f"{rows:,.0f} rows a second over all ranks; bottleneck: {found.bottleneck}")
    added = sum(found.ranking.values()) / 2**30
    console.print(
        f"A ranking of the whole catalog (validation, test) needs {added:,.1f} GiB beside what is held throughout "
        f"({', '.join(HELD)}), in place of a step's."
    )
    console.print(
        f"A checkpoint written in the background copies {found.checkpoint / 2**30:,.1f} GiB into main memory "
        "(training.checkpoint_in_background=false: none; training waits)."
    )
    if found.device_memory is not None:
        there, needed = (
            found.device_memory / 2**30,
            {name: f"{value / 2**30:,.1f}" for name, value in found.moments.items()},
        )
        verdict = "fits" if found.fits else "does NOT fit"
        console.print(
            f"In all {needed['step']} GiB in a step, {needed['ranking']} in a ranking, of {there:,.1f}: {verdict}"
        )
