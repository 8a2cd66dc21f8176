"""Run folders: one run at a time, refused early if it cannot succeed, resumed with the settings it began with."""

import json
import shutil

import pytest

from twotower.comparison import evaluate_folder
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.run import train_run
from twotower.run.run_folder import LOCK, MARKER, is_run, reserved
from twotower.serving import Retriever

SMALL = [
    "training.batch_size=64",
    "training.learning_rate=0.01",
    "training.max_epochs=2",
    "training.accelerator=cpu",
    "item_tower.dimension=16",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
    "data.split=leave-last-out",
]


def train(source, out, *changes, on_message=lambda message: None, **options):
    config = Config.load(None, [*SMALL, *changes])
    return train_run(source, out, config, progress=False, on_message=on_message, **options)


def contents(folder):
    """Return the content of each file of a run that a second run must not change."""
    names = ["config.yaml", "inputs.json", "results.json", "model/towers.safetensors", "model/items.safetensors"]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def purchases(tmp_path_factory, interactions_csv):
    return interactions_csv(tmp_path_factory.mktemp("run") / "purchases.csv")


@pytest.fixture(scope="module")
def finished(purchases):
    """A run that ended early: the validation metric did not improve once."""
    out = purchases.parent / "finished"
    train(purchases, out, "training.max_epochs=30", "training.patience=1")
    return out


def test_a_second_run_into_the_same_folder_is_refused(purchases, tmp_path):
    refusals = []

    def again(message):
        del message
        with pytest.raises(InputError) as refusal:
            train(purchases, tmp_path / "run", "training.seed=1", replace=True)
        refusals.append(str(refusal.value))

    train(purchases, tmp_path / "run", on_message=again)
    assert set(refusals) == {
        f"{tmp_path / 'run'}: in use by another run; wait until that run has ended, or choose another --out"
    }
    assert Config.load(tmp_path / "run" / "config.yaml").training.seed == 0
    assert not (tmp_path / "run" / LOCK).exists()
    train(purchases, tmp_path / "run", replace=True)  # the folder is free again


@pytest.mark.parametrize("spelling", ["run", "link", "../{name}/run", "run/"])
@pytest.mark.parametrize("options", [{"replace": True}, {"resume": True}, {}])
def test_a_folder_in_use_is_refused_however_it_is_named(purchases, tmp_path, monkeypatch, spelling, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run", target_is_directory=True)
    with reserved(tmp_path / "run"):
        for name in ("checkpoints", "model"):
            (tmp_path / "run" / name).mkdir()
        with pytest.raises(InputError, match="in use by another run"):
            train(purchases, spelling.format(name=tmp_path.name), **options)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "model"]


def test_a_run_folder_with_any_name_is_found_again(purchases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "-m[1]*? {a,b}%20\n~"
    model, _ = train(purchases, name, "training.max_epochs=1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    train(purchases, name, "training.max_epochs=1", resume=True)
    found = Retriever.load(name).recommend(["u001"], k=3)
    assert found["item"].to_list() == model.retriever.recommend(["u001"], k=3)["item"].to_list()


def test_an_output_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: is a file; choose a folder for --out$"):
        train("nowhere.csv", tmp_path / "file")
    with pytest.raises(InputError, match=r"file/run: cannot be written \(Not a directory\); choose another --out$"):
        train("nowhere.csv", tmp_path / "file" / "run")
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        train("nowhere.csv", tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "a run that fails at once leaves no empty folder"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["checkpoints/epoch3.pt", "results.json", "logs/train.log", "inputs.json"])
def test_files_of_others_are_never_replaced(purchases, tmp_path, name, force):
    path = tmp_path / "project" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": []}')
    (tmp_path / "project" / "config.yaml").write_text(Config().to_yaml())  # settings do not make it a run
    with pytest.raises(InputError, match=rf"not a run folder, but it contains '{name.split('/')[0]}'; choose"):
        train(purchases, tmp_path / "project", replace=force)
    assert path.read_text() == '{"mine": []}'


def test_runs_of_older_versions_are_recognized(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    assert (run / MARKER).is_file() and is_run(run)
    (run / MARKER).unlink()
    assert is_run(run)
    shutil.rmtree(run / "checkpoints")
    assert is_run(run)
    shutil.rmtree(run / "model")
    assert is_run(run), "interrupted before its first checkpoint"
    (run / "inputs.json").unlink()
    assert not is_run(run)


@pytest.mark.parametrize(
    "change",
    [
        "training.learning_rate=0.02",
        "training.weight_decay=0.5",
        "training.seed=5",
        "training.batch_size=32",
        "training.precision=bf16-mixed",
        "objective.strength=0.5",
        "query_tower.dropout=0.4",
        "data.split=time",
    ],
)
def test_resume_refuses_a_setting_that_it_would_not_apply(purchases, finished, change):
    before = contents(finished)
    name = change.split("=")[0]
    with pytest.raises(InputError, match=f"config.yaml: {name} is .*, but .* was requested, and --resume would not"):
        train(purchases, finished, "training.max_epochs=30", "training.patience=1", change, resume=True)
    assert contents(finished) == before


def test_resume_applies_how_long_to_train(purchases, tmp_path):
    train(purchases, tmp_path / "run")
    model, _ = train(purchases, tmp_path / "run", "training.max_epochs=3", "evaluation.ks=[5]", resume=True)
    assert model.fit.epochs == 3 and len(model.fit.history) == 3
    assert Config.load(tmp_path / "run" / "config.yaml").training.max_epochs == 3


def test_resuming_a_finished_run_changes_nothing(purchases, finished):
    before = contents(finished)
    training = json.loads((finished / "model" / "metadata.json").read_text())["training"]
    assert training["epochs"] < 30, "the run must have stopped early"
    model, _ = train(purchases, finished, "training.max_epochs=30", "training.patience=1", resume=True)
    assert contents(finished) == before
    again = json.loads((finished / "model" / "metadata.json").read_text())["training"]
    assert (again["epochs"], again["history"], again["best"]) == tuple(
        training[name] for name in ("epochs", "history", "best")
    )
    assert training["seconds"] > 0 and again["seconds"] == pytest.approx(training["seconds"], abs=2)
    assert model.fit.best == training["best"]["NDCG@10"]


def test_a_finished_run_of_an_older_version_that_was_resumed_has_a_report(finished):
    path = finished / "model" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["training"] |= {"seconds": 0.0, "cpu_seconds": 0.0}  # as older versions wrote it
    path.write_text(json.dumps(metadata))
    path.with_name("SHA256SUMS").unlink()  # as in older versions
    evaluate_folder(finished, page=finished / "report.html")
    assert "Time and memory" not in (finished / "report.html").read_text(), "unknown times are left out"


def test_a_run_that_diverges_says_when_and_what_to_lower(purchases, tmp_path):
    with pytest.raises(InputError) as refusal:
        train(purchases, tmp_path / "run", "training.learning_rate=1e6", "objective.similarity=dot")
    message = str(refusal.value)
    assert message.startswith("training: the model has diverged in epoch 1 (") and "\n" not in message
    assert message.endswith("lower training.learning_rate (now 1e+06)")
    assert not (tmp_path / "run" / "model").exists()
