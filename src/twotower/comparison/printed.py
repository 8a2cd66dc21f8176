"""A comparison as a table for the terminal, followed by the findings."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from twotower.analysis.report import story


def printed(document: dict[str, Any]) -> Group:
    """Build the table and the findings for a rich console."""
    metric, tail, kinds = document["metric"], document["tail_metric"], story.verdicts(document)
    tests = story.family(document, "all")
    contests = {one["name"]: one for one in (tests["contests"] if tests else [])}
    best = document["models"][0]["values"][metric]["mean"] or 1.0
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("objective", no_wrap=True)  # the longest name and these columns fit into 80 characters
    for title in (metric, "to best", "p (Holm)", "tail", "cpu s"):
        table.add_column(title, justify="right")
    for entry in [*document["models"], *document["baselines"]]:
        found, one = entry["values"][metric], contests.get(entry["name"])
        rare = story.value(entry, tail, "tail")
        time = story.processor_time(entry) if "runs" in entry else None
        table.add_row(
            entry["name"],
            story.number(found["mean"]),
            "-" if one is None else f"{100 * one['difference'] / best:+.1f} %",
            "-" if one is None or one["adjusted"] is None else f"{one['adjusted']:.3f}",
            "-" if rare is None else f"{rare['mean']:.3f}",
            "-" if time is None else f"{time:,.0f}",
            style="bold" if kinds.get(entry["name"]) == "best" else None,
        )
    evaluation = document["evaluation"]
    title = (
        f"{evaluation['num_queries']:,} queries, full catalog of {evaluation['num_items']:,} items, "
        f"{len(document['seeds'])} seed(s); tail: {tail} on the targets in the tail"
    )
    words = [*story.answer(document), *(f"note: {text}" for text in story.cautions(document))]
    return Group(title, table, *(f"* {text}" for text in words))
