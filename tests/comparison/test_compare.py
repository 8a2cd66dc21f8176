"""End-to-end tests of `twotower compare` on a small file: trained once, interrupted, resumed, refused, reported."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time

import polars as pl
import pytest

from support.command_line import command
from twotower.comparison import compare, processes
from twotower.comparison.cells import Cell, differences, make_cells
from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator
from twotower.errors import InputError, Interrupted
from twotower.evaluation import BASELINES
from twotower.run import read_data, split_data, train_run

#: A single process.
ALONE = Coordinator(Communicator())

SETTINGS = [
    "data.split=leave-last-out",
    "training.max_epochs=2",
    "training.batch_size=64",
    "item_tower.dimension=8",
]
OBJECTIVES = ["in-batch", "in-batch-logq"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, interactions_csv):
    """Make a data file and a finished comparison of two objectives with one seed, by the command itself."""
    path = tmp_path_factory.mktemp("compare")
    interactions_csv(path / "purchases.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "AUDIT_ROWS", 4)
        patch.setattr(compare, "AUDIT_DRAWS", 4)
        command(path, patch, *words())
    return path


def words(*more):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["compare", "purchases.csv", "--objectives", ",".join(OBJECTIVES), "--seeds", "1", "--out", "out",
            "--items", "products.csv", *settings, *more]  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """Record the command line of every training process that is started."""
    seen, real = [], subprocess.Popen

    def popen(given, **options):
        seen.append(given)
        return real(given, **options)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    return seen


def cells_of(path, patch, *changes, objectives=OBJECTIVES, seeds=1):
    patch.chdir(path)
    base = Config.load(None, [*SETTINGS, "data.items=products.csv", *changes])
    data = read_data("purchases.csv", base.data)
    return make_cells(base, objectives, seeds, path / "out", split_data(data, base.data)), data


def test_every_output_is_written(folder):
    out = folder / "out"
    assert {path.name for path in (out / "runs").iterdir()} == {"in-batch-0", "in-batch-logq-0"}
    for run in (out / "runs").iterdir():
        assert {"config.yaml", "model", "results.json", "logs"} <= {path.name for path in run.iterdir()}
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {model["name"] for model in document["models"]} == set(OBJECTIVES)
    assert {row["name"] for row in document["baselines"]} == set(BASELINES)
    assert {one["name"] for one in document["audit"]["objectives"]} == set(OBJECTIVES)
    assert set(document["calibration"]) == set(OBJECTIVES)
    assert all(run["peak_memory"] > 0 and run["cpu_seconds"] > 0 for m in document["models"] for run in m["runs"])
    assert document["command"].startswith("twotower compare purchases.csv --objectives in-batch,in-batch-logq")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Which objective should you use" in page and "Item number" in page


def test_the_values_of_each_query_average_to_the_results(folder):
    frame = pl.read_parquet(folder / "out" / "results.parquet")
    document = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert frame.height == 6 * document["evaluation"]["num_queries"]
    means = dict(frame.group_by("model").agg(pl.col("NDCG@10").mean()).iter_rows())
    for entry in [*document["models"], *document["baselines"]]:
        assert means[entry["name"]] == pytest.approx(entry["values"]["NDCG@10"]["mean"], abs=1e-5)
    assert frame["query"].dtype == pl.String and frame.filter(pl.col("model") == "popularity")["seed"].is_null().all()


def test_a_cell_equals_a_run_of_train(folder, monkeypatch, tmp_path):
    (cell, *_), _ = cells_of(folder, monkeypatch)
    train_run("purchases.csv", tmp_path / "run", cell.config, progress=False, on_message=lambda text: None)
    weights = "model/towers.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (cell.directory / weights).read_bytes()


def test_cells_differ_only_in_objective_and_seed(folder, monkeypatch):
    cells, _ = cells_of(folder, monkeypatch, seeds=2)
    assert [cell.seed for cell in cells] == [0, 0, 1, 1], "all objectives of the first seed first"
    for cell in cells[1:]:
        assert set(differences(cells[0].config, cell.config)) <= {"objective.name", "training.seed"}


def test_known_positives_are_masked_for_all_objectives_or_for_none(folder, monkeypatch, tmp_path):
    (tmp_path / "own.yaml").write_text("{name: mixed, mask_known_positives: false}\n")
    for objectives, expected in (
        (["in-batch", "in-batch-logq"], [True, True]),
        (["in-batch", "mixed"], [None, None]),
        (["expected-count", f"own={tmp_path / 'own.yaml'}"], [True, False]),
    ):
        cells, _ = cells_of(folder, monkeypatch, objectives=objectives)
        assert [cell.config.objective.mask_known_positives for cell in cells] == expected
    cells, _ = cells_of(folder, monkeypatch, "objective.mask_known_positives=false", objectives=["in-batch-logq"])
    assert cells[0].config.objective.mask_known_positives is False


def test_results_of_someone_else_are_not_replaced(folder, monkeypatch, capsys):
    (folder / "theirs").mkdir()
    (folder / "theirs" / "results.json").write_text("theirs")
    given = ["compare", "purchases.csv", "--objectives", "in-batch", "--seeds", "1", "--out", "theirs"]
    assert command(folder, monkeypatch, *given) == 2
    assert "comparison, because it contains 'results.json'" in " ".join(capsys.readouterr().err.split())
    assert (folder / "theirs" / "results.json").read_text() == "theirs" and not (folder / "theirs" / "runs").exists()


def test_finished_runs_are_not_repeated(folder, monkeypatch, started, capsys):
    monkeypatch.setattr(compare, "AUDIT_ROWS", 4)
    monkeypatch.setattr(compare, "AUDIT_DRAWS", 4)
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*")}
    audit = (folder / "out" / "audit.json").stat().st_mtime_ns
    # Evaluation settings do not affect training.
    assert command(folder, monkeypatch, *words("--set", "evaluation.ks=[5]", "--json")) == 0
    assert started == []
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*")}
    assert audit == (folder / "out" / "audit.json").stat().st_mtime_ns
    assert json.loads(capsys.readouterr().out)["metric"] == "NDCG@5"
    assert command(folder, monkeypatch, *words("--no-audit")) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 runs are already finished" in printed and "The report is in" in printed


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(folder, monkeypatch, started, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.copy(folder / "purchases.csv", tmp_path)
    shutil.copy(folder / "products.csv", tmp_path)
    cut = tmp_path / "out" / "runs" / "in-batch-0"
    (cut / "results.json").unlink()
    shutil.rmtree(cut / "model")
    cells, data = cells_of(tmp_path, monkeypatch)
    assert [cell.state(data.fingerprint) for cell in cells] == ["interrupted", "finished"]
    said = []
    processes.train_cells(
        "purchases.csv", cells, data.fingerprint, tmp_path / "out", ALONE, jobs=1, on_message=said.append
    )
    (given,) = started
    assert "--resume" in given and str(cells[0].directory) in given
    assert "in-batch, seed 0 resumed" in said[1]
    assert [cell.state(data.fingerprint) for cell in cells] == ["finished", "finished"]


def test_ctrl_c_leaves_a_checkpoint(folder, monkeypatch, tmp_path):
    for name in ("purchases.csv", "products.csv"):
        shutil.copy(folder / name, tmp_path)
    cells, data = cells_of(tmp_path, monkeypatch, "training.max_epochs=100000", "training.patience=100000")
    last = cells[0].directory / "checkpoints" / "last.ckpt"
    before = signal.getsignal(signal.SIGINT)  # ignored if a shell runs the tests in the background

    def press():
        for _ in range(1200):
            if last.exists():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(Interrupted, match="0 of 2 runs are finished"):
        processes.train_cells(
            "purchases.csv", cells, data.fingerprint, tmp_path / "out", ALONE, jobs=1, on_message=lambda text: None
        )
    thread.join()
    assert [cell.state(data.fingerprint) for cell in cells] == ["interrupted", "new"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failed_run_is_reported(folder, monkeypatch, tmp_path):
    cells, data = cells_of(folder, monkeypatch, "training.seed=7", objectives=["in-batch"])
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed; in-batch, seed 7 ended with code 2: .*nowhere.csv"):
        processes.train_cells(
            "nowhere.csv", cells, data.fingerprint, tmp_path, ALONE, jobs=1, on_message=lambda text: None
        )


@pytest.mark.parametrize(
    ("change", "field"),
    [("training.learning_rate=0.5", "training.learning_rate"), ("objective.strength=0.5", "objective.strength")],
)
def test_other_settings_are_refused_before_anything_is_trained(folder, monkeypatch, started, capsys, change, field):
    assert command(folder, monkeypatch, *words("--set", change)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert field in said and "0.5 was requested" in said and started == []


def test_other_data_is_refused(folder, monkeypatch):
    (cell, *_), _ = cells_of(folder, monkeypatch)
    with pytest.raises(InputError, match="trained on different data"):
        cell.state("f" * 64)


def test_two_paths_to_the_same_file_are_the_same_setting(folder, monkeypatch):
    monkeypatch.chdir(folder)
    one, other = (
        Config.load(None, [f"data.items={name}"])
        for name in ("products.csv", str(folder / "out" / ".." / "products.csv"))
    )
    assert differences(one, other) == {}
    assert differences(one, Config.load(None, ["data.items=others.csv"]))


def test_objectives_from_files(folder, monkeypatch, tmp_path):
    (tmp_path / "wide.yaml").write_text("name: expected-count\nsources: [{uniform: {size: 32}}]\n")
    (tmp_path / "b.yaml").write_text("objective: {name: mixed, strength: 0.5}\n")
    given = [str(tmp_path / "wide.yaml"), f"half={tmp_path / 'b.yaml'}", "in-batch"]
    cells, _ = cells_of(folder, monkeypatch, objectives=given)
    assert [cell.name for cell in cells] == ["wide", "half", "in-batch"]
    assert cells[0].config.objective.sources == [{"uniform": {"size": 32}}]
    assert cells[1].config.objective.strength == 0.5 and cells[2].config.objective.sources is None


@pytest.mark.parametrize(
    ("objectives", "changes", "message"),
    [
        (["magic"], [], "unknown objective 'magic'"),
        (["in-batch", "in-batch"], [], "in-batch is named twice"),
        (["x=nowhere.yaml"], [], "nowhere.yaml: cannot be read"),
        (["a/b=purchases.csv"], [], "'a/b' is not a valid folder name"),
        (["x=purchases.csv"], [], "purchases.csv: "),
        ([], [], "expected at least one name"),
        (["mixed"], ["objective.sources=[{in_batch: {}}]"], "each compared objective has its own"),
    ],
)
def test_wrong_objectives(folder, monkeypatch, objectives, changes, message):
    with pytest.raises(InputError, match=message):
        cells_of(folder, monkeypatch, *changes, objectives=objectives)


def test_evaluate_writes_the_report_of_one_model(folder, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder / "out" / "runs" / "in-batch-logq-0", run)
    before = {path.name for path in run.iterdir()}
    assert command(folder, monkeypatch, "evaluate", run, "--no-report", "--json") == 0
    values = json.loads(capsys.readouterr().out)["rows"][0]["values"]
    assert {path.name for path in run.iterdir()} == before
    assert command(folder, monkeypatch, "evaluate", run) == 0
    assert {path.name for path in run.iterdir()} - before == {"report.html", "per_query.parquet"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{values['NDCG@10']:.4f}" in page and "How good is this model" in page
    assert command(folder, monkeypatch, "evaluate", run, "--report", tmp_path / "elsewhere.html") == 0
    assert (tmp_path / "elsewhere.html").exists()


@pytest.mark.parametrize(
    "setting", ["guard={}", "sources=[{mined: {size: 2, ranks: [2, 5], skipped: mask}}, {in_batch: {}}]"]
)
def test_objectives_without_the_whole_softmax_are_not_audited(tmp_path, setting):
    one = Cell("one", 0, Config.load(None, [f"objective.{setting}"]), tmp_path, 1)
    with pytest.raises(InputError, match=r"objective\..*: the audit compares .*; pass --no-audit") as error:
        compare._require_softmax([one])
    assert "\n" not in str(error.value)
