"""The report of a search for settings: best value, importances, trials, and test metrics of the chosen model."""

from __future__ import annotations

import statistics
from typing import Any

from twotower.errors import counted
from twotower.report.figures import Curve, IntervalRow, Point, interval_rows, labelled_points, small_multiples
from twotower.report.html import Html, h, table
from twotower.report.page import ReportSection, page, source_name

Document = dict[str, Any]


def render_study(document: Document) -> str:
    """Render `tune.json` as one HTML page that opens offline."""
    title = "Which settings suit this data?"
    head = h(
        "header",
        h("p", f"Search · {source_name(document['source'])}", class_="kicker"),
        h("h1", title),
        h(
            "div",
            [h("p", text, class_=None if place else "lead") for place, text in enumerate(document["findings"])],
            class_="answer",
        ),
    )
    return page(document, f"{title} – {source_name(document['source'])}", head, SECTIONS)


def _ended(document: Document) -> list[dict[str, Any]]:
    return [one for one in document["trials"] if one["value"] is not None]


def curve(document: Document) -> Html | None:
    """Draw the best value so far over the trials, with the baselines."""
    ended = _ended(document)
    if not ended:
        return None
    metric, best, points = document["metric"], float("-inf"), []
    for place, one in enumerate(ended):
        best = max(best, one["value"])
        points.append((place + 1.0, best, None, None))
    curves = [
        Curve("best so far", points, "best"),
        Curve("each trial", [(place + 1.0, one["value"], None, None) for place, one in enumerate(ended)], "same"),
    ]
    curves += [
        Curve(name, [(1.0, found["value"], None, None), (float(len(ended)), found["value"], None, None)], "baseline")
        for name, found in document["baselines"].items()
    ]
    last = len(ended)
    marks = sorted({1, max(last // 2, 1), last})
    return small_multiples(
        f"Best {metric} on the validation queries",
        curves,
        "trial",
        metric,
        description=f"from {ended[0]['value']:.4f} to {best:.4f} in {last} trials",
        x_ticks=[(float(mark), str(mark)) for mark in marks],
        caption="Each panel shows the other curves in grey. The settings of the baselines were chosen on the same "
        "queries.",
    )


def mattered(document: Document) -> Html | None:
    """Show the importance of each parameter, and the best and the median result of each of its values."""
    found = document["importances"]
    if not found:
        return h("p", "Too few complete trials to say which parameters mattered; eight are needed.", class_="note")
    rows = [
        IntervalRow(name, share, None, None, "best" if place == 0 else "same", f"{100 * share:.0f} %")
        for place, (name, share) in enumerate(found.items())
    ]
    return h(
        "div",
        interval_rows(
            "Importance of the parameters",
            rows,
            "share of the variance (0 to 1)",
            zero=True,
            caption="fANOVA: share of the variance of the metric, from a random forest over the complete trials. "
            "Parameters that only some trials have appear only in the table.",
        ),
        table(["parameter", "value", "trials", "best", "median"], _by_value(document), "Values of the parameters"),
    )


def _parameters(document: Document) -> list[str]:
    """Return the names of the parameters, most important first."""
    return list(
        dict.fromkeys([*document["importances"], *(name for one in _ended(document) for name in one["params"])])
    )


def _by_value(document: Document) -> list[list[str | Html]]:
    rows: list[list[str | Html]] = []
    for name in _parameters(document):
        groups: dict[str, list[float]] = {}
        for one in _ended(document):
            if isinstance(value := one["params"].get(name), str):
                groups.setdefault(value, []).append(one["value"])
        for value, scores in sorted(groups.items(), key=lambda pair: -max(pair[1])):
            rows.append([name, value, str(len(scores)), f"{max(scores):.4f}", f"{statistics.median(scores):.4f}"])
    return rows


def ranges(document: Document) -> Html | None:
    """Plot the metric against each parameter that is a range of numbers."""
    made = []
    for name in _parameters(document):
        points = [
            Point(str(one["number"]), float(one["params"][name]), one["value"], "same")
            for one in _ended(document)
            if isinstance(one["params"].get(name), int | float)
        ]
        if len(points) > 1:
            made.append(
                labelled_points(
                    name,
                    f"{document['metric']} against {name}, by trial",
                    points,
                    x_axis=name,
                    y_axis=document["metric"],
                )
            )
    return h("div", made) if made else None


def trials(document: Document) -> Html | None:
    """List the trials, best first."""
    ended = sorted(_ended(document), key=lambda one: -one["value"])
    failed = [one for one in document["trials"] if one["error"]]
    if not ended:
        return None
    rows: list[list[str | Html]] = [
        [
            str(one["number"]),
            f"{one['value']:.4f}",
            one["state"],
            str(len(one["epochs"])),
            f"{one['seconds']:.0f}",
            h("span", [h("div", setting) for setting in one["changed"]] or "the defaults"),
        ]
        for one in ended
    ]
    return h(
        "div",
        table(["trial", document["metric"], "state", "epochs", "s", "settings"], rows, "Trials"),
        [h("p", f"Trial {one['number']} failed: {one['error']}", class_="note") for one in failed],
    )


def baselines(document: Document) -> Html | None:
    """List the baselines with their validation metrics."""
    rows: list[list[str | Html]] = [
        [name, f"{found['value']:.4f}", found["settings"] or "–"] for name, found in document["baselines"].items()
    ]
    return table(["baseline", document["metric"], "settings"], rows, "Baselines") if rows else None


def test(document: Document) -> Html | None:
    """Show the test metrics of the chosen model and the baselines."""
    found = document.get("test")
    if not found:
        return None
    ks = found["protocol"]["ks"]
    metrics = [f"{name}@{k}" for k in ks for name in ("NDCG", "Recall")]
    rows: list[list[str | Html]] = [
        [row["name"], *("–" if row["values"][metric] is None else f"{row['values'][metric]:.4f}" for metric in metrics)]
        for row in found["rows"]
    ]
    about = f"{found['num_queries']:,} queries, full catalog of {found['num_items']:,} items"
    return h(
        "div",
        h("p", about),
        table(["", *metrics], rows, "Test"),
        [h("p", f"{note[:1].upper()}{note[1:]}.", class_="note") for note in found["notes"]],
    )


def chosen(document: Document) -> Html:
    """Show the command that trains the chosen settings again."""
    found = document["chosen"]
    return h(
        "div",
        h("p", f"This command trains the settings of trial {found['trial']}:"),
        h("pre", h("code", found["command"]), tabindex=0),
        h(
            "p",
            f"Searched {document['seconds']:,.0f} of {document['budget']:,.0f} s with "
            f"{counted(document['workers'], 'worker')}.",
            class_="note",
        ),
    )


SECTIONS = (
    ReportSection("curve", "Best so far", curve),
    ReportSection("test", "Test of the chosen model", test),
    ReportSection("mattered", "What mattered", mattered),
    ReportSection("ranges", "Ranges", ranges),
    ReportSection("baselines", "Baselines on the validation queries", baselines),
    ReportSection("trials", "Trials", trials),
    ReportSection("chosen", "The chosen settings", chosen),
)
