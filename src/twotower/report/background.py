"""Report sections that explain the results: audit, examples, calibration, data, settings."""

from __future__ import annotations

import math
from typing import Any

import yaml

from twotower.config.run import ObjectiveConfig
from twotower.report import findings
from twotower.report.figures import Curve, IntervalRow, interval_rows, small_multiples
from twotower.report.html import Html, h, table

Document = dict[str, Any]

_VERDICT_KINDS = {"no bias found": "clear", "small bias": "same", "biased": "behind"}


def audit(document: Document) -> Html | None:
    """Show bias and spread of each objective's gradient relative to full softmax."""
    found = document.get("audit")
    if not found:
        return None
    known = sorted((one for one in found["objectives"] if one["overall"]), key=lambda one: one["overall"]["bias"])
    others = [one["name"] for one in found["objectives"] if not one["overall"]]
    diagnostics = document.get("diagnostics", {})
    cells = []
    for one in known:
        values = one["overall"]
        last = diagnostics.get(one["name"], {})
        cells.append(
            [
                one["name"],
                f"{100 * values['bias']:.1f} ± {100 * values['bias_error']:.1f} %",
                f"{100 * values['spread']:.0f} ± {100 * values['spread_error']:.0f} %",
                f"{values['distinct']:,.0f}",
                f"{values['effective']:,.0f}",
                f"{100 * last['gradient_tail']:.0f} %" if "gradient_tail" in last else "–",
                one["verdict"],
            ]
        )
    heads = ["objective", "bias", "spread", "distinct", "effective", "gradient on the tail", "verdict"]
    if any("weight" in one["overall"] for one in known):
        heads.insert(-1, "mean 1 - P(y)")
        for one, line in zip(known, cells, strict=True):
            line.insert(-1, f"{one['overall']['weight']:.3f}" if "weight" in one["overall"] else "–")
    note = (
        f"Measured on {found['rows']} rows of the training data with {found['draws']} draws each, on the model "
        f"{found['asked']['model'] if 'asked' in found else ''}. Bias: distance between the mean gradient and the "
        "gradient of full softmax. Spread: distance of a single draw from the mean. Both are in percent of the norm of "
        "full softmax's gradient. Spread averages out over training steps; bias does not. Gradient on the tail: share "
        "of the negatives' gradient that fell on tail items at the end of training."
    )
    caption = "Line: two standard errors. Filled: no bias found; ring: small bias; diamond: biased."
    return h(
        "div",
        _with_errors(known, "bias", ".1f", "Bias of the gradient", caption),
        _with_errors(known, "spread", ".0f", "Spread of one draw"),
        table(heads, cells, "Audit"),
        h("p", note, class_="note"),
        h(
            "p",
            f"Not measured: {', '.join(others)}. They do not estimate the softmax, so a bias is not defined.",
            class_="note",
        )
        if others
        else None,
    )


def _with_errors(known: list[dict[str, Any]], name: str, form: str, title: str, caption: str | None = None) -> Html:
    """Draw a value of each objective with an interval of two standard errors."""
    rows = []
    for one in known:
        value, error = (100 * one["overall"][key] for key in (name, f"{name}_error"))
        kind = _VERDICT_KINDS.get(one["verdict"], "other")
        rows.append(IntervalRow(one["name"], value, value - 2 * error, value + 2 * error, kind, f"{value:{form}} %"))
    return interval_rows(title, rows, f"{name} in % of full softmax's gradient", zero=True, caption=caption)


def calibration(document: Document) -> Html | None:
    """Show predicted probabilities against observed frequencies."""
    found = document.get("calibration")
    if not found:
        return None
    kinds = findings.verdicts(document)
    curves, cells = [], []
    for model in document["models"]:
        one = found.get(model["name"])
        if one is None:
            continue
        points = [_ratio(part) for part in one["bins"] if part["predicted"] > 0]
        curves.append(Curve(model["name"], points, kinds[model["name"]]))
        cells.append([model["name"], f"{one['expected_calibration_error']:.3f}", f"{one['perplexity']:,.0f}"])
    places = [point[0] for curve in curves for point in curve.points]
    if not places:
        return None
    # Powers of ten within the range, or its ends if it contains none.
    within = [float(power) for power in range(-9, 1) if min(places) <= power <= max(places)][-3:]
    shown = [(place, _power_of_ten(place)) for place in within] or [(min(places), f"{10.0 ** min(places):.2g}")]
    note = (
        "The figure compares the probability that the softmax assigns to an item with how often the item was the "
        "target, over pairs of a test query and an item (for a sample of the queries if the catalog is large). First "
        "seed only. Objectives that do not estimate the softmax are omitted."
    )
    return h(
        "div",
        h("p", note),
        small_multiples(
            "Observed over predicted probability",
            curves,
            "predicted probability of an item (log scale)",
            "observed / predicted",
            x_ticks=shown,
            y_words=_power_of_two,
            reference=0.0,
            description="; ".join(f"{row[0]}: calibration error {row[1]}" for row in cells),
            caption="1: as often as predicted. Above 1: the model underestimates such items. Band: two standard "
            "errors, from the number of targets. Grey: the other models.",
        ),
        table(["", "calibration error", "perplexity"], cells, "Calibration"),
        h(
            "p",
            "Calibration error: the probability mass in the wrong place, from 0 to 2. Perplexity: guessing a target is "
            "as hard as guessing among this many equally likely items.",
            class_="note",
        ),
    )


def refined_weights(document: Document) -> Html | None:
    """Show the weight 1 - P(y | x) of the test queries and their targets."""
    found = document.get("refined_weights")
    if not found:
        return None
    heads = ["", "mean", "quartiles", *(f"decile {number}" for number in range(1, 11))]
    cells = [
        [
            name,
            f"{one['mean']:.3f}",
            " / ".join(f"{one[place]:.3f}" for place in ("low", "middle", "high")),
            *("–" if value is None else f"{value:.3f}" for value in one["deciles"]),
        ]
        for name, one in found.items()
    ]
    note = (
        "Refined logQ weights a row by 1 - P(y), the model's own probability of being wrong: near 0 the model has "
        "learnt the row, near 1 it has not. The table shows the weights of the test queries and their targets, with P "
        "over the whole catalog, by popularity decile of the target, most popular first. The values of each query are "
        "in per_query.parquet (refined_weight)."
    )
    return h("div", h("p", note), table(heads, cells, "Row weights"))


def _ratio(part: dict[str, Any]) -> tuple[float, float | None, float | None, float | None]:
    """Return log10 of predicted, log2 of observed over predicted, and the latter minus and plus two standard errors."""
    x = math.log10(part["predicted"])
    if part["observed"] <= 0 or part["targets"] < 1:
        return (x, None, None, None)
    ratio = part["observed"] / part["predicted"]
    error = 2 / math.sqrt(part["targets"])
    return (x, math.log2(ratio), math.log2(ratio * max(1 - error, 0.25)), math.log2(ratio * (1 + error)))


def _power_of_ten(power: float) -> str:
    return f"10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _power_of_two(power: float) -> str:
    return f"{2.0**power:.3g}" if power >= 0 else f"1/{2.0**-power:.3g}"


def examples(document: Document) -> Html | None:
    """Show queries on which the objectives disagree."""
    found = document.get("examples")
    if not found:
        return None
    compared = len(found[0]["lists"]) > 1
    order = [model["name"] for model in document["models"]]
    note = (
        "Queries for which the objectives rank the target most differently, from each popularity third. They show how "
        "the lists differ, not how often. The lists are from the first seed."
        if compared
        else "Queries from each popularity third."
    )
    cards = []
    for one in found:
        longer = one["history_length"] > len(one["history"])
        past = " → ".join(one["history"]) if one["history"] else "no history"
        cards.append(
            h(
                "article",
                h("h3", f"Query {one['query']}"),
                h(
                    "dl",
                    h("div", h("dt", "history"), h("dd", "… → " if longer else "", past)),
                    h(
                        "div",
                        h("dt", "target"),
                        h("dd", h("b", one["target"]), f" ({one['third']}, {one['target_count']:,} in training)"),
                    ),
                ),
                h(
                    "ul",
                    [
                        h(
                            "li",
                            h("span", _rank(listed["rank"]), class_="rank hit" if listed["rank"] else "rank"),
                            h("span", listed["model"], class_="who"),
                            h("span", " · ".join(listed["items"]), class_="what"),
                        )
                        for listed in sorted(one["lists"], key=lambda listed: order.index(listed["model"]))
                    ],
                    class_="lists",
                ),
                class_="example",
            )
        )
    return h("div", h("p", note), h("div", cards, class_="examples"))


def data(document: Document) -> Html:
    """Show how many rows were read and dropped, and why."""
    found = document["data"]
    lines = [*found["account"], *found["split"]["account"]["lines"]]
    return h(
        "div",
        h(
            "table",
            h(
                "tbody",
                [
                    h(
                        "tr",
                        h("th", line["label"], scope="row"),
                        h("td", "" if line["count"] is None else f"{line['count']:,}", class_="count"),
                        h("td", line["note"], class_="words"),
                    )
                    for line in lines
                ],
            ),
            class_="account",
        ),
        h("p", "Fingerprint of the data ", h("code", found["fingerprint"][:16]), class_="note"),
    )


def settings(document: Document) -> Html:
    """Show the command and every setting."""
    parts = []
    if document.get("command"):
        parts += [
            h("p", "This command rebuilds the report; finished training runs are not repeated:"),
            _block(document["command"]),
        ]
    parts += [
        h("p", "Settings shared by all models:"),
        _block(yaml.safe_dump(document["settings"], sort_keys=False, allow_unicode=True)),
    ]
    if document.get("objectives"):
        changed = {name: _non_defaults(values) for name, values in document["objectives"].items()}
        parts += [
            h("p", "Settings of each objective that differ from the defaults:"),
            _block(yaml.safe_dump(changed, sort_keys=False)),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts.append(h("p", f"Seeds {', '.join(map(str, document['seeds']))}. {versions}.", class_="note"))
    return h("div", parts)


def _non_defaults(values: dict[str, Any]) -> dict[str, Any]:
    defaults = ObjectiveConfig().model_dump(mode="json")
    return {key: found for key, found in values.items() if key == "name" or found != defaults.get(key)}


def _block(text: str) -> Html:
    return h("pre", h("code", text), tabindex=0)


def _rank(rank: int | None) -> str:
    return "not found" if rank is None else f"rank {rank}"
