"""Report section on the popularity dial: the trade-off between accuracy and discovery for one model."""

from __future__ import annotations

import math
from typing import Any

from twotower.analysis.report.figures import Point, labelled_points
from twotower.analysis.report.markup import Html, h
from twotower.analysis.report.tables import table

Document = dict[str, Any]


def dial(document: Document) -> Html | None:
    """Plot recall against coverage and against tail recall for each dial setting."""
    curve = document.get("dial")
    if not curve or len(curve["points"]) < 2:
        return None
    k, points = curve["k"], curve["points"]
    return h(
        "div",
        h(
            "p",
            "One model, no retraining: the dial b adds (b - 1) log p(item) to the score at serving time. At 1 the "
            "model answers as trained; at 0 popularity is removed from the score.",
        ),
        _against(curve, "coverage", f"coverage@{k} (% of the catalog in at least one top-{k} list)"),
        _against(curve, "tail_recall", f"Recall@{k} of the targets in the tail third of the interactions"),
        _table(points, k),
        h("p", "Set it with twotower recommend --popularity 0.5 or recommend(..., popularity=0.5).", class_="note"),
    )


def _against(curve: dict[str, Any], name: str, axis: str) -> Html | None:
    """Plot recall against one measure, or return None if a value is missing (such as a tail without targets)."""
    k, points = curve["k"], curve["points"]
    if any(_missing(point[name]) or _missing(point["recall"]) for point in points):
        return None
    unit, what = (100.0, "coverage") if name == "coverage" else (1.0, "recall in the tail")
    last = points[-1]["popularity"]
    shown = [
        Point(
            f"b = {point['popularity']:g}",
            unit * point[name],
            point["recall"],
            "best" if point["popularity"] == last else "same",
        )
        for point in points
    ]
    return labelled_points(
        f"Recall@{k} against {what}",
        "; ".join(f"{point.name}: {point.x:.3g}, recall {point.y:.3f}" for point in shown),
        shown,
        x_axis=axis,
        y_axis=f"Recall@{k} (share of targets found)",
        most=(unit, 1.0),
        connected=True,
        caption="Each point is one setting b of the same model; the filled point is the model as trained.",
    )


def _table(points: list[dict[str, float]], k: int) -> Html:
    heads = ["b", f"Recall@{k}", "in the tail", f"NDCG@{k}", f"coverage@{k}", "interactions per listed item"]
    rows = [
        [
            f"{point['popularity']:g}",
            *("–" if _missing(point[name]) else f"{point[name]:.4f}" for name in ("recall", "tail_recall", "ndcg")),
            f"{100 * point['coverage']:.1f} %",
            f"{point['interactions']:,.0f}",
        ]
        for point in points
    ]
    return table(heads, rows, "The popularity dial")


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
