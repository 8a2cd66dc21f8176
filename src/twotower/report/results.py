"""Report sections on the results: metrics, differences, popularity deciles, coverage, slices.

The module also has the section on the popularity dial (the trade-off between accuracy and discovery for one model), and
the sections on the training runs (learning curves, time and memory).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from twotower.report import findings
from twotower.report.figures import (
    Curve,
    IntervalRow,
    Point,
    interval_rows,
    labelled_points,
    mark,
    minus,
    small_multiples,
)
from twotower.report.html import Html, h, join, table

Document = dict[str, Any]

#: Maximum number of slices in one table.
_SLICES = 8
#: With more than _MANY points, those below the share _FAR of the best are omitted, because they would compress the
#: rest.
_MANY, _FAR = 5, 0.75
#: Verdict in `results.json` -> text on the page.
_VERDICTS = {
    "not told apart": "no significant difference",
    "ahead": "significantly better",
    "behind": "significantly worse",
}


def overall(document: Document) -> Html:
    """Show each model's headline metric with its interval, and the table of all metrics."""
    metric, kinds = document["metric"], findings.verdicts(document)
    rows = [_row(entry, metric, kinds[entry["name"]]) for entry in document["models"]]
    rows += [_row(entry, metric, "baseline") for entry in _sorted(document["baselines"], metric)]
    many = len(document["seeds"]) > 1
    chart = interval_rows(
        f"{metric} on the test queries",
        rows,
        f"{metric} (0 to 1, higher is better)",
        caption=join(
            [
                f"Point: mean over {document['evaluation']['num_queries']:,} queries",
                f" and {len(document['seeds'])} seeds; line: 95 % interval over queries; small ticks: single seeds. "
                if many
                else "; line: 95 % interval over queries. ",
                "Intervals may overlap even if two objectives differ significantly: all models answer the same "
                "queries, and the next figure compares them query by query."
                if len(document["models"]) > 1
                else None,
            ]
        ),
    )
    return h("div", chart, legend(kinds, bool(document["baselines"])), _metrics(document))


def differences(document: Document) -> Html | None:
    """Show the paired difference between each objective and the best."""
    tests = findings.family(document, "all")
    if tests is None:
        return None
    best = document["models"][0]
    scale = 100.0 / best["values"][tests["metric"]]["mean"]
    kinds = findings.verdicts(document)
    by_name = {one["name"]: one for one in tests["contests"]}
    rows, cells = [], []
    for model in document["models"][1:]:
        one = by_name[model["name"]]
        low, high = (None if end is None else end * scale for end in (one["low"], one["high"]))
        text = minus(f"{one['difference'] * scale:+.1f} %")
        rows.append(IntervalRow(model["name"], one["difference"] * scale, low, high, kinds[model["name"]], text))
        spread = "–" if one["seed_error"] is None else f"{one['seed_error'] * scale:.1f} %"
        interval = "–" if low is None or high is None else minus(f"{low:+.1f} to {high:+.1f} %")
        effect = "–" if one["effect_size"] is None else minus(f"{one['effect_size']:+.2f}")
        verdict = _VERDICTS.get(one["verdict"], one["verdict"])
        cells.append([model["name"], text, interval, spread, findings.p_value(one["adjusted"]), effect, verdict])
    chart = interval_rows(
        f"Difference from {best['name']}",
        rows,
        f"difference in {tests['metric']}, in % of {best['name']}",
        zero=True,
        caption="Mean paired difference over queries, averaged over seeds; line: 95 % interval over queries.",
    )
    note = (
        "p: paired bootstrap over queries, Holm-adjusted for all comparisons in the table. Effect size: mean "
        "difference divided by its standard deviation over queries. Seed error: standard error over seeds, pooled over "
        "objectives. A difference is significant if p is below 0.05 and it is larger than two seed errors."
    )
    heads = ["objective", "difference", "95 % interval", "seed error", "p (Holm)", "effect size", "verdict"]
    return h(
        "div",
        chart,
        table(heads, cells, f"Differences from {best['name']} in {tests['metric']}"),
        h("p", note, class_="note"),
    )


#: The plots of a sweep: key of the points, title, vertical axis, caption.
_SWEPT = (
    ("quality", "NDCG@{k}", "NDCG@{k}", "All test queries."),
    (
        "tail",
        "The tail",
        "Recall@{k} in the tail",
        "Targets among the rarest items, which have a third of the training interactions.",
    ),
    ("never_seen", "Items never seen", "Recall@{k}", "Targets without a training row."),
    (
        "never_seen_listed",
        "Never-seen items among the recommendations",
        "share of the top {k}",
        "Share of the list positions taken by never-seen items. An objective that never draws these items as "
        "negatives does not lower their scores.",
    ),
)


def sweep(document: Document) -> Html | None:
    """Plot quality, tail and never-seen items against the value of a swept setting."""
    found = document.get("sweep")
    if not found:
        return None
    setting, k, curves = found["setting"], found["k"], found["curves"]
    kinds = findings.verdicts(document)
    values = [point["value"] for point in curves[0]["points"]]
    figures, shown = [], []
    for key, title, axis, caption in _SWEPT:
        panels = [
            Curve(
                one["objective"],
                [(float(place), *_swept(point[key])) for place, point in enumerate(one["points"])],
                "best" if any(kinds.get(point["model"]) == "best" for point in one["points"]) else "other",
            )
            for one in curves
        ]
        if any(point[1] is None for panel in panels for point in panel.points):
            continue
        shown.append((key, title.format(k=k)))
        figures.append(
            small_multiples(
                f"{title.format(k=k)} by {setting}",
                panels,
                f"{setting} (values evenly spaced)",
                axis.format(k=k),
                x_ticks=[(float(place), f"{value:,g}") for place, value in enumerate(values)],
                floor=0.0,
                caption=f"{caption} Band: 95 % interval over queries."
                if key != "never_seen_listed"
                else f"{caption} First seed; {found['never_seen_items']:,} items have no training row.",
            )
        )
    rows = [
        [point["model"], *(f"{_swept(point[key])[0]:.4f}" for key, _ in shown)]
        for one in curves
        for point in one["points"]
    ]
    return h("div", figures, table(["", *(title for _, title in shown)], rows, f"By {setting}"))


def _swept(found: dict[str, Any] | float | None) -> tuple[float | None, float | None, float | None]:
    """Return mean, low and high of a point of a sweep."""
    if isinstance(found, dict):
        return found["mean"], found["low"], found["high"]
    return found, None, None


def deciles(document: Document) -> Html | None:
    """Plot recall by popularity of the target."""
    names = document["evaluation"]["slice_groups"].get("deciles", [])
    metric, kinds = document["tail_metric"], findings.verdicts(document)
    curves = []
    for entry in [*document["models"], *document["baselines"]]:
        points = []
        for place, name in enumerate(names):
            found = findings.value(entry, metric, name)
            points.append(
                (place + 1.0, *((found["mean"], found["low"], found["high"]) if found else (None, None, None)))
            )
        kind = kinds.get(entry["name"], "baseline")
        if any(point[1] is not None for point in points):
            curves.append(Curve(entry["name"], points, kind))
    if not curves:
        return None
    sizes = document["evaluation"]["slice_sizes"]
    first, last = sizes[names[0]]["items"], sizes[names[-1]]["items"]
    chart = small_multiples(
        f"{metric} by popularity of the target",
        curves,
        "popularity decile of the target (1 most popular, 10 rarest)",
        f"{metric} (share of targets found)",
        x_ticks=[(1, "1"), (5, "5"), (10, "10")],
        floor=0.0,
        caption=f"Each decile has a tenth of the training interactions: {first:,} items in the first, {last:,} in the "
        "last. Band: 95 % interval over queries. Grey: the other models.",
    )
    rows = [
        [curve.name, *("–" if point[1] is None else f"{point[1]:.3f}" for point in curve.points)] for curve in curves
    ]
    return h("div", chart, table(["", *(str(place + 1) for place in range(len(names)))], rows, f"{metric} by decile"))


def coverage(document: Document) -> Html | None:
    """Plot accuracy against the share of the catalog that appears in any list."""
    k, kinds = document["metric"].split("@")[1], findings.verdicts(document)
    points = []
    # Baselines are far below trained models and would compress the scale.
    for entry in [*document["models"], *(document["baselines"] if len(document["models"]) < 3 else [])]:
        x, y = findings.value(entry, f"coverage@{k}"), findings.value(entry, document["metric"])
        if x and y:
            x_range = (100 * min(x["by_seed"]), 100 * max(x["by_seed"])) if len(x["by_seed"]) > 1 else None
            y_range = None if y["low"] is None else (y["low"], y["high"])
            points.append(
                Point(entry["name"], 100 * x["mean"], y["mean"], kinds.get(entry["name"], "baseline"), x_range, y_range)
            )
    if len(points) < 2:
        return None
    best = max(point.y for point in points)
    far = [point for point in points if point.y < _FAR * best] if len(points) > _MANY else []
    points = [point for point in points if point not in far]
    left_out = ", ".join(f"{point.name} ({point.x:.0f} % of the catalog, {findings.number(point.y)})" for point in far)
    return labelled_points(
        "Accuracy against coverage",
        "; ".join(f"{point.name}: {point.x:.0f} % of the catalog, {findings.number(point.y)}" for point in points),
        points,
        x_axis=f"coverage@{k} (% of the catalog in at least one top-{k} list)",
        y_axis=document["metric"],
        most=(100.0, 1.0),
        caption="Higher is more accurate; further right covers more of the catalog. Vertical lines: 95 % interval over "
        "queries; horizontal: range over seeds." + (f" Omitted, far below the others: {left_out}." if far else ""),
    )


def widths(document: Document) -> Html | None:
    """Tabulate the metrics of nested embeddings at each of their widths."""
    found = document["evaluation"].get("widths")
    if not found:
        return None
    metric, rows = document["tail_metric"], found["rows"]
    full = rows[-1]["values"][metric]
    shown = []
    for row in rows:
        values = [row["values"][name] for name in found["metrics"]]
        share = "–" if not full or row["values"][metric] is None else f"{100 * row['values'][metric] / full:.1f} %"
        shown.append([str(row["width"]), *("–" if value is None else f"{value:.4f}" for value in values), share])
    return h(
        "div",
        h(
            "p",
            "Metrics of the model when it ranks by the first coordinates of its embeddings (item_tower.nested). The "
            f"other sections use all {rows[-1]['width']} coordinates.",
        ),
        table(["width", *found["metrics"], f"of the full {metric}"], shown, "By width"),
        h("p", "To build an index at a smaller width: twotower index RUN --kind hnsw --width 64.", class_="note"),
    )


def slices(document: Document) -> Html | None:
    """Tabulate the slices that the user named, and cold items and queries if any."""
    metric, sizes = document["tail_metric"], document["evaluation"]["slice_sizes"]
    parts = []
    for group, names in document["evaluation"]["slice_groups"].items():
        if group in ("thirds", "deciles") or (
            group == "cold" and not any(sizes[name]["targets"] for name in names[::2])
        ):
            continue
        shown = [name for name in names if sizes.get(name, {}).get("targets")]
        # Several tables that fit the page, because a wider table would be cut off in print.
        tables = [
            _slice_table(document, group, shown[start : start + _SLICES]) for start in range(0, len(shown), _SLICES)
        ]
        if tables:
            parts.append(h("div", h("h3", group), tables))
    return h("div", h("p", f"{metric} on the targets of each slice."), parts) if parts else None


def _slice_table(document: Document, group: str, shown: Sequence[str]) -> Html:
    metric, sizes = document["tail_metric"], document["evaluation"]["slice_sizes"]
    rows = []
    for entry in [*document["models"], *document["baselines"]]:
        found = [findings.value(entry, metric, name) for name in shown]
        rows.append([entry["name"], *("–" if one is None else f"{one['mean']:.3f}" for one in found)])
    heads = ["", *(name.removeprefix(f"{group}=").removeprefix(f"{group}: ") for name in shown)]
    counts = ["targets", *(f"{sizes[name]['targets']:,}" for name in shown)]
    return table(heads, [*rows, counts], f"{metric} by {group}")


def reward(document: Document) -> Html | None:
    """Tabulate the rewards estimated from a log of the items shown, for each K; return None without such a log."""
    found = document["evaluation"].get("off_policy")
    if not found:
        return None
    logged, parts = found["logged"], []
    for k in document["evaluation"]["protocol"]["ks"]:
        rows = [["the log itself", "mean", *_estimated(logged), ""]]
        for name, by_k in found["rows"].items():
            one = by_k[str(k)]
            if one is None:
                rows.append([name, "none", "–", "–", "0"])
                continue
            rows += [
                [name, estimator, *_estimated(interval), f"{one['effective_size']:,.0f}"]
                for estimator, interval in one["estimates"].items()
            ]
        parts.append(table(["", "estimator", "estimate", "95 % interval", "effective rows"], rows, f"Reward @{k}"))
    notes = [found["remark"]]
    if found["clip"] is not None:
        notes.append(f"Weights above {found['clip']:g} were clipped, which biases the estimates.")
    if any(None in by_k.values() for by_k in found["rows"].values()):
        notes.append(
            "There is no estimate for a ranker if the log shows none of the items that it would have shown (0 "
            "effective rows)."
        )
    return h("div", parts, [h("p", note[0].upper() + note[1:], class_="note") for note in notes])


def _estimated(interval: dict[str, Any]) -> list[str]:
    shown = findings.number(interval["mean"])
    if interval["low"] is None:
        return [shown, "–"]
    return [shown, f"{findings.number(interval['low'])} to {findings.number(interval['high'])}"]


def legend(kinds: dict[str, str], baselines: bool) -> Html:
    """Explain each marker that occurs in the figures."""
    words = {
        "alone": "this model",
        "best": "highest mean",
        "top": "highest mean of the objectives, below a baseline",
        "same": "not significantly different from the highest mean",
        "ahead": "significantly better",
        "behind": "significantly worse",
        "baseline": "baseline",
    }
    used = [kind for kind in words if kind in kinds.values() or (kind == "baseline" and baselines)]
    if used in (["alone"], ["best"], []):
        return h("div")
    return h(
        "ul",
        [
            h(
                "li",
                h("svg", mark(8, 8, kind), width=16, height=16, viewBox="0 0 16 16", aria_hidden="true"),
                words[kind],
            )
            for kind in used
        ],
        class_="legend",
    )


def _row(entry: dict[str, Any], metric: str, kind: str) -> IntervalRow:
    found = entry["values"][metric]
    seeds = found["by_seed"] if len(found["by_seed"]) > 1 else ()
    return IntervalRow(
        entry["name"], found["mean"], found["low"], found["high"], kind, findings.number(found["mean"]), seeds
    )


def _metrics(document: Document) -> Html:
    k = document["metric"].split("@")[1]
    tail = document["tail_metric"]
    columns: list[tuple[str, str, str | None, str]] = [
        ("NDCG", f"NDCG@{k}", None, ".4f"),
        ("Recall", f"Recall@{k}", None, ".4f"),
        ("MRR", f"MRR@{k}", None, ".4f"),
        ("head", tail, "head", ".3f"),
        ("mid", tail, "mid", ".3f"),
        ("tail", tail, "tail", ".3f"),
        ("coverage", f"coverage@{k}", None, ".3f"),
        ("Gini", f"Gini@{k}", None, ".3f"),
        ("novelty", f"novelty@{k}", None, ".2f"),
        ("diversity", f"diversity@{k}", None, ".3f"),
    ]
    entries = [*document["models"], *_sorted(document["baselines"], document["metric"])]
    columns = [column for column in columns if any(findings.value(entry, column[1], column[2]) for entry in entries)]
    rows = []
    for entry in entries:
        found = [(findings.value(entry, metric, part), form) for _, metric, part, form in columns]
        rows.append([entry["name"], *("–" if one is None else format(one["mean"], form) for one, form in found)])
    return h(
        "div",
        table(["", *(column[0] for column in columns)], rows, "All metrics"),
        h(
            "p",
            f"All at K = {k}. Head, mid, tail: {tail} on the targets in that third of the training interactions. "
            "Coverage: share of the catalog that appears in at least one list. Gini: inequality of exposure, 0 to 1. "
            "Novelty: mean self-information of a listed item, in bits. Diversity: mean distance between the items of a "
            "list.",
            class_="note",
        ),
    )


def _sorted(baselines: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    known = [entry for entry in baselines if findings.value(entry, metric)]
    return sorted(known, key=lambda entry: -entry["values"][metric]["mean"])


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
    """Plot recall against one measure, or return None if a value is missing (a tail without targets has no recall)."""
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


def learning(document: Document) -> Html | None:
    """Plot the validation metric after each epoch."""
    metric, kinds = document["settings"]["training"]["metric"], findings.verdicts(document)
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
        curves,
        "epoch",
        f"validation {metric}",
        x_ticks=[(epoch, str(epoch)) for epoch in range(1, last + 1, step)],
        caption=f"{'Mean over seeds; band: range over seeds. ' if len(document['seeds']) > 1 else ''}"
        f"{'Grey: the other models. ' if len(curves) > 1 else ''}The test set is not used here.",
    )


def cost(document: Document) -> Html | None:
    """Show time and memory of each training run."""
    models = [model for model in document["models"] if findings.processor_time(model) is not None]
    if not models:
        return None
    kinds = findings.verdicts(document)
    order = sorted(models, key=lambda model: findings.processor_time(model) or 0.0)
    rows, cells = [], []
    for model in order:
        times = [run["cpu_seconds"] for run in model["runs"] if run["cpu_seconds"]]
        middle = statistics.median(times)
        rows.append(
            IntervalRow(model["name"], middle, min(times), max(times), kinds[model["name"]], findings.duration(middle))
        )
        memory = [run["peak_memory"] / 2**20 for run in model["runs"] if run["peak_memory"]]
        cells.append(
            [
                model["name"],
                f"{middle:,.0f}",
                f"{middle / (findings.processor_time(order[0]) or middle):.2f}",
                f"{statistics.median(run['seconds'] for run in model['runs']):,.0f}",
                f"{statistics.median(memory):,.0f}" if memory else "–",
                f"{statistics.median(run['epochs'] for run in model['runs']):.0f}",
            ]
        )
    heads = ["objective", "CPU s", "× least", "wall s", "peak memory, MiB", "epochs"]
    note = (
        "Medians over seeds. Times cover training only; peak memory is for the whole process, including data and "
        "libraries."
    )
    if most := findings.overlapped(document):
        note += f" Up to {most} runs were trained concurrently: compare CPU times, not wall times."
    parts: list[Html] = []
    if len(rows) > 1:
        parts.append(
            interval_rows(
                "CPU time of one training run",
                rows,
                "CPU seconds, all threads",
                zero=True,
                caption="Median over seeds; line: range over seeds." if len(document["seeds"]) > 1 else None,
            )
        )
    return h("div", parts, table(heads, cells, "Time and memory"), h("p", note, class_="note"))
