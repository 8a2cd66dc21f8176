"""The findings of a report as sentences, computed from the numbers and limited to what they support."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]

#: A training run is called cheaper if it takes less than this share of the CPU time of another.
_CHEAPER = 0.9
#: If more objectives than this do not differ significantly from the best, they are counted, not named.
_MANY = 3


def question(document: Document) -> str:
    """Return the title of the report, the question that it answers."""
    if document.get("sweep"):
        return f"What does {document['sweep']['setting']} do to quality, to the tail and to items never seen?"
    if document["kind"] == "comparison":
        return "Which objective should you use on this data, and what does it cost in the tail?"
    return "How good is this model, overall and in the tail?"


def answer(document: Document) -> list[str]:
    """Return the findings as paragraphs; the first is the short answer, or a warning if a baseline is better."""
    if document["kind"] != "comparison" or len(document["models"]) == 1:
        return [*_beaten(document), *_alone(document), *_baselines(document)]
    said = [_use(document), *_behind(document), *_tail(document), *_reference(document), *_baselines(document)]
    return [*_beaten(document), *said]


def cautions(document: Document) -> list[str]:
    """Return caveats that a reader should know before relying on the results."""
    said = []
    models = document["models"]
    if document["kind"] == "comparison" and len(document["seeds"]) == 1:
        said.append(
            "Each objective was trained once, with one seed. The variation between seeds is unknown, so a small lead "
            "may be due to chance; --seeds 3 measures it."
        )
    rising = [model["name"] for model in models if _still_rising(model, document["settings"]["training"]["metric"])]
    if rising:
        many = f"{len(rising)} of {len(models)} models" if len(models) > 1 else "the model"
        said.append(
            f"The validation metric of {many} reached its best value in the last epoch: longer training would probably "
            f"improve it{' and may change the ranking' if len(models) > 1 else ''}."
        )
    if most := overlapped(document):
        said.append(f"Up to {most} runs were trained concurrently on one machine: compare CPU times, not wall times.")
    notes = document["data"]["split"]["account"]["lines"]
    said += [_sentence(f"{line['label']}: {line['note']}") for line in notes if "leak" in line["label"]]
    said += [
        note[:1].upper() + note[1:] + ("" if note.endswith(".") else ".") for note in document["evaluation"]["notes"]
    ]
    return said


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def overlapped(document: Document) -> int:
    """Return the largest number of concurrent training runs, or 0 if they ran one after the other."""
    runs = [run for model in document["models"] for run in model["runs"]]
    # Allow one second: `ended` is in whole seconds and later than the end of training.
    spans = [(run["ended"] - run["seconds"], run["ended"] - 1) for run in runs]
    most = max((sum(a <= begin < b for a, b in spans) for begin, _ in spans), default=1)
    return most if most > 1 else 0


def family(document: Document, about: str) -> dict[str, Any] | None:
    """Return the family of tests about "all", "tail" or "baselines", or None."""
    return next((tests for tests in document["tests"] if tests["about"] == about), None)


def verdicts(document: Document) -> dict[str, str]:
    """Return the kind of mark of each objective: best, same as the best, ahead of it or behind it.

    The only model of a document is "alone"; the best objective is "top" if a baseline has a higher mean.
    """
    tests = family(document, "all")
    if tests is None:
        return {model["name"]: "alone" for model in document["models"]}
    kinds = {"not told apart": "same", "ahead": "ahead", "behind": "behind"}
    beside = family(document, "baselines")
    is_best = beside is None or all(one["difference"] <= 0 for one in beside["contests"])
    return {
        tests["against"]: "best" if is_best else "top",
        **{one["name"]: kinds[one["verdict"]] for one in tests["contests"]},
    }


def value(entry: dict[str, Any], metric: str, part: str | None = None) -> dict[str, Any] | None:
    """Return a metric of a model or baseline, overall or on a slice; None if it was not measured."""
    numbers = entry["values"] if part is None else entry["slices"].get(part, {})
    found: dict[str, Any] | None = numbers.get(metric)
    return None if found is None or found["mean"] is None else found


def processor_time(model: dict[str, Any]) -> float | None:
    """Return the median CPU seconds of a model's training runs, or None if unknown.

    A time of 0 means unknown, because older versions wrote 0 for a finished run that was resumed.
    """
    known = [run["cpu_seconds"] for run in model["runs"] if run["cpu_seconds"]]
    return statistics.median(known) if known else None


def in_words(names: Sequence[str], last: str = "and") -> str:
    """Join names as "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def share(number: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * number:.1f} %"


def number(found: float | None) -> str:
    """Format the value of a metric."""
    return "–" if found is None else f"{found:.4f}"


def p_value(p: float | None) -> str:
    """Format a p-value after an = or < sign."""
    if p is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def duration(seconds: float) -> str:
    """Format a duration for people."""
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _interval(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return number(found["mean"])
    return f"{number(found['mean'])} (95 % interval {number(found['low'])} to {number(found['high'])})"


def _beaten(document: Document) -> list[str]:
    """Return a warning that a baseline is significantly better than every model, with settings to try."""
    tests = family(document, "baselines")
    ahead = [one for one in tests["contests"] if one["verdict"] == "ahead"] if tests else []
    if tests is None or not ahead:
        return []
    best, metric = max(ahead, key=lambda one: float(one["difference"])), tests["metric"]
    own = (value(document["models"][0], metric) or {"mean": 0.0})["mean"]
    numbers = f"{number(own)}, against {number(own + best['difference'])} ({p_value(best['adjusted'])})"
    if document["kind"] == "comparison" and len(document["models"]) > 1:
        said = (
            f"No objective reaches the best baseline, {best['name']}: the best objective, {tests['against']}, has an "
            f"{metric} of {numbers}."
        )
    else:
        said = f"{tests['against']} is below the best baseline, {best['name']}: its {metric} is {numbers}."
    if advice := document["evaluation"].get("advice"):
        said += f" Settings to try on this data: {' '.join(f'--set {setting}' for setting in advice)}."
    if command := document["evaluation"].get("command"):
        said += f" To search over these and other settings: {command}."
    return [said]


def _use(document: Document) -> str:
    best, metric = document["models"][0], document["metric"]
    same = [name for name, kind in verdicts(document).items() if kind == "same"]
    top = f"{metric} of {_interval(value(best, metric) or {})}"
    if not same:
        return f"Use {best['name']}. Its {top} is significantly better than that of every other objective."
    if len(same) > _MANY:
        return (
            f"No single objective is clearly best. {best['name']} has the highest {top}, but {len(same)} of the "
            f"{len(document['models']) - 1} others do not differ significantly from it."
        )
    named = [model for model in document["models"] if model["name"] in {best["name"], *same}]
    names = [model["name"] for model in named]
    said = (
        f"Use {in_words(names, 'or')}. {best['name']} has the highest {top}, but does not differ significantly from "
        f"{in_words(same, 'or')}."
    )
    times = {model["name"]: processor_time(model) for model in named}
    known = {name: time for name, time in times.items() if time is not None}
    if len(known) == len(named):
        cheapest, dearest = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
        if known[cheapest] < _CHEAPER * known[dearest]:
            said += (
                f" Of these, {cheapest} takes the least CPU time: {duration(known[cheapest])} per training run,"
                f" against {duration(known[dearest])} for {dearest}."
            )
    return said


def _behind(document: Document) -> list[str]:
    tests = family(document, "all")
    if tests is None:
        return []
    best = value(document["models"][0], tests["metric"])
    behind = sorted(
        (one for one in tests["contests"] if one["verdict"] == "behind"), key=lambda one: -one["difference"]
    )
    if not behind or best is None:
        return ["No objective differs significantly from the best: this comparison does not decide between them."]
    near, far = behind[0], behind[-1]

    def lower(one: dict[str, Any]) -> str:
        return f"{share(-one['difference'] / best['mean'])} lower"

    if near is far:
        return [f"{near['name']} is {lower(near)} ({p_value(near['adjusted'])}, Holm-adjusted)."]
    count = len(tests["contests"])
    some = f"All {count} others are" if len(behind) == count else f"{len(behind)} of the {count} others are"
    most = p_value(max(one["adjusted"] for one in behind))
    extremes = f"from {near['name']} ({lower(near)}) to {far['name']} ({lower(far)})"
    return [f"{some} significantly worse (largest Holm-adjusted {most}), {extremes}."]


def _tail(document: Document) -> list[str]:
    tests, models = family(document, "tail"), document["models"]
    best, metric = models[0], document["tail_metric"]
    head, tail = value(best, metric, "head"), value(best, metric, "tail")
    if tests is None or tail is None:
        return []
    size = document["evaluation"]["slice_sizes"].get("tail", {})
    said = (
        f"In the tail (the {size.get('items', 0):,} rarest items, with a third of the training interactions), "
        f"{best['name']} finds {share(tail['mean'])} of the targets ({metric})"
        + (f", in the head {share(head['mean'])}." if head else ".")
    )
    ahead = sorted((one for one in tests["contests"] if one["verdict"] == "ahead"), key=lambda one: -one["difference"])
    overall = {one["name"]: one for one in (family(document, "all") or tests)["contests"]}
    if not ahead:
        said += (
            f" No other objective is significantly better there: the lead of {best['name']} is not at the tail's "
            "expense."
        )
    else:
        top = ahead[0]
        found = share(tail["mean"] + top["difference"])
        said += f" {top['name']} finds {found} there ({p_value(top['adjusted'])}, Holm-adjusted)"
        lost = -overall[top["name"]]["difference"] / (value(best, document["metric"]) or {"mean": 1.0})["mean"]
        kind = overall[top["name"]]["verdict"]
        said += (
            f", at the cost of {share(lost)} of overall {document['metric']}."
            if kind == "behind"
            else ", and over all queries the two do not differ significantly."
        )
        if len(ahead) > 1:
            said += f" {in_words([one['name'] for one in ahead[1:]])} also find{'s' if len(ahead) == 2 else ''} more."
    worst = min(tests["contests"], key=lambda one: one["difference"])
    if worst["verdict"] == "behind":
        said += f" {worst['name']} finds the least, {share(tail['mean'] + worst['difference'])}."
    return [said]


def _reference(document: Document) -> list[str]:
    """Compare expected-count with full softmax, which it approximates."""
    by_name = {model["name"]: model for model in document["models"]}
    if "full-softmax" not in by_name or "expected-count" not in by_name:
        return []
    metric = document["metric"]
    full, sampled = value(by_name["full-softmax"], metric), value(by_name["expected-count"], metric)
    if full is None or sampled is None or not full["mean"]:
        return []
    times = processor_time(by_name["full-softmax"]), processor_time(by_name["expected-count"])
    said = f"expected-count reaches {share(sampled['mean'] / full['mean'])} of full softmax's {metric}"
    if times[0] and times[1]:
        said += f" in {share(times[1] / times[0])} of its CPU time"
    return [f"{said}."]


def _alone(document: Document) -> list[str]:
    model, metric, tail_metric = document["models"][0], document["metric"], document["tail_metric"]
    found = value(model, tail_metric)
    head, tail = value(model, tail_metric, "head"), value(model, tail_metric, "tail")
    lead = f"{model['name']} has an {metric} of {_interval(value(model, metric) or {})}"
    if found is not None:
        lead += f"; it finds {share(found['mean'])} of the targets among its first {tail_metric.split('@')[1]}"
    said = [lead + "."]
    if head is not None and tail is not None:
        items = document["evaluation"]["slice_sizes"]["tail"]["items"]
        said.append(
            f"It finds {share(head['mean'])} of the targets in the head and {share(tail['mean'])} of the targets in "
            f"the tail (the {items:,} rarest items, with a third of the training interactions)."
        )
    return said


def _baselines(document: Document) -> list[str]:
    tests = family(document, "baselines")
    if tests is None:
        return []
    metric = tests["metric"]
    own = (value(document["models"][0], metric) or {"mean": 0.0})["mean"]
    words = {
        "behind": "is better than",
        "ahead": "is worse than",
        "not told apart": "does not differ significantly from",
    }
    said = [
        f"{words[one['verdict']]} {one['name']} ({number(own + one['difference'])}, {p_value(one['adjusted'])})"
        for one in tests["contests"]
    ]
    return [f"Compared with the baselines by {metric}, {tests['against']} {in_words(said)}."]


def _still_rising(model: dict[str, Any], metric: str) -> bool:
    """Return whether the last epoch was the best in most seeds."""
    last = []
    for run in model["runs"]:
        rows = [row for row in run["history"] if metric in row]
        if len(rows) > 1:
            last.append(max(rows, key=lambda row: row[metric]) is rows[-1])
    return bool(last) and sum(last) * 2 > len(last)
