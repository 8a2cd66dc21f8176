"""Tests of the command with sharded tables: same model, resumed by other numbers of ranks, larger than one process."""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from distributed.starting import start
from planted import planted
from twotower.serving import Retriever
from twotower.training.checkpoint.io import SafeCheckpointIO

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes, and limits their memory by means of Linux"),
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]


def scenario(what: str, data: Path, folder: Path, *more: str) -> dict:
    start("row_wise.py", what, str(data), str(folder), *more, timeout=1400)
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def found(folder):
    data = folder / "planted.parquet"
    planted(queries=80).write_parquet(data)
    return scenario("shared", data, folder)


def log(folder, name):
    return "".join(path.read_text() for path in sorted(folder.glob(f"{name}.log.*")))


@pytest.mark.parametrize("name", ["two", "three", "resumed-1", "resumed-2", "resumed-3"])
def test_a_model_with_sharded_tables_equals_that_of_one_process(found, folder, name):
    assert set(found[name]) == {0}, log(folder, name)
    if name.startswith("resumed"):
        assert found["stopped"] == [130, 130] and found["stopped at"] >= 12, log(folder, "stopped")
    assert_same_model(folder / name, folder / "one")
    one, other = (json.loads((folder / run / "results.json").read_text()) for run in ("one", name))
    assert one["rows"] and one["num_targets"] == other["num_targets"]
    for row, again in zip(one["rows"], other["rows"], strict=True):
        for metric, value in row["values"].items():
            assert again["values"][metric] == pytest.approx(value, abs=0.01), metric


def assert_same_model(found, expected):
    for file in ("towers.safetensors", "items.safetensors"):
        tensors = load_file(expected / "model" / file)
        for key, value in load_file(found / "model" / file).items():
            torch.testing.assert_close(
                value, tensors[key], rtol=0, atol=1e-5, msg=lambda text, k=key: f"{found.name}, {k}: {text}"
            )


def test_tables_in_torchrec_equal_those_of_one_process(tmp_path):
    planted(queries=80).write_parquet(tmp_path / "planted.parquet")
    june = planted(queries=90, items=130, seed=1).with_columns(pl.col("timestamp") + 100_000_000)
    june.write_parquet(tmp_path / "june.parquet")
    ended = scenario("placed", tmp_path / "planted.parquet", tmp_path)
    assert ended.pop("stopped") == [130, 130] and ended.pop("stopped at") >= 12, log(tmp_path, "stopped")
    for name in ("wrong", "adam"):  # a rank finds the error itself, or gets the error of the other
        assert 2 in ended[name] and set(ended.pop(name)) <= {1, 2}, log(tmp_path, name)
    assert "no table 'items'; this model's id tables: item, query" in log(tmp_path, "wrong")
    assert "training.table_engine=torchrec: FBGEMM has no Adam on a CPU" in log(tmp_path, "adam")
    *failed, last = ended.pop("killed")
    assert last == [0, 0] and len(failed) == 2 and all(-9 in codes for codes in failed)
    expected = load_file(tmp_path / "two" / "model" / "towers.safetensors")
    for name, value in load_file(tmp_path / "killed" / "model" / "towers.safetensors").items():
        assert torch.equal(value, expected[name]), name
    for name, codes in ended.items():
        assert set(codes) == {0}, log(tmp_path, name)
    for name in ("two", "three", "resumed-1", "resumed-2", "resumed-3"):
        assert_same_model(tmp_path / name, tmp_path / "one")
    for name in ("one-3", "two-2"):
        assert_same_model(tmp_path / name, tmp_path / "one-1")
    assert "id tables: query row-wise, item row-wise, over 2 ranks" in log(tmp_path, "two")
    assert "looked up and updated by TorchRec\n" in log(tmp_path, "two")
    assert "id tables: query row-wise, item table-wise (rank 0), over 3 ranks" in log(tmp_path, "three")
    assert "looked up and updated by TorchRec (table-wise)" in log(tmp_path, "three")
    for name in ("two", "three"):
        assert "Warning" not in log(tmp_path, name) and "W1" not in log(tmp_path, name), log(tmp_path, name)


def test_killed_ranks_resume_from_their_parts(found, folder):
    *failed, last = found["killed"]
    assert last == [0, 0] and len(failed) == 2 and all(-9 in ended for ended in failed)
    expected = load_file(folder / "two" / "model" / "towers.safetensors")
    for name, value in load_file(folder / "killed" / "model" / "towers.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_the_plan_names_the_placement(found, folder):
    assert "id tables: item row-wise, over 2 ranks" in log(folder, "two")
    assert "row-wise" not in log(folder, "one")


def test_a_model_written_in_parts_answers_queries(found, folder):
    answers = [Retriever.load(folder / run).recommend(["u003"], k=5) for run in ("one", "two")]
    assert len(answers[0]) == 5 and answers[0]["item"].to_list() == answers[1]["item"].to_list()


def test_sequence_towers_and_mined_negatives_equal_those_of_one_process(tmp_path):
    planted(queries=80).write_parquet(tmp_path / "planted.parquet")
    ended = scenario("sequences", tmp_path / "planted.parquet", tmp_path)
    assert ended["one"] == [0] and ended["two"] == ended["shared"] == ended["mined-2"] == ended["killed"][-1] == [
        0,
        0,
    ], ended
    assert len(ended["killed"]) == 2 and -9 in ended["killed"][0]
    weights = {run: load_file(tmp_path / run / "model" / "towers.safetensors") for run in ended}
    for name, expected in weights["one"].items():
        seen = torch.ones_like(expected, dtype=torch.bool)
        if name.endswith("attention.projection.bias"):
            seen.view(3, -1)[1] = False  # of the keys: see cases.py
        for run in ("two", "shared"):
            found = weights[run][name]
            torch.testing.assert_close(
                found[seen], expected[seen], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert torch.equal(weights["killed"][name], weights["shared"][name]), name
    for name, value in weights["mined-1"].items():
        torch.testing.assert_close(
            weights["mined-2"][name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"mined, {n}: {text}"
        )


def everything(folder):
    """Return weights, item embeddings and optimizer state of a run, by name."""
    found = {}
    for file in ("towers.safetensors", "items.safetensors"):
        found |= load_file(folder / "model" / file)
    states = SafeCheckpointIO().load_checkpoint(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    return found | {f"{number}.{name}": one for number, state in states.items() for name, one in state.items()}


def test_incremental_training_with_sharded_tables_equals_one_process(tmp_path):
    may = planted(queries=80)
    # New and old users and items; new ids sort between old ones.
    june = planted(queries=100, items=130, seed=1).with_columns(
        pl.col("user_id") + pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.lit("b")).otherwise(pl.lit("")),
        pl.col("item_id") * 2 - 60,
        pl.col("timestamp") + 100_000_000,
    )
    may.with_columns(pl.col("item_id") * 2).write_parquet(tmp_path / "may.parquet")
    june.write_parquet(tmp_path / "june.parquet")
    (tmp_path / "gone.txt").write_text("4\n10\n100\n")
    ended = scenario("continued", tmp_path / "may.parquet", tmp_path)
    for name, found in ended.items():
        assert set(found) == {0}, log(tmp_path, name)
    lineage = json.loads((tmp_path / "one-2" / "model" / "metadata.json").read_text())["data"]["lineage"]
    assert lineage[1]["items_withdrawn"] == 3 and lineage[1]["items"] > lineage[0]["items"]
    assert "id tables: item row-wise, over 2 ranks" in log(tmp_path, "one-2")
    for name in ("one-2", "one-3", "two-2"):
        expected, found = everything(tmp_path / f"{name[:3]}-1"), everything(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=0, atol=1e-5, msg=lambda t, k=key, n=name: f"{n} {k}: {t}"
            )


def test_a_table_larger_than_a_process_trains_on_two(folder):
    items, rows, width = 102_000, 112_000, 1024  # above 100,000 rows gradients are sparse
    random = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": random.integers(0, 20_000, rows),
            "item_id": np.r_[random.permutation(items), random.integers(0, items, rows - items)],
            "timestamp": np.arange(rows),
        }
    )
    data, here = folder / "large.parquet", folder / "limited"
    here.mkdir()
    frame.write_parquet(data)
    later = frame.sample(3_000, seed=1)  # with items that are new to these users
    later = later.with_columns((pl.col("item_id") + 7) % items, pl.col("timestamp") + rows)
    later.write_parquet(folder / "later.parquet")
    table = items * width * 4
    found = scenario("limited", data, here, str(int(2.9 * table)))  # with Adam's state a table is three
    assert found["limited-1"] == [2], log(here, "limited-1")
    output = log(here, "limited-1")
    assert "tables of" in output and "several processes with sharded rows" in output and "Traceback" not in output
    assert found["limited-2"] == [0, 0], log(here, "limited-2")
    weights = load_file(here / "limited-2" / "model" / "towers.safetensors")["item_tower.ids.weight"]
    assert weights.nbytes > 0.95 * table and bool(weights.isfinite().all())
    assert found["again-2"] == [0, 0], log(here, "again-2")
    again = load_file(here / "again-2" / "model" / "towers.safetensors")["item_tower.ids.weight"]
    moved = (again != weights).any(1)
    assert again.shape == weights.shape and 0 < int(moved.sum()) < len(again) / 2
