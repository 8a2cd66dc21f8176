"""The implementation of `twotower tune`: search, report, and train the chosen model on all rows."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from twotower.config.run import Config
from twotower.data import Split
from twotower.errors import InputError, Interrupted, counted
from twotower.evaluation import Evaluation, evaluate_all
from twotower.evaluation.baselines import BASELINES, fit_baselines
from twotower.report.study import render_study
from twotower.run import settings_to_try, train_run
from twotower.run.refit import refuse_refit
from twotower.run.run_folder import reserved
from twotower.run.settings import complete_settings
from twotower.serving.model_folder import FOLDER
from twotower.study.document import best_trial, describe, printed
from twotower.study.space import Space, packaged_space
from twotower.study.trials import (
    StopRequest,
    StudyPlan,
    finished,
    import_optuna,
    open_study,
    requeue_stopped,
    score,
    spent,
    work,
)
from twotower.study.workers import work_in_processes
from twotower.system.filesystem import output_path, write_text
from twotower.training import LAST

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

#: Folder of the study in the run folder, its copy of the space, and the record of the chosen trial.
STUDY, SPACE, CHOSEN = "study", "space.yaml", "chosen.json"

_BUDGET = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


@dataclass(frozen=True)
class Budget:
    """Seconds of search, summed over all sessions of a study."""

    seconds: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a time such as "90s", "30m", "2h" or "1h30m".

        Raises:
            InputError: the text has the wrong form, or the time is zero.
        """
        found = _BUDGET.fullmatch(text.strip())
        hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
        if not hours + minutes + seconds:
            raise InputError(f"--budget: {text!r}; expected a time such as 90s, 30m, 2h or 1h30m")
        return cls(3600.0 * hours + 60.0 * minutes + seconds)


@dataclass(frozen=True)
class Tuned:
    """The result of a study.

    Attributes:
        document: all results as JSON values, as in `tune.json`.
        directory: the run folder.
        measured: the evaluation of the chosen model on the test queries.
    """

    document: dict[str, Any]
    directory: Path
    measured: Evaluation

    def __rich__(self) -> Group:
        """Build the tables for a rich console."""
        return Group(printed(self.document), "", self.measured)


def tune_run(
    source: str | Path,
    out: str | Path,
    budget: Budget,
    *,
    config: Path | None = None,
    changes: tuple[str, ...] = (),
    space: Path | None = None,
    trials: int | None = None,
    workers: int = 1,
    refits: bool = True,
    command: str | None = None,
    on_message: Callable[[object], None] = print,
) -> Tuned:
    """Search for the settings with the best validation metric, then train a model with them on all rows.

    The same call resumes an interrupted or killed search, or continues a finished one with a larger budget. `out`
    becomes a run folder like those of `train_run`, with the study in `study/`, and with `tune.json` and `tune.html`.

    Args:
        source: a file, a folder or the name of a data set.
        out: the run folder.
        budget: time for the search, excluding the training of the chosen model.
        config: YAML file with the settings that all trials share.
        changes: overrides of these settings.
        space: YAML file of the space; None for the default space of the training question.
        trials: maximum number of trials; None for no limit.
        workers: number of processes.
        refits: finally train the chosen model on all rows.
        command: the command line, shown in the report.
        on_message: receives progress messages.

    Raises:
        InputError: optuna is missing, a setting or the space is wrong, the split has no validation, or `out` contains
            a different model or study.
        Interrupted: Ctrl-C before the first validation, or a second Ctrl-C; the same call resumes.
    """
    import_optuna()
    directory = output_path(out)
    folder = directory / STUDY
    if (directory / FOLDER).exists() and not folder.exists():
        raise InputError(f"{directory}: already contains a model that was not tuned; choose another --out")
    base = Config.load(config, list(changes))
    if base.data.windows > 1:
        raise InputError("data.windows: tune searches with one window; evaluate the result with twotower train")
    plan = StudyPlan(
        str(source),
        folder,
        config,
        changes,
        Space("", {}),
        base.training.metric,
        base.training.seed,
        trials=trials,
    )
    stop = StopRequest()
    with reserved(folder), stop.listening():
        split = plan.read()
        if not len(split.validation):
            raise InputError("tune: the split has no validation queries to choose settings on; use another split")
        if refits:
            refuse_refit(base, split, continues=False)
        resolved = complete_settings(base, split)[0]
        path = packaged_space(resolved.training.question) if space is None else space
        plan = replace(plan, space=Space.read(path, plan.load))
        study = open_study(folder)
        _begin(
            study,
            plan,
            base,
            fingerprint=split.data.fingerprint,
            advised=settings_to_try(resolved),
            on_message=on_message,
        )
        baselines = _baselines(study, split, base)
        for name, found in baselines.items():
            on_message(
                f"{name} on the validation queries: {base.training.metric} {found['value']:.4f} {found['settings']}"
            )
        _search(plan, study, stop, split=split, budget=budget, workers=workers, on_message=on_message)
        del split
        best = best_trial(study)
        if best is None:
            raise Interrupted("interrupted before the first validation")
        more = {
            "default": 0,
            "budget": budget.seconds,
            "seconds": round(spent(study, workers), 1),
            "workers": workers,
            "command": command,
            "source": str(source),
            "chosen": _chosen(plan, best, source, out, refits=refits),
        }

        def write(**test: Any) -> dict[str, Any]:
            document = describe(study, metric=plan.metric, baselines=baselines, **more, **test)
            write_text(directory / "tune.json", json.dumps(document, indent=1))
            write_text(directory / "tune.html", render_study(document))
            return document

        write(test=None)
        if stop.is_made:
            on_message(
                "search stopped; training with the best settings so far (Ctrl-C stops this too; run again to resume)"
            )
    measured = _train(plan, best, source, directory, refits=refits, on_message=on_message)
    return Tuned(write(test=measured.to_dict()), directory, measured)


def _begin(
    study: optuna.Study,
    plan: StudyPlan,
    base: Config,
    *,
    fingerprint: str,
    advised: tuple[str, ...],
    on_message: Callable[[object], None],
) -> None:
    """Record the inputs of a new study and queue its first trials, or check the inputs of a resumed study."""
    about = {
        "data": fingerprint,
        "settings": base.model_copy(update={"evaluation": Config().evaluation}).model_dump(mode="json"),
        "space": plan.space.text,
    }
    if "about" in study.user_attrs:
        for name, found in study.user_attrs["about"].items():
            if found != about[name]:
                raise InputError(
                    f"{plan.folder}: contains a study that differs in its {name}; use the same {name} again, or "
                    "choose another --out"
                )
        again = requeue_stopped(plan.folder)
        done = len(finished(study))
        trials = counted(done, "trial is", "trials are")
        on_message(f"resuming the study: {trials} finished" + (f", {again} interrupted" if again else ""))
        return
    study.set_user_attr("about", about)
    write_text(plan.folder / SPACE, plan.space.text)
    study.enqueue_trial(plan.space.first() or {})
    for settings in [*((one,) for one in advised), *([advised] if len(advised) > 1 else [])]:
        if (chosen := plan.space.first(settings)) is not None:
            study.enqueue_trial(chosen)


def _baselines(study: optuna.Study, split: Split, base: Config) -> dict[str, dict[str, Any]]:
    """Measure the baselines on the validation queries, where their settings are also chosen, as in the trials."""
    wanted = base.evaluation.baselines
    if not wanted:
        return {}
    names = list(BASELINES) if wanted is True else list(wanted)
    if study.user_attrs.get("baselines", {}).get("names") == names:
        return dict(study.user_attrs["baselines"]["found"])
    k, seen = int(base.training.metric.split("@")[1]), base.evaluation.exclude_seen
    fitted = fit_baselines(
        split.train, split.validation, names=None if wanted is True else names, k=k, exclude_seen=seen
    )
    measured = evaluate_all(fitted.rankers, split.validation, train=split.train, ks=(k,), exclude_seen=seen)
    found = {
        row.name: {"value": row.values[base.training.metric], "settings": fitted.settings.get(row.name, "")}
        for row in measured.rows
    }
    study.set_user_attr("baselines", {"names": names, "found": found})
    return found


def _search(
    plan: StudyPlan,
    study: optuna.Study,
    stop: StopRequest,
    *,
    split: Split,
    budget: Budget,
    workers: int,
    on_message: Callable[[object], None],
) -> None:
    left = budget.seconds - spent(study, workers)
    if left <= 0 or (plan.trials is not None and len(finished(study)) >= plan.trials):
        on_message("the search is over; raise --budget or --trials to continue it")
        return
    begun, best = time.time(), [max(map(score, finished(study)), default=float("-inf"))]
    plan = replace(plan, deadline=begun + left)
    limit = "" if plan.trials is None else f" or {plan.trials} trials"
    on_message(
        f"searching {counted(len(plan.space.parameters), 'parameter')} for {_clock(left)}{limit}, "
        f"{counted(workers, 'worker')}"
    )

    def on_trial(trial: FrozenTrial) -> None:
        if trial.state.name == "FAIL":
            on_message(f"trial {trial.number} failed: {trial.user_attrs.get('error', 'stopped')}")
            return
        value = score(trial)
        is_best = value > best[0]
        best[0] = max(best[0], value)
        how = {"PRUNED": "pruned at "}.get(trial.state.name, "")
        settings = " ".join(trial.user_attrs["changed"]) or "the defaults"
        on_message(
            f"[{_clock(time.time() - begun)} of {_clock(left)}] trial {trial.number}: {how}{plan.metric} {value:.4f}"
            f"{' (best so far)' if is_best else f' (best {best[0]:.4f})'}: {settings}"
        )

    if workers == 1:
        work(plan, stop, split=split, on_trial=on_trial)
    else:
        work_in_processes(plan, workers, stop, on_trial)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _chosen(plan: StudyPlan, best: FrozenTrial, source: str | Path, out: str | Path, *, refits: bool) -> dict[str, Any]:
    settings = [*plan.changes, *best.user_attrs["overrides"]]
    words = ["twotower", "train", str(source), "--out", f"{out}-again"]
    words += [] if plan.config is None else ["--config", str(plan.config)]
    words += [word for setting in settings for word in ("--set", setting)]
    return {
        "trial": best.number,
        "settings": best.user_attrs["overrides"],
        "refit": refits,
        "command": shlex.join([*words, *(["--refit"] if refits else [])]),
    }


def _train(
    plan: StudyPlan,
    best: FrozenTrial,
    source: str | Path,
    directory: Path,
    *,
    refits: bool,
    on_message: Callable[[object], None],
) -> Evaluation:
    """Train a model with the chosen settings in the run folder.

    An interrupted run with the same settings is resumed; a finished one is only evaluated again.
    """
    settings = [*best.user_attrs["overrides"], f"training.refit={json.dumps(refits)}"]
    record, marker = json.dumps({"settings": settings}), plan.folder / CHOSEN
    same = marker.is_file() and marker.read_text(encoding="utf-8") == record
    write_text(marker, record)
    on_message(f"training with the settings of trial {best.number}{', then on all rows' if refits else ''}")
    return train_run(
        source,
        directory,
        plan.load(settings),
        resume=same and (directory / LAST).exists(),
        on_message=on_message,
    )[1]
