"""Tests of `twotower train --from` from the command line: data files, self-contained model folders, clear errors."""

import hashlib
import json
import shutil
import sys

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from twotower.cli import main as cli

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
    """Return `command(words) -> (exit code, stdout, stderr)`, which runs in this process."""

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


def without_validation(folder):
    """Rewrite a continued model's folder in the form of older versions, which did not save the validation."""
    rows = load_file(folder / "rows.safetensors")
    save_file({n: values for n, values in rows.items() if not n.startswith("validation.")}, folder / "rows.safetensors")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["checksums"]["rows.safetensors"] = hashlib.sha256((folder / "rows.safetensors").read_bytes()).hexdigest()
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "SHA256SUMS").unlink()  # as in older versions


def test_incremental_runs_follow_each_other(tmp_path, capsys, command):
    days(0, 30, (0, 30), 0).write_parquet(tmp_path / "may.parquet")
    days(31, 40, (10, 40), 1).write_parquet(tmp_path / "june.parquet")
    (tmp_path / "gone.txt").write_text("i3\ni12\n")
    code, _, err = command(capsys, "train", tmp_path / "may.parquet", "--out", tmp_path / "may", *settings())
    assert code == 0, err
    words = ["train", tmp_path / "june.parquet", "--from", tmp_path / "may", "--out", tmp_path / "june"]
    code, out, err = command(capsys, *words, "--withdraw", tmp_path / "gone.txt", "--set", "training.max_epochs=1")
    assert code == 0, err
    assert "withdrawn items" in out and "validation NDCG@10 of the previous model" in out
    (tmp_path / "may").rename(tmp_path / "elsewhere")  # the parent is no longer needed
    code, out, err = command(capsys, "recommend", tmp_path / "june", "--query", "u1", "-k", "40", "--json")
    assert code == 0, err
    found = {row["item"] for row in json.loads(out)}
    assert found and not found & {"i3", "i12"}
    code, out, err = command(capsys, "evaluate", tmp_path / "june", "--no-report", "--json")
    assert code == 0, err
    saved = json.loads((tmp_path / "june" / "results.json").read_text())
    assert json.loads(out)["rows"][0]["values"] == saved["rows"][0]["values"]
    metadata = json.loads((tmp_path / "june" / "model" / "metadata.json").read_text())
    code, out, err = command(capsys, "dial", tmp_path / "june", "--on", "validation", "-k", "10", "--json")
    assert code == 0, err
    as_trained = [row for row in json.loads(out)["points"] if row["popularity"] == 1.0]
    assert as_trained[0]["ndcg"] == pytest.approx(metadata["training"]["best"]["NDCG@10"])
    lineage = metadata["data"]["lineage"]
    assert [entry["items_withdrawn"] for entry in lineage] == [0, 2]
    shutil.copytree(tmp_path / "june", tmp_path / "older")
    without_validation(tmp_path / "older" / "model")
    code, _, err = command(capsys, "dial", tmp_path / "older", "--on", "validation")
    assert code == 2 and "which did not save its validation queries" in err and "twotower train" in err
    code, _, err = command(capsys, "dial", tmp_path / "older", "--json")
    assert code == 0, err
    (tmp_path / "elsewhere").rename(tmp_path / "may")
    refused = {
        ("--config", "mf"): "--config: with --from, the settings come from that model",
        ("--set", "item_tower.dimension=16"): "item_tower.dimension: 8 in the model, 16 here",
        ("--out", tmp_path / "may"): "choose another folder for the continued model",
    }
    for change, message in refused.items():
        out_again = () if "--out" in change else ("--out", tmp_path / "july")
        asked = ["train", tmp_path / "june.parquet", "--from", tmp_path / "may", *out_again, *change]
        code, _, err = command(capsys, *asked)
        assert code == 2 and message in err, err
    code, _, err = command(
        capsys, "train", tmp_path / "may.parquet", "--from", tmp_path / "may", "--out", tmp_path / "x"
    )
    assert code == 2 and "nothing to train on" in err
    code, _, err = command(capsys, "train", tmp_path / "may.parquet", "--withdraw", "x.txt", "--out", tmp_path / "x")
    assert code == 2 and "--withdraw: requires --from" in err
    (tmp_path / "gone.txt").write_text("nobody\n")
    code, _, err = command(
        capsys, *words[:-1], tmp_path / "y", "--withdraw", tmp_path / "gone.txt", "--set", "training.max_epochs=1"
    )
    assert code == 2 and "none of the 1 ids is in the catalog" in err
