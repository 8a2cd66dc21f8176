"""The command that plans resources: `twotower plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twotower.cli.console import console, print_json, print_table
from twotower.cli.options import Command, Json
from twotower.errors import InputError

if TYPE_CHECKING:
    from twotower.training.scale_plan import ScalePlan


commands = typer.Typer()

OPTIMIZERS, PRECISIONS = ("adam", "rowwise-adagrad"), ("float32", "bfloat16")
LAYOUTS, DEVICES = ("replicated", "row-wise", "table-wise", "auto"), ("cpu", "cuda")


@commands.command(cls=Command)
def plan(
    items: Annotated[float, typer.Option("--items", metavar="N", help="Items in the catalog, e.g. 1e9.")],
    dimension: Annotated[int, typer.Option("--dimension", metavar="D", help="Embedding dimension.")] = 64,
    batch: Annotated[int, typer.Option("--batch", help="Rows per step over all ranks.")] = 8192,
    ranks: Annotated[int, typer.Option("--ranks", metavar="W", help="Number of ranks, one per device.")] = 1,
    queries: Annotated[float, typer.Option("--queries", help="Rows of the query table; 0 for none.")] = 0,
    history: Annotated[int, typer.Option("--history", min=0, metavar="L", help="Items per history.")] = 50,
    sampled: Annotated[
        int, typer.Option("--sampled", min=0, help="Sampled candidates, in addition to in-batch ones.")
    ] = 1024,
    hidden: Annotated[str, typer.Option("--hidden", help="Query tower layer widths, comma-separated.")] = "128",
    nested: Annotated[
        str, typer.Option("--nested", metavar="A,B", help="Widths of item_tower.nested, comma-separated.")
    ] = "",
    optimizer: Annotated[str, typer.Option("--optimizer", help="For tables: adam or rowwise-adagrad.")] = "adam",
    precision: Annotated[str, typer.Option("--precision", help="For tables: float32 or bfloat16.")] = "float32",
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="replicated: whole tables on every rank; row-wise: 1/W of the rows on each; table-wise: each table "
            "on one rank; auto: as TorchRec's planner decides (needs the extra 'distributed').",
        ),
    ] = "replicated",
    per_machine: Annotated[
        int, typer.Option("--per-machine", min=1, help="Ranks per machine, for TorchRec's planner.")
    ] = 8,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; rates are measured on this machine.")] = "cpu",
    device_memory: Annotated[
        float | None, typer.Option("--device-memory", metavar="GIB", help="Memory per rank.")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option("--link", metavar="GB/S", help="Bandwidth between ranks; default: this machine's loopback."),
    ] = None,
    latency: Annotated[
        float | None, typer.Option("--latency", metavar="US", help="Latency of one exchange, in microseconds.")
    ] = None,
    rates_file: Annotated[
        Path | None,
        typer.Option("--rates", metavar="FILE", help="Rates from a saved --json output; nothing is measured."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory per rank, bytes exchanged and step time before training.

    Features and trained text encoders are not included; `twotower train` prints a memory plan that includes them.
    """
    for name, value, known in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("precision", precision, PRECISIONS),
        ("layout", layout, LAYOUTS),
        ("device", device, DEVICES),
    ):
        if value not in known:
            raise InputError(f"--{name}: expected {' or '.join(known)}, found {value!r}")
    layers, widths = _widths(hidden, "--hidden"), _widths(nested, "--nested")
    from twotower.training.scale_plan import Workload, place_by_planner, plan_scale, read_rates  # noqa: PLC0415

    workload = Workload(
        items=int(items),
        dimension=dimension,
        batch=batch,
        ranks=ranks,
        queries=int(queries),
        history=history,
        sampled=sampled,
        hidden=layers,
        nested=widths,
        optimizer=optimizer,  # type: ignore[arg-type]  # checked above
        precision=precision,  # type: ignore[arg-type]
        layout="replicated" if layout == "auto" else layout,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
    )
    capacity = None if device_memory is None else device_memory * 2**30
    sent, waited = None if link is None else link * 1e9, None if latency is None else latency * 1e-6
    if rates_file is None:
        from twotower.training.machine_rates import measure_rates  # noqa: PLC0415  # torch

        rates = measure_rates(workload, link=sent, latency=waited)
    else:
        rates = read_rates(rates_file)
        rates = replace(
            rates, link=rates.link if sent is None else sent, latency=rates.latency if waited is None else waited
        )
    planned = None
    if layout == "auto" and ranks > 1:
        workload, planned = place_by_planner(workload, per_machine=per_machine, link=sent, device_memory=capacity)
    found = replace(plan_scale(workload, rates, capacity), planned=planned)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _widths(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{option}: expected widths such as 64,128, found {text!r}")
    return tuple(map(int, parts))


def _show(found: ScalePlan) -> None:
    from twotower.training.scale_plan import HELD  # noqa: PLC0415  # as above

    if found.planned is not None:
        rows = [
            (name, one.way, f"{one.bytes_per_rank / 2**30:,.2f}", f"{one.milliseconds:,.2f}")
            for name, one in found.planned.items()
        ]
        print_table(("table", "placement", "GiB per rank", "ms"), rows, "TorchRec's plan, with its own estimates")
    for title, parts, scale, unit in (
        ("Memory per rank in a training step", found.memory, 2**30, "GiB"),
        ("Sent per rank in a step", found.exchanged, 1e6, "MB"),
        ("Time per step", found.seconds, 1e-3, "ms"),
    ):
        if not parts:
            continue
        lines = [*sorted(parts.items(), key=lambda part: -part[1]), ("total", sum(parts.values()))]
        print_table(("part", unit), [(name, f"{value / scale:,.2f}") for name, value in lines], title)
    speed = found.workload.batch / found.step
    console.print(f"{speed:,.0f} rows per second over all ranks; bottleneck: {found.bottleneck}")
    console.print(
        "Not in this estimate: features and trained text encoders. `twotower train` prints a memory plan that includes "
        "them before the first step."
    )
    added = sum(found.ranking.values()) / 2**30
    console.print(
        f"Ranking the whole catalog (validation, test) needs {added:,.1f} GiB on top of what is always in memory "
        f"({', '.join(HELD)}); the rest of a training step's memory is not needed during ranking."
    )
    console.print(
        f"A checkpoint written in the background copies {found.checkpoint / 2**30:,.1f} GiB into main memory "
        "(none with training.checkpoint_in_background=false; training then waits)."
    )
    if found.device_memory is not None:
        available, needed = (
            found.device_memory / 2**30,
            {name: f"{value / 2**30:,.1f}" for name, value in found.moments.items()},
        )
        verdict = "fits" if found.fits else "does NOT fit"
        console.print(
            f"Needed: {needed['step']} GiB in a training step, {needed['ranking']} GiB during ranking; available: "
            f"{available:,.1f} GiB: {verdict}"
        )
