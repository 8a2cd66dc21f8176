"""A planted answer: queries prefer one colour. New items are ranked by colour, which an id-only model cannot know."""

import json

import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions, leave_last_out
from twotower.errors import InputError
from twotower.serving import Retriever, SavedModel

COLOURS = ["red", "blue", "green", "white"]
OLD, NEW, QUERIES = 100, 40, 80

SETTINGS = [
    "training.max_epochs=8",
    "training.batch_size=64",
    "training.learning_rate=0.01",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "item_tower.dimension=16",
    "query_tower.history.length=10",
    "objective.sources=[{in_batch: {}}, {frequency: {size: 30, power: 0}}]",
]
FEATURES = [
    "item_tower.features=[{column: colour, kind: categorical}, {column: words, kind: text}]",
    "query_tower.features=auto",
    "item_tower.id_dropout=0.3",
    "item_tower.residual=true",
]


def planted():
    rng = np.random.default_rng(0)
    rows = [
        {"user_id": f"u{q:02d}", "item_id": int(item), "timestamp": int(rng.integers(1e9, 1.1e9))}
        for q in range(QUERIES)
        for item in rng.choice(np.arange(q % 4, OLD, 4), size=12, replace=False)
    ]
    items = pl.DataFrame(
        {
            "item_id": range(OLD + NEW),
            "colour": [COLOURS[j % 4] for j in range(OLD + NEW)],
            "words": [f"thing {rng.integers(20)} of {rng.integers(20)}" for _ in range(OLD + NEW)],
        }
    )
    ages = [20.5 + q % 40 for q in range(QUERIES)]
    users = pl.DataFrame({"user_id": [f"u{q:02d}" for q in range(QUERIES)], "age": ages})
    return Interactions.from_frame(pl.DataFrame(rows), items=items, queries=users, catalog="table")


@pytest.fixture(scope="module")
def split():
    return leave_last_out(planted())


@pytest.fixture(scope="module")
def model(split):
    return tt.fit(split, Config.load(None, SETTINGS + FEATURES), progress=False)


def share_of_own_colour(embeddings, model, split):
    """Return the share of each query's ten best new items that have its colour; chance is a quarter."""
    queries = model.retriever.ranker.embed(split.test.queries, (split.test.history_offsets, split.test.history_items))
    best = (queries @ embeddings.T).topk(NEW // 4).indices.numpy()
    return float((best % 4 == (split.test.queries % 4)[:, None]).mean())


def test_new_items_are_ranked_by_their_features(model, split):
    assert split.train.num_items == OLD + NEW and not split.train.item_counts()[OLD:].any()
    embeddings = model.artifact.item_embeddings[OLD:]
    assert share_of_own_colour(embeddings, model, split) > 0.9


def test_an_id_only_model_cannot_rank_them(split):
    ids = tt.fit(split, Config.load(None, SETTINGS), progress=False)
    old = ids.rank(split.test, 10, True)
    assert float((old % 4 == (split.test.queries % 4)[:, None]).mean()) > 0.6, "it has learned the preference"
    assert share_of_own_colour(ids.artifact.item_embeddings[OLD:], ids, split) < 0.45


def test_items_outside_the_vocabulary_are_embedded_from_dicts(model, split):
    rows = [{"colour": COLOURS[j % 4], "words": "a new thing"} for j in range(NEW)]
    assert share_of_own_colour(model.artifact.towers.embed_new_items(rows), model, split) > 0.9


def test_the_resolved_settings_are_saved(model):
    features = model.artifact.config.query_tower.features
    assert [(one.column, one.kind) for one in features] == [("age", "numeric")]
    assert Config.load(None, []).model_validate(model.artifact.config.model_dump(mode="json")) == model.artifact.config


def test_a_loaded_model_computes_the_same_embeddings(model, split, tmp_path):
    folder = model.save(tmp_path / "model")
    loaded = SavedModel.load(folder)
    assert torch.equal(loaded.towers.item_embeddings(), model.artifact.towers.item_embeddings())
    rows = [{"colour": "red", "words": None}, {"colour": "mauve", "words": "thing 3"}]
    assert torch.equal(loaded.towers.embed_new_items(rows), model.artifact.towers.embed_new_items(rows))
    ages = [{"age": 3}, {"age": None}]
    assert torch.equal(loaded.towers.embed_new_queries(ages), model.artifact.towers.embed_new_queries(ages))
    assert np.array_equal(Retriever(loaded).rank(split.test, 10, True), model.rank(split.test, 10, True))
    fitted = json.loads((folder / "item_features.json").read_text())
    assert fitted["features"][0]["state"]["values"] == sorted(COLOURS)
    damaged = (folder / "item_features.json").read_text().replace("green", "greem")
    (folder / "item_features.json").write_text(damaged)
    with pytest.raises(InputError, match="checksum differs"):
        SavedModel.load(folder)


def test_auto_features_without_a_table_are_none():
    rows = pl.DataFrame({"user_id": [1, 1, 1, 2, 2, 2], "item_id": [1, 2, 3, 1, 2, 3]})
    bare = leave_last_out(Interactions.from_frame(rows))
    overrides = ["item_tower.features=auto", "item_tower.id_dropout=0.3", "training.max_epochs=1"]
    config = Config.load(None, [*SETTINGS, *overrides, "training.batch_size=2"])
    fitted = tt.fit(bare, config, progress=False).artifact.config
    assert fitted.item_tower.features == "none" and fitted.item_tower.id_dropout == 0


@pytest.mark.parametrize("name", ["mf", "dnn"])
def test_presets_are_found_by_name_and_train(name, split):
    config = Config.load(name, ["training.max_epochs=1", "training.batch_size=64", "training.accelerator=cpu"])
    assert tt.fit(split, config, progress=False).fit.epochs == 1
    with pytest.raises(InputError, match="no configuration file or preset with this name; presets: .*dnn.*mf"):
        Config.load("mff")
