"""How trials end: pruned by the median, cut by the budget, failed, interrupted; with training replaced by a script."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from twotower.config.run import Config
from twotower.errors import InputError, Interrupted
from twotower.study import trials
from twotower.study.document import best_trial, describe, importances
from twotower.study.space import Space
from twotower.study.trials import StopRequest, StudyPlan, finished, open_study, requeue_stopped, score, spent, work

pytest.importorskip("optuna")


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "item_tower.dimension: [8, 16, 32]\ntraining.learning_rate: {low: 0.001, high: 0.1, default: 0.01}\n"
    )
    space = Space.read(path, lambda more: Config.load(None, more))
    return StudyPlan("none", tmp_path / "study", None, (), space, "NDCG@10", seed=0, trials=6)


@pytest.fixture
def script(monkeypatch):
    """Replace training: `script(curves)` makes the k-th run validate the k-th curve, or raise it if it is an error."""

    def replaced(curves):
        left, ran = list(curves), []

        def fit(split, config, *, directory, resume, progress, on_epoch):
            directory.mkdir(parents=True, exist_ok=True)
            curve = left.pop(0)
            if isinstance(curve, Exception):
                raise curve
            done = []
            ran.append(done)
            for epoch, value in enumerate(curve):
                if isinstance(value, BaseException):
                    raise value
                done.append(value)
                if on_epoch({"epoch": epoch, "NDCG@10": value}):
                    break
            training = {"kept_epochs": len(done), "best": {"NDCG@10": max(done)}}
            return SimpleNamespace(artifact=SimpleNamespace(metadata={"training": training}))

        monkeypatch.setattr(trials, "fit", fit)
        return ran

    return replaced


def test_a_trial_below_the_median_is_pruned_and_a_late_one_is_not(plan, script):
    good = [0.1, 0.2, 0.3, 0.4]
    ran = script([good, good, good, [0.0, 0.0, 0.1, 0.9], good, [0.0, 0.0, 0.5, 0.6]])
    work(plan, StopRequest(), split=object())
    study = open_study(plan.folder)
    assert [trial.state.name for trial in finished(study)] == ["COMPLETE"] * 3 + ["PRUNED"] + ["COMPLETE"] * 2
    assert ran[3] == [0.0, 0.0, 0.1], "two epochs in any case, then the median of the third decides"
    assert [score(trial) for trial in finished(study)] == [0.4, 0.4, 0.4, 0.1, 0.4, 0.6]
    assert best_trial(study).number == 5


def test_the_budget_ends_a_trial_after_its_epoch_with_what_it_has(plan, script):
    ran = script([[0.1, 0.2, 0.3]] * 3)
    work(replace(plan, deadline=time.time() - 1), StopRequest(), split=object())
    assert not ran, "no trial begins after the deadline"
    calls = []

    def clock():
        calls.append(1)
        return 0.0 if len(calls) < 3 else 2.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "time", SimpleNamespace(time=clock, monotonic=time.monotonic))
        work(replace(plan, deadline=1.0), StopRequest(), split=object())
    study = open_study(plan.folder)
    assert ran == [[0.1, 0.2]] and best_trial(study).value == 0.2
    assert describe(study, metric="NDCG@10", baselines={}, default=0)["trials"][0]["state"] == "cut"


def test_a_failed_trial_is_reported_and_the_search_continues(plan, script):
    script([[0.1], InputError("training: the model has diverged"), *[[0.2]] * 5])
    work(plan, StopRequest(), split=object())
    study = open_study(plan.folder)
    assert [trial.state.name for trial in study.trials][:3] == ["COMPLETE", "FAIL", "COMPLETE"]
    document = describe(study, metric="NDCG@10", baselines={}, default=0)
    assert document["trials"][1]["error"] == "training: the model has diverged"
    assert document["trials"][1]["value"] is None and document["best"] == 2


def test_an_interrupted_trial_waits_with_its_number_its_choices_and_its_checkpoint(plan, script):
    script([[0.1], [0.3, Interrupted("stop")]])
    stop = StopRequest()
    work(plan, stop, split=object())
    study = open_study(plan.folder)
    assert stop.is_made and [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING"]
    assert (plan.folder / "trials" / "0001").is_dir() and not (plan.folder / "trials" / "0000").exists()
    assert best_trial(study).number == 1, "what it has found so far counts"
    chosen, seconds = study.trials[1].params, spent(study, 1)
    assert requeue_stopped(plan.folder) == 1
    ran = script([[0.3, 0.4], *[[0.1]] * 4])
    work(plan, StopRequest(), split=object())
    study = open_study(plan.folder)
    again = study.trials[1]
    assert (again.params, again.value, again.intermediate_values) == (chosen, 0.4, {0: 0.3, 1: 0.4})
    assert ran[0] == [0.3, 0.4] and len(finished(study)) == 6 and spent(study, 1) >= seconds


@pytest.mark.slow
def test_the_parameter_that_decides_is_the_important_one(plan, monkeypatch):
    def fit(split, config, *, directory, resume, progress, on_epoch):
        value = {8: 0.1, 16: 0.2, 32: 0.5}[config.item_tower.dimension] + 0.001 * config.training.learning_rate
        training = {"kept_epochs": 1, "best": {"NDCG@10": value}}
        return SimpleNamespace(artifact=SimpleNamespace(metadata={"training": training}))

    monkeypatch.setattr(trials, "fit", fit)
    work(replace(plan, trials=7), StopRequest(), split=object())
    assert importances(open_study(plan.folder)) == {}, "too few trials to say"
    work(replace(plan, trials=40), StopRequest(), split=object())
    study = open_study(plan.folder)
    assert next(iter(importances(study))) == "item_tower.dimension"
    assert best_trial(study).params["item_tower.dimension"] == "32"
