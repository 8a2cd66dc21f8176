"""Proposed kinds of columns, and the proposal as settings that load."""

import datetime as dt
import json

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from twotower.cli.main import app
from twotower.config.run import Config
from twotower.data.interactions import Interactions
from twotower.features.from_config import unused_tables
from twotower.features.suggest import as_yaml, features_of, propose

ROWS = 200
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("values", "kind", "settings", "why"),
    [
        (["red", "blue"] * 100, "categorical", {}, "2 values"),
        ([True, False] * 100, "categorical", {}, "true or false"),
        ([j % 7 for j in range(ROWS)], "categorical", {}, "only 7 values"),
        (RNG.normal(size=ROWS).tolist(), "numeric", {"scale": "standard"}, "numbers"),
        ((10 ** RNG.uniform(0, 6, ROWS)).tolist(), "numeric", {"scale": "log"}, "skewed"),
        ([f"t{j % 3}|t{j % 5}|t{j % 7}" for j in range(ROWS)], "multi", {"separator": "|"}, "separated by '|'"),
        ([[f"t{j % 3}", "x"] for j in range(ROWS)], "multi", {"separator": None}, "lists, 4 values"),
        (RNG.normal(size=(ROWS, 4)).tolist(), "dense", {}, "vectors of 4 numbers"),
        ([dt.date(2024, 1, 1 + j % 28) for j in range(ROWS)], "timestamp", {}, "dates"),
        ([f"2024-01-{1 + j % 28:02d}" for j in range(ROWS)], "timestamp", {}, "dates as text"),
        ([f"cup {j} of tea" for j in range(ROWS)], "text", {"model": "words"}, "4.0 words per row"),
        (list(range(ROWS)), None, {}, "looks like an id"),
        ([f"sku-{j}".replace("-", "") for j in range(ROWS)], None, {}, "identifies rows"),
        (["same"] * ROWS, None, {}, "the same value in every row"),
        ([None] * ROWS, None, {}, "no values"),
        (["a", "b", *[None] * (ROWS - 2)], None, {}, "missing in 99%"),
        ([dt.timedelta(seconds=j) for j in range(ROWS)], None, {}, "type Duration"),
    ],
)
def test_the_proposed_kind_of_a_column(values, kind, settings, why):
    (found,) = propose(pl.DataFrame({"id": range(ROWS), "x": values}))
    assert (None if found.declared is None else found.declared.kind) == kind, found.why
    assert why in found.why
    for name, value in settings.items():
        assert getattr(found.declared, name) == value


def test_missing_values_are_counted():
    (found,) = propose(pl.DataFrame({"id": range(4), "x": [1.5, None, float("nan"), 2.5]}))
    assert found.missing == 0.5 and found.distinct == 2
    (found,) = propose(pl.DataFrame({"id": range(4), "x": ["a", " ", None, "b"]}))
    assert found.missing == 0.5


def test_a_proposal_is_a_configuration():
    table = pl.DataFrame({"id": range(4), "price": [1.5, 1e9, 3, 2], "tags": [["a"], ["b"], [], None], "one": [1] * 4})
    proposed = propose(table)
    read = yaml.safe_load(as_yaml({"item": proposed}))
    assert Config.model_validate(read).item_tower.features == features_of(proposed)
    assert yaml.safe_load(as_yaml({"query": propose(table.select("id", "one"))})) == {
        "query_tower": {"features": "none"}
    }


def test_many_values_are_hashed():
    table = pl.DataFrame({"id": range(22_000), "x": [f"v{j // 2}" for j in range(22_000)]})
    assert propose(table)[0].declared.buckets == 10_000


def test_the_command_prints_settings_that_load(tmp_path):
    rows = pl.DataFrame({"user_id": [1, 1, 2, 2] * 5, "item_id": [1, 2, 3, 4] * 5})
    rows.write_csv(tmp_path / "sales.csv")
    items = pl.DataFrame({"item_id": [1, 2, 3, 4], "colour": ["red", "blue", "red", "blue"]})
    items.write_csv(tmp_path / "goods.csv")
    command = ["features", str(tmp_path / "sales.csv"), "--items", str(tmp_path / "goods.csv")]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    settings = yaml.safe_load(printed.output[printed.output.index("item_tower:") :])
    assert settings == {"item_tower": {"features": [{"column": "colour", "kind": "categorical"}]}}
    report = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert report["item"][0] == {
        "column": "colour", "kind": "categorical", "why": "text, 2 values", "distinct": 2, "missing": 0.0,
        "feature": {"column": "colour", "kind": "categorical"},
    }  # fmt: skip


def test_missing_titles_are_reported():
    rows = pl.DataFrame({"user_id": [1, 1, 2], "item_id": ["a", "b", "a"]})
    hints = {}
    for name in ("Titel", "product_title", "year"):
        column = [1990, 1991] if name == "year" else ["Chess", "Go"]
        items = pl.DataFrame({"item_id": ["a", "b"], name: column})
        hints[name] = unused_tables(Config.load(), Interactions.from_frame(rows, items=items))
    expected = "shown by their ids; rename the human-readable column among 'Titel'"
    assert any(expected in line for line in hints["Titel"])
    assert not any("ids" in line for name in ("product_title", "year") for line in hints[name])
