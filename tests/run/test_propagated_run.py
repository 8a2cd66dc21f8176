"""Runs with propagation: saved as ordinary tables, resumed exactly, and rejected where it cannot work."""

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import twotower as tt
from support.interruption import stopped_after_first_epoch
from twotower.config.run import Config
from twotower.data import Interactions, random_rows
from twotower.errors import InputError
from twotower.run import train_run

SETTINGS = [
    "query_tower.id_embedding=true",
    "query_tower.history=null",
    "query_tower.hidden=null",
    "query_tower.propagation=2",
    "item_tower.dimension=16",
    "item_tower.popularity=0.6",
    "objective.name=full-softmax",
    "objective.temperature=0.1",
    "training.question=set",
    "training.hidden_share=1",
    "training.max_epochs=3",
    "training.learning_rate=0.02",
    "training.batch_size=256",
    "training.accelerator=cpu",
    "data.split=random",
]


@pytest.fixture(scope="module")
def likes(tmp_path_factory):
    """Four tastes of 25 items each, 120 queries, without time."""
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 120, 3_000)
    taste = np.where(rng.random(3_000) < 0.9, queries % 4, rng.integers(0, 4, 3_000))
    frame = pl.DataFrame({"user_id": queries, "item_id": rng.integers(0, 25, 3_000) * 4 + taste})
    path = tmp_path_factory.mktemp("likes") / "likes.csv"
    frame.unique(maintain_order=True).write_csv(path)
    return path


@pytest.fixture(scope="module")
def trained(likes, tmp_path_factory):
    out = tmp_path_factory.mktemp("propagated") / "run"
    train(likes, out)
    return out


def train(source, out, *changes, **options):
    return train_run(
        source, out, Config.load(None, [*SETTINGS, *changes]), progress=False, on_message=lambda _: None, **options
    )


@pytest.mark.slow
def test_propagation_generalises_from_pairs_of_the_graph(likes):
    split = random_rows(Interactions.read(likes), 0.1, 0.2)
    found = {}
    for layers in (0, 2):
        config = Config.load(None, [*SETTINGS, f"query_tower.propagation={layers}", "data.split=time"])
        model = tt.fit(split, config, progress=False)
        found[layers] = tt.evaluate(model, split.test, baselines=False)["model"].values["NDCG@10"]
    assert found[2] > 1.1 * found[0]


def test_a_saved_model_has_ordinary_tables(trained):
    names = load_file(trained / "model" / "towers.safetensors").keys()
    assert {"query_tower.ids.weight", "item_tower.ids.weight", "popular"} <= set(names)
    assert not any("propagation" in name for name in names)
    retriever = tt.Retriever.load(trained / "model")
    assert len(retriever.recommend([retriever.artifact.queries.ids[0]], k=5)) == 5


def test_a_resumed_run_equals_an_uninterrupted_one(trained, likes, tmp_path):
    with stopped_after_first_epoch():
        train(likes, tmp_path / "run")
    train(likes, tmp_path / "run", resume=True)
    first, second = (load_file(out / "model" / "towers.safetensors") for out in (trained, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.micro_batch=8", "propagation embeds all"),
        ("item_tower.table_precision=bfloat16", "float32"),
        ("training.hidden_share=0.5", None),
    ],
)
def test_settings_that_propagation_cannot_use_are_rejected(likes, change, words):
    split = random_rows(Interactions.read(likes), 0.1, 0.2)
    config = Config.load(None, [*SETTINGS, "training.max_epochs=1", change])
    if words is None:
        tt.fit(split, config, progress=False)
        return
    with pytest.raises(InputError, match=words):
        tt.fit(split, config, progress=False)


def test_a_propagated_model_cannot_be_continued(trained, tmp_path):
    rng = np.random.default_rng(1)
    frame = pl.DataFrame({"user_id": rng.integers(0, 30, 300) + 900, "item_id": rng.integers(0, 100, 300)})
    frame.unique(maintain_order=True).write_csv(tmp_path / "new.csv")
    changes = ("data.split=leave-last-out", "evaluation.exclude_seen=false")
    with pytest.raises(InputError, match="cannot be continued"):
        train(tmp_path / "new.csv", tmp_path / "next", *changes, warm_start=trained)


def test_the_preset_trains_and_answers(likes, tmp_path):
    config = Config.load("lightgcn", ["training.max_epochs=1", "item_tower.dimension=8", "training.accelerator=cpu"])
    train_run(likes, tmp_path / "run", config, progress=False, on_message=lambda _: None)
    retriever = tt.Retriever.load(tmp_path / "run" / "model")
    assert len(retriever.recommend([retriever.artifact.queries.ids[0]], k=5)) == 5
