"""The result of a study as one JSON document, `tune.json`, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from twotower.errors import counted
from twotower.serving.model_folder import library_versions
from twotower.study.trials import finished, score
from twotower.system.terminal import cell

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

#: Minimum number of complete trials for importances, and number of trials in the terminal's table.
LEAST_TRIALS, SHOWN = 8, 5
#: Optuna's state -> state in the report.
STATES = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "interrupted",
    "WAITING": "interrupted",
}


def candidates(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that can be chosen: finished trials, and interrupted ones with at least one validation."""
    interrupted = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in ("RUNNING", "WAITING") and trial.intermediate_values
    ]
    return [*finished(study), *interrupted]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the best value, or None if there are no trials. Of equal trials, return the first."""
    return max(candidates(study), key=score, default=None)


def importances(study: optuna.Study) -> dict[str, float]:
    """Return the share of the variance of the values that each parameter explains, largest first.

    fANOVA (Hutter et al. 2014): a random forest is fitted to the complete trials, and the variance of its predictions
    over the space is divided among the parameters. Only parameters that every trial has are included; parameters with
    `when` are not. The result is empty if fewer than eight trials are complete or if all have the same value.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # noqa: PLC0415  # an extra

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < LEAST_TRIALS or len({trial.value for trial in complete}) < 2:
        return {}
    common = set.intersection(*(set(trial.params) for trial in complete))
    varied = sorted(name for name in common if len({trial.params[name] for trial in complete}) > 1)
    if not varied:
        return {}
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=varied)
    return {name: float(value) for name, value in sorted(found.items(), key=lambda pair: -pair[1])}


def describe(
    study: optuna.Study, *, metric: str, baselines: Mapping[str, Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """Build the document of a study.

    Args:
        study: the study.
        metric: the validation metric.
        baselines: name -> its value on the validation queries, `value`, and its settings, `settings`.
        more: additional sections: data, budget, seconds, chosen, test, ...
    """
    best = best_trial(study)
    document = {
        "document": 1,
        "kind": "tuning",
        "metric": metric,
        "trials": [
            _trial(trial)
            for trial in study.get_trials(deepcopy=False)
            if trial.state.name != "WAITING" or trial.intermediate_values
        ],
        "best": None if best is None else best.number,
        "baselines": dict(baselines),
        "importances": importances(study),
        "versions": library_versions(),
        **more,
    }
    return {**document, "findings": in_words(document)}


def _trial(trial: FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    has_value = trial.state.name != "FAIL" and bool(trial.intermediate_values or trial.value is not None)
    return {
        "number": trial.number,
        "state": "cut" if attributes.get("cut") else STATES[trial.state.name],
        "value": score(trial) if has_value else None,
        "params": dict(trial.params),
        "settings": attributes.get("overrides", []),
        "changed": attributes.get("changed", []),
        "epochs": [[epoch, value] for epoch, value in sorted(trial.intermediate_values.items())],
        "seconds": attributes.get("seconds", 0.0),
        "ended": attributes.get("ended"),
        "error": attributes.get("error"),
    }


def in_words(document: Mapping[str, Any]) -> list[str]:
    """Return the findings as sentences."""
    trials = {one["number"]: one for one in document["trials"]}
    metric, best = document["metric"], trials.get(document["best"])
    if best is None:
        return ["No trial has been validated."]
    ended = [one for one in document["trials"] if one["value"] is not None]
    pruned = sum(one["state"] == "pruned" for one in ended)
    said = [
        f"Best of {counted(len(ended), 'trial')} ({pruned} pruned) on the validation queries: "
        f"{metric} {best['value']:.4f}, trial {best['number']}"
    ]
    first = next((one for one in ended if one["number"] == document.get("default")), None)
    if first is not None and first is not best:
        said[0] += f"; the defaults reach {first['value']:.4f}"
    if document["baselines"]:
        name, found = max(document["baselines"].items(), key=lambda pair: pair[1]["value"])
        said[0] += f"; the best baseline, {name}, reaches {found['value']:.4f}"
    said[0] += "."
    if document["importances"]:
        top = [f"{name} ({100 * share:.0f} %)" for name, share in list(document["importances"].items())[:3]]
        said.append(f"What mattered most: {', '.join(top)}.")
    said.append(
        "The best value was selected from many trials on the same validation queries, so it is optimistic; the test "
        "queries were not used for the choice."
    )
    return said


def printed(document: Mapping[str, Any]) -> Group:
    """Build the best-so-far curve, the best trials and the findings for a rich console."""
    metric = document["metric"]
    ended = [one for one in document["trials"] if one["value"] is not None]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title, side in (("trial", "right"), (metric, "right"), ("s", "right"), ("settings", "left")):
        table.add_column(title, justify=side, overflow="fold")  # type: ignore[arg-type]
    for one in sorted(ended, key=lambda one: -one["value"])[:SHOWN]:
        table.add_row(str(one["number"]), f"{one['value']:.4f}", f"{one['seconds']:.0f}", cell(settings_of(one)))
    for name, found in document["baselines"].items():
        table.add_row("", f"{found['value']:.4f}", "", cell(f"{name} {found['settings']}".strip()))
    steps = ", ".join(f"trial {number} {value:.4f}" for number, value in best_so_far(ended))
    return Group(table, cell(f"best so far: {steps}"), *(cell(f"* {text}") for text in document["findings"]))


def best_so_far(ended: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the trials that were the best when they ended, with their values."""
    found: list[tuple[int, float]] = []
    for one in sorted(ended, key=lambda one: (one["ended"] or float("inf"), one["number"])):
        if not found or one["value"] > found[-1][1]:
            found.append((one["number"], one["value"]))
    return found


def settings_of(trial: Mapping[str, Any]) -> str:
    """Return the settings of a trial that differ from the first trial's, in one line."""
    return " ".join(trial["changed"]) or "the defaults"
