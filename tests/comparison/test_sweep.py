"""Tests of `twotower compare --sweep`: the settings of every value, the curve in the document, and its figures."""

import json
import math
import shutil

import numpy as np
import polars as pl
import pytest

from planted import planted, planted_titles
from support.command_line import command, train_here
from twotower.comparison import Sweep, processes
from twotower.comparison.cells import make_cells
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.report import render
from twotower.run import read_data, split_data
from twotower.serving import Retriever

SETTINGS = [
    "data.split=leave-last-out",
    "data.catalog=table",
    "training.max_epochs=1",
    "training.batch_size=64",
    "item_tower.dimension=8",
]
NEVER_SEEN = [100, 101, 102]


def words(*more):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["compare", "purchases.csv", "--objectives", "mixed", "--seeds", "1", "--out", "out", "--no-audit",
            "--sweep", "objective.uniform=0,64", "--items", "products.csv", *settings, *more]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a data file, an item table with three items that have no rows, and a finished sweep."""
    path = tmp_path_factory.mktemp("sweep")
    planted().write_csv(path / "purchases.csv")
    extra = pl.DataFrame({"item_id": NEVER_SEEN, "title": ["New"] * 3})
    pl.concat([planted_titles(), extra]).write_csv(path / "products.csv")
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch)
        assert command(path, patch, *words()) == 0
    return path


def cells_of(path, patch, sweep, *changes, objectives=("mixed",)):
    patch.chdir(path)
    base = Config.load(None, [*SETTINGS, "data.items=products.csv", *changes])
    data = read_data("purchases.csv", base.data)
    return make_cells(base, objectives, 1, path / "out", split_data(data, base.data), sweep=Sweep.parse(sweep))


def test_the_curve_is_in_the_document(folder):
    document = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    models = {model["name"]: model for model in document["models"]}
    found = document["sweep"]
    trained = (
        planted()
        .sort("timestamp", maintain_order=True)
        .group_by("user_id")
        .agg(pl.col("item_id").slice(0, pl.len() - 2))
    )
    assert found["setting"] == "objective.uniform"
    assert found["never_seen_items"] == 103 - trained.explode("item_id")["item_id"].n_unique() >= 3
    (curve,) = found["curves"]
    assert [point["value"] for point in curve["points"]] == [0, 64]
    for point in curve["points"]:
        model = models[point["model"]]
        assert point["quality"]["mean"] == model["values"]["NDCG@10"]["mean"] > 0
        assert point["tail"]["mean"] == model["slices"]["tail"]["Recall@10"]["mean"]
        assert 0.0 <= point["never_seen_listed"] <= 1.0
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "What does objective.uniform do" in page and "Never-seen items among the recommendations by" in page
    assert page == render(document)


def test_the_share_of_never_seen_items_is_that_of_the_lists(folder):
    base = Config.load(None, [*SETTINGS, f"data.items={folder / 'products.csv'}"])
    split = split_data(read_data(str(folder / "purchases.csv"), base.data), base.data)
    document = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    unseen = split.train.item_counts() == 0
    for point in document["sweep"]["curves"][0]["points"]:
        ranked = Retriever.load(folder / "out" / "runs" / f"{point['model']}-0").rank(split.test, 10, True)
        assert point["never_seen_listed"] == pytest.approx(float(np.mean(unseen[ranked[ranked >= 0]])), rel=1e-5)


@pytest.mark.slow
def test_a_finished_sweep_is_not_repeated_and_an_extended_one_adds_a_run(folder, monkeypatch, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    seen, real = [], processes.subprocess.Popen
    monkeypatch.setattr(processes.subprocess, "Popen", lambda given, **o: (seen.append(given), real(given, **o))[1])
    assert command(tmp_path / "copy", monkeypatch, *words()) == 0 and seen == []
    assert "2 of 2 runs are already finished" in capsys.readouterr().out
    longer = [word.replace("0,64", "0,64,32") for word in words()]
    assert command(tmp_path / "copy", monkeypatch, *longer) == 0
    assert len(seen) == 1 and any("mixed@32-0" in word for word in seen[0])


def test_a_source_is_resized_added_and_removed(folder, monkeypatch):
    cells = cells_of(folder, monkeypatch, "objective.uniform=0,256")
    assert [cell.name for cell in cells] == ["mixed@0", "mixed@256"]
    assert cells[0].config.objective.sources == [{"in_batch": {}}]
    assert cells[1].config.objective.sources == [{"in_batch": {}}, {"uniform": {"size": 256}}]
    cells = cells_of(folder, monkeypatch, "objective.sources.frequency.power=0.5,0.75", objectives=["nce"])
    powers = [cell.config.objective.sources[0]["frequency"] for cell in cells]
    assert powers == [{"size": 1024, "power": 0.5}, {"size": 1024, "power": 0.75}]
    cells = cells_of(folder, monkeypatch, "objective.memory=8,32", objectives=["expected-count", "mixed"])
    assert [cell.name for cell in cells] == ["expected-count@8", "expected-count@32", "mixed@8", "mixed@32"]
    assert cells[1].config.objective.sources == [
        {"in_batch": {}},
        {"uniform": {"size": 1024}},
        {"memory": {"size": 32}},
    ]


def test_any_number_is_swept_with_the_pool_of_the_settings(folder, monkeypatch):
    pool = "objective.sources=[{in_batch: {}}, {head: {size: 5}}]"
    cells = cells_of(folder, monkeypatch, "training.learning_rate=1e-3,0.01", pool, objectives=[])
    assert [(cell.name, cell.config.training.learning_rate) for cell in cells] == [
        ("expected-count@0.001", 0.001),
        ("expected-count@0.01", 0.01),
    ]
    assert all(cell.config.objective.sources == [{"in_batch": {}}, {"head": {"size": 5}}] for cell in cells)
    by_default = cells_of(folder, monkeypatch, "training.learning_rate=1e-3,0.01", "data.split=time", objectives=[])
    assert all(cell.config.objective.sources == [{"catalog": {}}] for cell in by_default), "as train does"
    by_default = cells_of(folder, monkeypatch, "objective.uniform=0,8", "data.split=time", objectives=[])
    assert by_default[0].config.objective.sources == [{"in_batch": {}}]
    cells = cells_of(folder, monkeypatch, "objective.strength=0,0.5,1")
    assert [cell.config.objective.strength for cell in cells] == [0, 0.5, 1]
    cells = cells_of(folder, monkeypatch, "item_tower.dimension=4,16")
    assert [cell.config.item_tower.dimension for cell in cells] == [4, 16]


@pytest.mark.parametrize(
    ("sweep", "objectives", "message"),
    [
        ("objective.uniform", ["mixed"], "expected section.key=V1,V2"),
        ("uniform=1,2", ["mixed"], "expected section.key=V1,V2"),
        ("objective.uniform=1,x", ["mixed"], "'x' is not a number"),
        ("objective.uniform=1,true", ["mixed"], "'true' is not a number"),
        ("objective.uniform=1,.inf", ["mixed"], "'.inf' is not a number"),
        ("objective.uniform=3,3", ["mixed"], "a value is given twice"),
        ("objective.uniform=3", ["mixed"], "expected 2 to 16 values, found 1"),
        (f"objective.uniform={','.join(map(str, range(17)))}", ["mixed"], "expected 2 to 16 values, found 17"),
        ("data.test=0.1,0.2", ["mixed"], "compared on the same data"),
        ("training.seed=1,2", ["mixed"], "compared on the same data"),
        ("objective.uniform=0,8", ["sampled-softmax-uniform"], "no source of candidates is left"),
        ("objective.uniform=8,16", ["full-softmax"], "includes every item"),
        ("objective.unifrom=8,16", ["mixed"], "unknown source 'unifrom'"),
        ("objective.sources.uniform.colour=1,2", ["mixed"], "unknown setting 'colour'"),
        ("objective.uniform=0.5,2", ["mixed"], "size: expected a whole number, found 0.5"),
        ("objective.sources=1,2", ["mixed"], "expected objective.sources.SOURCE.OPTION"),
        ("objective.sources.uniform.size.x=1,2", ["mixed"], "expected objective.sources.SOURCE.OPTION"),
        ("objective.strength=0.5,2", ["mixed"], "--sweep objective.strength.*less than or equal to 1"),
        ("training.epochs=1,2", ["mixed"], "--sweep training.epochs"),
    ],
)
def test_wrong_sweeps(folder, monkeypatch, sweep, objectives, message):
    with pytest.raises(InputError, match=message):
        cells_of(folder, monkeypatch, sweep, objectives=objectives)


def test_compare_needs_objectives_or_a_sweep(folder, monkeypatch, capsys):
    assert command(folder, monkeypatch, "compare", "purchases.csv", "--out", "other") == 2
    assert "--objectives: expected names to compare" in " ".join(capsys.readouterr().err.split())


def test_a_measure_that_was_not_taken_has_no_figure(folder):
    document = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    for point in document["sweep"]["curves"][0]["points"]:
        point["tail"] = None
    page = render(document)
    assert "The tail by objective.uniform" not in page and "NDCG@10 by objective.uniform" in page
    assert math.isfinite(document["sweep"]["curves"][0]["points"][0]["quality"]["low"])
