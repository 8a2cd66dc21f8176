"""Report sections on the training runs: learning curves, time and memory."""

from __future__ import annotations

import statistics
from typing import Any

from twotower.analysis.report import story
from twotower.analysis.report.figures import Curve, IntervalRow, ends, interval_rows, small_multiples
from twotower.analysis.report.markup import Html, h
from twotower.analysis.report.tables import table

Document = dict[str, Any]


def learning(document: Document) -> Html | None:
    """Plot the validation metric after each epoch."""
    metric, kinds = document["settings"]["training"]["metric"], story.verdicts(document)
    curves = []
    for model in document["models"]:
        by_epoch: dict[int, list[float]] = {}
        for run in model["runs"]:
            for row in run["history"]:
                if metric in row:
                    by_epoch.setdefault(int(row["epoch"]) + 1, []).append(row[metric])
        points = [
            (float(epoch), statistics.fmean(found), min(found), max(found)) for epoch, found in sorted(by_epoch.items())
        ]
        if points:
            curves.append(Curve(model["name"], points, kinds[model["name"]]))
    if not curves or max(len(curve.points) for curve in curves) < 2:
        return None
    last = max(int(point[0]) for curve in curves for point in curve.points)
    step = max(-(-(last - 1) // 4), 1)
    return small_multiples(
        f"Validation {metric} during training",
        "; ".join(f"{curve.name}: {ends(curve)}" for curve in curves),
        curves,
        "epoch",
        f"validation {metric}",
        x_ticks=[(epoch, str(epoch)) for epoch in range(1, last + 1, step)],
        caption=f"{'Mean over seeds; band: range over seeds. ' if len(document['seeds']) > 1 else ''}"
        f"{'Grey: the other models. ' if len(curves) > 1 else ''}The test set is not used here.",
    )


def cost(document: Document) -> Html | None:
    """Show time and memory of each training run."""
    models = [model for model in document["models"] if story.processor_time(model) is not None]
    if not models:
        return None
    kinds = story.verdicts(document)
    order = sorted(models, key=lambda model: story.processor_time(model) or 0.0)
    rows, cells = [], []
    for model in order:
        times = [run["cpu_seconds"] for run in model["runs"]]
        middle = statistics.median(times)
        rows.append(
            IntervalRow(model["name"], middle, min(times), max(times), kinds[model["name"]], story.duration(middle))
        )
        memory = [run["peak_memory"] / 2**20 for run in model["runs"] if run["peak_memory"]]
        cells.append(
            [
                model["name"],
                f"{middle:,.0f}",
                f"{middle / (story.processor_time(order[0]) or middle):.2f}",
                f"{statistics.median(run['seconds'] for run in model['runs']):,.0f}",
                f"{statistics.median(memory):,.0f}" if memory else "–",
                f"{statistics.median(run['epochs'] for run in model['runs']):.0f}",
            ]
        )
    heads = ["objective", "CPU s", "× least", "wall s", "peak memory, MiB", "epochs"]
    note = (
        "Medians over seeds. Times cover training only; peak memory is that of the whole process, data and libraries "
        "included."
    )
    if most := story.overlapped(document):
        note += f" Up to {most} runs were trained concurrently: compare CPU times, not wall times."
    parts: list[Html] = []
    if len(rows) > 1:
        parts.append(
            interval_rows(
                "CPU time of one training run",
                "; ".join(f"{row.name} {row.told}" for row in rows),
                rows,
                "CPU seconds, all threads",
                zero=True,
                caption="Median over seeds; line: range over seeds." if len(document["seeds"]) > 1 else None,
            )
        )
    return h("div", parts, table(heads, cells, "Time and memory"), h("p", note, class_="note"))
