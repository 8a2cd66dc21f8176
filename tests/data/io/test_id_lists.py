"""Lists of ids and tables of items in files of the user: ids are read unchanged, in every format."""

import json
import sys

import numpy as np
import polars as pl
import pytest

import twotower as tt
from twotower.cli import main as cli
from twotower.config.run import Config
from twotower.data import Interactions, leave_last_out
from twotower.data.io.id_lists import ids_like, read_ids, read_items
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError


def test_ids_stay_as_written_in_every_format(tmp_path):
    ids = ["007", "1", "+7", "x y"]
    (tmp_path / "gone.txt").write_text("007\n\n 1\n+7\nx y\n")
    (tmp_path / "gone").write_text("007\n1\n+7\nx y\n")
    (tmp_path / "gone.csv").write_text("item_id,why\n007,a\n1,b\n+7,c\nx y,d\n")
    (tmp_path / "only.csv").write_text("whatever\n007\n1\n+7\nx y\n")
    pl.DataFrame({"item": ids}).write_parquet(tmp_path / "gone.parquet")
    for name in ("gone.txt", "gone", "gone.csv", "only.csv", "gone.parquet"):
        assert read_ids(tmp_path / name).to_list() == ids, name
    pl.DataFrame({"item": [7, 1]}).write_parquet(tmp_path / "whole.parquet")
    assert read_ids(tmp_path / "whole.parquet").to_list() == [7, 1]


def test_ids_get_the_type_of_the_model(tmp_path):
    numbers, texts = Vocabulary([1, 7]), Vocabulary(["007", "7"])
    assert ids_like(pl.Series(["7", "1"]), numbers, "f").to_list() == [7, 1]
    assert ids_like(pl.Series([7]), texts, "f").to_list() == ["7"]
    with pytest.raises(InputError, match="f: row 2: 'x' is not an integer, but this model has integer ids"):
        ids_like(pl.Series(["7", "x"]), numbers, "f")
    pl.DataFrame({"a": [1], "b": [2]}).write_csv(tmp_path / "two.csv")
    with pytest.raises(InputError, match="no item id column; found 'a', 'b'"):
        read_ids(tmp_path / "two.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_ids(tmp_path / "nothing")


def test_items_keep_their_ids_and_other_columns_get_types(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,price,zip,title\n007,3,01234,a\n7,4.5,99999,b\n")
    frame = read_items(tmp_path / "items.csv")
    assert frame["item_id"].to_list() == ["007", "7"]
    assert frame["price"].to_list() == [3.0, 4.5] and frame["zip"].to_list() == ["01234", "99999"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with item ids that have leading zeros, and others that are the same number without them."""
    rng = np.random.default_rng(0)
    ids = ["007", "7", *(f"{j:03d}" for j in range(20, 50))]
    rows = [(f"u{q}", ids[int(j)], t) for q in range(30) for t, j in enumerate(rng.choice(len(ids), 6, replace=False))]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    table = pl.DataFrame({"item_id": ids, "title": [f"t {i}" for i in ids]})
    changes = ["training.max_epochs=1", "training.accelerator=cpu"]
    features = "item_tower={dimension: 8, features: [{column: title, kind: text, min_count: 1}]}"
    settings = Config.load(None, [*changes, features])
    model = tt.fit(leave_last_out(Interactions.from_frame(frame, items=table)), settings, progress=False)
    return model.save(tmp_path_factory.mktemp("zeros") / "model")


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["twotower", *map(str, words), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    return json.loads(out)


def test_the_catalog_changes_by_the_ids_of_a_csv_file(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone.csv").write_text("item_id\n007\n")
    report = run(monkeypatch, capsys, "items", folder, "--remove", f"@{tmp_path / 'gone.csv'}")
    assert report["left"] == 1
    alive = tt.Retriever.load(folder).recommend(["u0"], k=99, exclude_seen=False)["item"].to_list()
    assert "007" not in alive and "7" in alive
    (tmp_path / "new.csv").write_text("item_id,title\n008,new\n")
    assert run(monkeypatch, capsys, "items", folder, "--add", tmp_path / "new.csv")["joined"] == 1
    (tmp_path / "titles.csv").write_text("item_id,title\n7,seven\n")
    assert run(monkeypatch, capsys, "items", folder, "--update", tmp_path / "titles.csv")["changed"] == 1
    found = tt.Retriever.load(folder).describe(["7", "008"])
    assert found["item"].to_list() == ["7", "008"] and found["title"].to_list() == ["seven", "new"]
