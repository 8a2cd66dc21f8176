"""Tests of the loggers: the log of a training run is read back with each system's own reader."""

import os
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import pytest

import twotower as tt
from twotower.errors import InputError
from twotower.training import loggers

#: Diagnostics of the candidates during training.
DIAGNOSTICS = {"effective_candidates", "masked_share", "uncertainty", "gradient_tail"}


def config(name):
    return tt.Config.load(
        None,
        [
            "training.max_epochs=1",
            "training.batch_size=16",  # 75 steps per epoch, enough for diagnostics
            "item_tower.dimension=8",
            "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
            f"training.logger={name}",
        ],
    )


@pytest.fixture
def trained(planted_split, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # so that monkeypatch restores it: the logger sets it

    def train(name, **settings):
        return tt.fit(planted_split, config(name), directory=tmp_path / name, progress=False, **settings)

    return train


def best(model):
    return [row["NDCG@10"] for row in model.fit.history]


def test_csv_is_the_default(trained, tmp_path):
    assert tt.Config().training.logger == "csv"
    model = trained("csv")
    frame = pl.read_csv(tmp_path / "csv" / "logs" / "metrics.csv")
    assert set(frame.columns) >= {"loss", "NDCG@10", *DIAGNOSTICS}
    assert frame["NDCG@10"].drop_nulls().to_list() == pytest.approx(best(model))


def test_tensorboard_reads_it_back(trained, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = trained("tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard" / "logs")).Reload()
    assert set(events.Tags()["scalars"]) >= {"loss", "NDCG@10", *DIAGNOSTICS}
    assert [event.value for event in events.Scalars("NDCG@10")] == pytest.approx(best(model), rel=1e-5)


def test_mlflow_reads_it_back_from_a_file_store(trained, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    model = trained("mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlflow" / "logs" / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("twotower").experiment_id])
    assert run.info.run_name == "mlflow" and run.info.status == "FINISHED"
    assert set(run.data.metrics) >= {"loss", "NDCG10", *DIAGNOSTICS}  # MLflow allows no @ in a name
    logged = client.get_metric_history(run.info.run_id, "NDCG10")
    assert [entry.value for entry in sorted(logged, key=lambda e: e.step)] == pytest.approx(best(model), rel=1e-5)
    assert run.data.params["objective/name"] == "expected-count"


def test_mlflow_uses_the_uri_of_the_environment_and_continues_its_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    first = loggers.make_logger("mlflow", tmp_path / "run")
    again = loggers.make_logger("mlflow", tmp_path / "run")
    assert first.run_id == again.run_id
    assert Path(urlsplit(os.environ["MLFLOW_TRACKING_URI"]).path).is_dir()
    assert not (tmp_path / "run" / "logs" / "mlflow").exists()


def test_none_logs_nothing(trained, tmp_path):
    trained("none")
    assert not (tmp_path / "none" / "logs").exists()


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tensorboard"), ("mlflow", "tracking")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name, extra):
    monkeypatch.setattr(loggers, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=rf"training.logger: {name} .*twotower\[{extra}\]"):
        loggers.make_logger(name, tmp_path)
