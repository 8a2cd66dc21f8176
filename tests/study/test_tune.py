"""The search end to end: a killed and resumed study is the same study, and the folder is a run folder in the end."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from twotower.cli import main as cli
from twotower.comparison import evaluate_folder
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.evaluation.baselines import fit_baselines
from twotower.run import train_run
from twotower.run.run_folder import LOCK
from twotower.serving import Retriever
from twotower.study import Budget, tune_run
from twotower.study.document import best_so_far, best_trial
from twotower.study.trials import StopRequest, finished, open_study, score

pytest.importorskip("optuna")

QUICK = ("training.max_epochs=2", "training.batch_size=64", "training.accelerator=cpu", "evaluation.baselines=false")
SPACE = """
model: {options: {linear: {}, next-item: {training.question: next}}}
item_tower.dimension: [null, 8]
training.learning_rate: {low: 0.0001, high: 0.1, log: true, default: 0.001}
query_tower.dropout: {values: [0.3, 0.0], when: {model: [next-item]}}
"""


@pytest.fixture(scope="module")
def purchases(tmp_path_factory, interactions_csv):
    folder = tmp_path_factory.mktemp("tune")
    (folder / "space.yaml").write_text(SPACE)
    return interactions_csv(folder / "purchases.csv")


def tune(purchases, out, *, trials, changes=QUICK, on_message=lambda message: None, **options):
    return tune_run(
        purchases,
        out,
        Budget(3600),
        changes=changes,
        space=purchases.with_name("space.yaml"),
        trials=trials,
        on_message=on_message,
        **options,
    )


def history(out):
    """Return what the finished trials of a study chose and found, in order."""
    return [
        (trial.params, trial.state.name, sorted(trial.intermediate_values.items()), score(trial))
        for trial in finished(open_study(out / "study"))
    ]


def begun(database, trial):
    """Return whether a trial has been validated, without a lock on the database."""
    if not database.is_file():
        return False
    found = (
        "SELECT COUNT(*) FROM trial_intermediate_values v JOIN trials t ON v.trial_id = t.trial_id WHERE number >= ?"
    )
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute(found, (trial,)).fetchone()[0] > 0
        except sqlite3.OperationalError:  # the tables are being created
            return False


@pytest.fixture(scope="module")
def tuned(purchases):
    out = purchases.parent / "tuned"
    return out, tune(purchases, out, trials=5, changes=QUICK[:-1])


def test_the_first_trial_has_the_defaults_and_the_best_is_trained_and_refitted(purchases, tuned):
    out, found = tuned
    trials = found.document["trials"]
    assert len(trials) == 5 and trials[0]["changed"] == []
    study = open_study(out / "study")
    best = best_trial(study)
    assert best.number == max(trials, key=lambda one: one["value"])["number"]
    config = Config.load(out / "config.yaml")
    assert config.training.refit
    model = json.loads((out / "validated" / "metadata.json").read_text())
    assert model["training"]["best"]["NDCG@10"] == best.value, "the same run again: the same seed, the same data"
    assert len(Retriever.load(out).recommend(["u001"], k=3)) == 3
    assert evaluate_folder(out).to_dict() == json.loads((out / "results.json").read_text()) == found.document["test"]
    assert not (out / "study" / LOCK).exists() and not list((out / "study").glob("trials/*"))


def test_the_default_trial_is_what_train_trains(purchases, tuned, tmp_path):
    model, _ = train_run(
        purchases, tmp_path / "run", Config.load(None, list(QUICK)), progress=False, on_message=lambda message: None
    )
    assert model.artifact.metadata["training"]["best"]["NDCG@10"] == tuned[1].document["trials"][0]["value"]


def test_baselines_are_those_of_the_validation(tuned, planted_data):
    from twotower.data import by_time
    from twotower.evaluation import evaluate_all

    split = by_time(planted_data, 0.05, 0.1, histories=True)
    fitted = fit_baselines(split.train, split.validation)
    measured = evaluate_all(fitted.rankers, split.validation, train=split.train, ks=(10,))
    found = tuned[1].document["baselines"]
    assert {name: one["value"] for name, one in found.items()} == {
        row.name: pytest.approx(row.values["NDCG@10"]) for row in measured.rows
    }
    assert "l2 = " in found["EASE"]["settings"]


def test_reports_show_the_curve_and_what_was_chosen(tuned):
    out, _ = tuned
    page = (out / "tune.html").read_text()
    for text in ("Best so far", "Test of the chosen model", "The chosen settings", "EASE", "twotower train"):
        assert text in page
    document = json.loads((out / "tune.json").read_text())
    values = [value for _, value in best_so_far([one for one in document["trials"] if one["value"] is not None])]
    assert values == sorted(values) and values[-1] == max(one["value"] for one in document["trials"])
    assert document["chosen"]["command"].endswith("--refit")


@pytest.mark.slow
def test_a_killed_and_resumed_search_is_the_same_study(purchases, tmp_path):
    """SIGKILL in the middle of a trial; resumed, every trial has the choices and results of a search in one go."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(purchases, whole, trials=5, refits=False)
    words = ["tune", purchases, "--out", cut, "--space", purchases.with_name("space.yaml"), "--budget", "1h"]
    words += [word for change in QUICK for word in ("--set", change)] + ["--trials", "5", "--no-refit"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not begun(cut / "study" / "study.db", trial=2):
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = history(cut)
    assert 2 <= len(before) < 5, "it must have been killed in the middle"
    tune(purchases, cut, trials=5, refits=False)
    assert history(cut)[: len(before)] == before
    assert history(cut) == history(whole)


def test_ctrl_c_ends_with_what_was_found_and_the_same_call_continues(purchases, tmp_path):
    out = tmp_path / "run"

    def interrupt(message):
        if "trial 1:" in str(message):
            os.kill(os.getpid(), signal.SIGTERM)

    found = tune(purchases, out, trials=4, refits=False, on_message=interrupt)
    assert len(found.document["trials"]) == 2 and (out / "model").is_dir()
    said = []
    again = tune(purchases, out, trials=4, refits=False, on_message=lambda message: said.append(str(message)))
    assert any("resuming the study: 2 trials are finished" in message for message in said)
    assert len([one for one in again.document["trials"] if one["value"] is not None]) == 4
    assert (out / "model").is_dir()


def test_a_finished_search_of_the_same_budget_trains_nothing_again(purchases, tuned):
    out, found = tuned
    written = (out / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    said = []
    again = tune(purchases, out, trials=5, changes=QUICK[:-1], on_message=lambda message: said.append(str(message)))
    assert any("the search is over" in message for message in said)
    assert again.document["trials"] == found.document["trials"]
    assert (out / "checkpoints" / "last.ckpt").stat().st_mtime_ns == written


@pytest.mark.slow
def test_workers_share_the_trials(purchases, tmp_path):
    found = tune(purchases, tmp_path / "run", trials=4, workers=2, refits=False)
    trials = [one for one in found.document["trials"] if one["value"] is not None]
    assert len(trials) >= 4 and trials[0]["changed"] == []
    assert (tmp_path / "run" / "model").is_dir()


def test_another_study_or_model_in_the_folder_is_rejected(purchases, tuned, tmp_path):
    out = tuned[0]
    with pytest.raises(InputError, match="a study that differs in its settings; use the same settings again"):
        tune(purchases, out, trials=5, changes=(*QUICK[:-1], "training.weight_decay=0.5"))
    with pytest.raises(InputError, match="a study that differs in its space"):
        tune_run(purchases, out, Budget(60), changes=QUICK[:-1], trials=5, on_message=lambda message: None)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match="already contains a model that was not tuned; choose another --out"):
        tune(purchases, tmp_path / "mine", trials=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.windows=2",), r"^data\.windows: tune searches with one window"),
        (("data.split=leave-last-out", "data.validation_queries=0"), "^tune: the split has no validation"),
        (("training.time_limit='00:01:00:00'",), r"^--refit: training\.time_limit"),
        (("objective.sources=[{magic: {}}]",), "^tune: the defaults cannot be trained: "),
    ],
)
def test_a_search_without_meaning_is_rejected(purchases, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tune(purchases, tmp_path / "run", trials=2, changes=(*QUICK, *changes))


def test_budgets():
    seconds = {"90s": 90, "30m": 1800, "2h": 7200, "1h30m": 5400}
    assert {text: Budget.parse(text).seconds for text in seconds} == seconds
    for text in ("", "30", "0m", "m", "-5m", "1d", "30 minutes"):
        with pytest.raises(InputError, match=r"--budget: .*; expected a time such as 90s, 30m, 2h or 1h30m"):
            Budget.parse(text)


def test_without_optuna_the_error_names_the_extra(purchases, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(sys, "argv", ["twotower", "tune", str(purchases), "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "twotower tune needs optuna: pip install 'twotower[tune]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_a_second_signal_ends_at_once():
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_made
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
