"""Sections about where the numbers come from: the audit, examples, calibration, the data, the settings."""

from __future__ import annotations

import math
from typing import Any

import yaml

from twotower.analysis.report import story
from twotower.analysis.report.figures import Curve, IntervalRow, interval_rows, small_multiples
from twotower.analysis.report.markup import Html, h
from twotower.analysis.report.tables import table
from twotower.config import ObjectiveConfig

Document = dict[str, Any]

_VERDICT_KINDS = {"no bias found": "clear", "small bias": "same", "biased": "behind"}


def audit(document: Document) -> Html | None:
    """Bias and spread of the objectives' gradients against full softmax."""
    found = document.get("audit")
    if not found:
        return None
    known = sorted((one for one in found["objectives"] if one["overall"]), key=lambda one: one["overall"]["bias"])
    others = [one["name"] for one in found["objectives"] if not one["overall"]]
    diagnostics = document.get("diagnostics", {})
    rows, spreads, cells = [], [], []
    for one in known:
        values, kind = one["overall"], _VERDICT_KINDS.get(one["verdict"], "other")
        bias, error = 100 * values["bias"], 100 * values["bias_error"]
        rows.append(IntervalRow(one["name"], bias, bias - 2 * error, bias + 2 * error, kind, f"{bias:.1f} %"))
        spread, spread_error = 100 * values["spread"], 100 * values["spread_error"]
        spreads.append(
            IntervalRow(
                one["name"], spread, spread - 2 * spread_error, spread + 2 * spread_error, kind, f"{spread:.0f} %"
            )
        )
        last = diagnostics.get(one["name"], {})
        cells.append(
            [
                one["name"],
                f"{bias:.1f} ± {error:.1f} %",
                f"{spread:.0f} ± {spread_error:.0f} %",
                f"{values['distinct']:,.0f}",
                f"{values['effective']:,.0f}",
                f"{100 * last['gradient_tail']:.0f} %" if "gradient_tail" in last else "–",
                one["verdict"],
            ]
        )
    heads = ["objective", "bias", "spread", "distinct", "effective", "gradient on the tail", "verdict"]
    told = (
        f"Measured on {found['rows']} rows of the training data with {found['draws']} draws each, on the model "
        f"{found['asked']['model'] if 'asked' in found else ''}: bias is the distance of the mean gradient from full "
        "softmax's, spread that of one draw from the mean, both in percent of full softmax's gradient. No number of "
        "steps averages a bias out; it does average the spread. Gradient on the tail: share of the negatives' gradient "
        "that fell on tail items at the end of the training."
    )
    caption = "Line: two standard errors. Filled: no bias found; ring: small; diamond: biased."
    return h(
        "div",
        interval_rows(
            "Bias of the gradient",
            "; ".join(f"{row.name} {row.told}" for row in rows),
            rows,
            "bias in % of full softmax's gradient",
            zero=True,
            caption=caption,
        ),
        interval_rows(
            "Spread of one draw",
            "; ".join(f"{row.name} {row.told}" for row in spreads),
            spreads,
            "spread in % of full softmax's gradient",
            zero=True,
        ),
        table(heads, cells, "Audit"),
        h("p", told, class_="note"),
        h(
            "p",
            f"Not measured: {', '.join(others)}; no estimate of the softmax, so there is no bias to speak of.",
            class_="note",
        )
        if others
        else None,
    )


def calibration(document: Document) -> Html | None:
    """Predicted probabilities against what was observed."""
    found = document.get("calibration")
    if not found:
        return None
    kinds = story.verdicts(document)
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
    # Powers of ten within the range; where there is none, its ends.
    within = [float(power) for power in range(-9, 1) if min(places) <= power <= max(places)][-3:]
    shown = [(place, _power_of_ten(place)) for place in within] or [(min(places), f"{10.0 ** min(places):.2g}")]
    told = (
        "How likely the softmax says an item is, against how often it was the target, over all pairs of test query and "
        "item. Left out: objectives that do not estimate the softmax. First seed."
    )
    return h(
        "div",
        h("p", told),
        small_multiples(
            "Observed over predicted probability",
            "; ".join(f"{row[0]}: calibration error {row[1]}" for row in cells),
            curves,
            "predicted probability of an item (log scale)",
            "observed / predicted",
            x_ticks=shown,
            y_words=_power_of_two,
            reference=0.0,
            caption="1: as often as predicted. Above: the model thinks such items less likely than they are. Band: two "
            "standard errors, from the number of targets. Grey: all the others.",
        ),
        table(["", "calibration error", "perplexity"], cells, "Calibration"),
        h(
            "p",
            "Calibration error: the mass of probability that lies in the wrong place, 0 to 2. Perplexity: of so many "
            "equally likely items a target is as hard to guess.",
            class_="note",
        ),
    )


def _ratio(part: dict[str, Any]) -> tuple[float, float | None, float | None, float | None]:
    """Log10 of the predicted probability; log2 of observed over predicted, and two standard errors of it."""
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
    """Queries on which the objectives disagree."""
    found = document.get("examples")
    if not found:
        return None
    compared = len(found[0]["lists"]) > 1
    order = [model["name"] for model in document["models"]]
    told = (
        "Chosen because the objectives place the target differently, some from each third of popularity: they show how "
        "lists differ, not how often. Lists are those of the first seed."
        if compared
        else "Some queries from each third of popularity."
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
    return h("div", h("p", told), h("div", cards, class_="examples"))


def data(document: Document) -> Html:
    """What was read, what was dropped and why."""
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
    """The command and every setting."""
    parts = []
    if document.get("command"):
        parts += [
            h("p", "This command makes the report again; it repeats nothing that is finished:"),
            _block(document["command"]),
        ]
    parts += [
        h("p", "Settings shared by all models:"),
        _block(yaml.safe_dump(document["settings"], sort_keys=False, allow_unicode=True)),
    ]
    if document.get("objectives"):
        changed = {name: _given(values) for name, values in document["objectives"].items()}
        parts += [
            h("p", "The objectives, where they differ from the defaults:"),
            _block(yaml.safe_dump(changed, sort_keys=False)),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts.append(h("p", f"Seeds {', '.join(map(str, document['seeds']))}. {versions}.", class_="note"))
    return h("div", parts)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    defaults = ObjectiveConfig().model_dump(mode="json")
    return {key: found for key, found in values.items() if key == "name" or found != defaults.get(key)}


def _block(text: str) -> Html:
    return h("pre", h("code", text), tabindex=0)


def _rank(rank: int | None) -> str:
    return "not found" if rank is None else f"place {rank}"
