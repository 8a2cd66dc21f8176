"""`twotower train --from` as a person uses it: files in, a model folder that stands alone out, clear refusals."""

import json
import sys

import numpy as np
import polars as pl
import pytest

from twotower import cli

QUICK = [
    "training.max_epochs=2",
    "training.batch_size=64",
    "training.accelerator=cpu",
    "item_tower.dimension=8",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 10}}]",
]


def days(first, last, items, seed):
    rng = np.random.default_rng(seed)
    rows = 500
    return pl.DataFrame({
        "user_id": [f"u{q}" for q in rng.integers(0, 40, rows)],
        "item_id": [f"i{j}" for j in rng.integers(*items, rows)],
        "timestamp": np.sort(rng.integers(first, last, rows)) * 86_400 + 1_600_000_000,
    })  # fmt: skip


@pytest.fixture(scope="module")
def command():
    """`command(words) -> (exit code, stdout, stderr)` in this process."""

    def run(capsys, *words):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["twotower", *map(str, words)])
            patch.setenv("COLUMNS", "200")
            cli._STATE["debug"] = False
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def settings(*changes):
    return [word for change in (*QUICK, *changes) for word in ("--set", change)]


def test_days_follow_days(tmp_path, capsys, command):
    days(0, 30, (0, 30), 0).write_parquet(tmp_path / "may.parquet")
    days(31, 40, (10, 40), 1).write_parquet(tmp_path / "june.parquet")
    (tmp_path / "gone.txt").write_text("i3\ni12\n")
    code, _, err = command(capsys, "train", tmp_path / "may.parquet", "--out", tmp_path / "may", *settings())
    assert code == 0, err
    words = ["train", tmp_path / "june.parquet", "--from", tmp_path / "may", "--out", tmp_path / "june"]
    code, out, err = command(capsys, *words, "--withdraw", tmp_path / "gone.txt", "--set", "training.max_epochs=1")
    assert code == 0, err
    assert "items withdrawn" in out and "validation NDCG@10 of the model it went on from" in out
    (tmp_path / "may").rename(tmp_path / "elsewhere")  # the parent is not needed any more
    code, out, err = command(capsys, "recommend", tmp_path / "june", "--query", "u1", "-k", "40", "--json")
    assert code == 0, err
    found = {row["item"] for row in json.loads(out)}
    assert found and not found & {"i3", "i12"}
    code, out, err = command(capsys, "evaluate", tmp_path / "june", "--no-report", "--json")
    assert code == 0, err
    told = json.loads((tmp_path / "june" / "results.json").read_text())
    assert json.loads(out)["rows"][0]["values"] == told["rows"][0]["values"]
    lineage = json.loads((tmp_path / "june" / "model" / "metadata.json").read_text())["data"]["lineage"]
    assert [entry["items_withdrawn"] for entry in lineage] == [0, 2]
    (tmp_path / "elsewhere").rename(tmp_path / "may")
    refused = {
        ("--config", "mf"): "--config: the settings of a continued training are those of --from",
        ("--set", "item_tower.dimension=16"): "item_tower.dimension: 8 in the model, 16 here",
        ("--out", tmp_path / "may"): "give the continued model a folder of its own",
    }
    for change, message in refused.items():
        out_again = () if "--out" in change else ("--out", tmp_path / "july")
        asked = ["train", tmp_path / "june.parquet", "--from", tmp_path / "may", *out_again, *change]
        code, _, err = command(capsys, *asked)
        assert code == 2 and message in err, err
    code, _, err = command(
        capsys, "train", tmp_path / "may.parquet", "--from", tmp_path / "may", "--out", tmp_path / "x"
    )
    assert code == 2 and "nothing to continue on" in err
    code, _, err = command(capsys, "train", tmp_path / "may.parquet", "--withdraw", "x.txt", "--out", tmp_path / "x")
    assert code == 2 and "--withdraw: needs --from" in err
    (tmp_path / "gone.txt").write_text("nobody\n")
    code, _, err = command(
        capsys, *words[:-1], tmp_path / "y", "--withdraw", tmp_path / "gone.txt", "--set", "training.max_epochs=1"
    )
    assert code == 2 and "none of its 1 items is in the catalog" in err
