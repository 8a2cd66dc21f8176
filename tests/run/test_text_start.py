"""Towers that read texts by one sentence model start at the similarity of its vectors."""

import numpy as np
import pytest
import torch

from support.search import documents, searches
from support.towers import towers_of
from twotower.config.run import Config
from twotower.data import Interactions, held_out_queries, with_query_text
from twotower.distributed.communicator import Communicator
from twotower.features import text as texts
from twotower.features.from_config import in_training
from twotower.run import fit
from twotower.run.text_start import start_at_texts

WIDTH = 12


@pytest.fixture
def encoder(monkeypatch):
    """Replace sentence models by vectors that depend on the text alone."""

    def vectors(names, model):
        return np.stack([np.random.default_rng(list(name.encode())).normal(size=WIDTH) for name in names]).astype(
            np.float32
        )

    class Model:
        def get_embedding_dimension(self):
            return WIDTH

    monkeypatch.setattr(texts, "embed_texts", vectors)
    monkeypatch.setattr(texts, "_model", lambda name: Model())
    return vectors


def built(changes, data):
    config = Config.load(None, ["data.query_text=search", "query_tower.hidden=null", *changes])
    towers = towers_of(config, data, trained_items=torch.from_numpy(in_training(data, "item"))).eval()
    said = []
    return towers, start_at_texts(towers, config, Communicator(), on_message=said.append), said


@pytest.fixture(scope="module")
def data():
    frame = searches().drop("user_id", "timestamp")
    read = Interactions.from_frame(frame, documents(), columns={"query": "search", "timestamp": None})
    return with_query_text(read, "search", texts_are_queries=True)


QUERY = "query_tower.features=[{column: search, kind: text, model: m}]"
ITEM = "item_tower.features=[{column: title, kind: text, model: m}, {column: text, kind: text, model: m}]"


@pytest.mark.parametrize("ids", ["false", "true"])
@pytest.mark.parametrize("dimension", [WIDTH, WIDTH + 5])
def test_scores_are_cosines_of_the_texts(encoder, data, dimension, ids):
    changes = [QUERY, ITEM, f"item_tower.dimension={dimension}", f"item_tower.id_embedding={ids}"]
    towers, started, said = built(changes, data)
    assert started and said == [f"start: text similarity from m, {dimension} of {WIDTH} dimensions"]

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    asked = unit(encoder(data.queries.ids, "m"))
    offered = unit(unit(encoder(data.item_table["title"], "m")) + unit(encoder(data.item_table["text"], "m")))
    with torch.no_grad():
        scores = towers.embed_queries(torch.arange(data.num_queries), None) @ towers.item_embeddings().T
    assert np.allclose(scores.numpy(), asked @ offered.T, atol=1e-5)


def test_a_smaller_dimension_keeps_the_directions_of_the_items(encoder, data):
    """With D below the width, no other D dimensions are closer to the vectors of the items."""
    one = "item_tower.features=[{column: text, kind: text, model: m}]"
    towers, started, _ = built([QUERY, one, "item_tower.dimension=5", "item_tower.id_embedding=false"], data)
    rows = encoder(data.item_table["text"], "m")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weight = towers.item_tower.mlp.layers[0].weight.detach().numpy()[:, :WIDTH]
    assert started and np.allclose(weight @ weight.T, np.eye(5), atol=1e-5)
    assert np.linalg.norm(rows @ weight.T) ** 2 == pytest.approx((np.linalg.svd(rows)[1][:5] ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        [QUERY.replace("model: m", "model: other"), ITEM],
        [QUERY, ITEM, "query_tower.hidden=[8]"],
        [QUERY, ITEM, "item_tower.hidden=[8]"],
        [QUERY, ITEM, "item_tower.residual=true"],
        [QUERY, ITEM, "query_tower.id_embedding=true"],
        [QUERY, ITEM, "query_tower.history.length=5"],
        [QUERY, ITEM, "training.start=random"],
        [QUERY.replace("model: m", "model: words"), ITEM],
    ],
)
def test_other_towers_keep_their_random_weights(encoder, data, changes):
    assert built(changes, data)[1:] == (False, [])


def test_a_run_begins_there(encoder, data):
    """After an epoch of steps too short to matter, the embeddings are still the vectors of the texts."""
    changes = [
        *("data.query_text=search", QUERY, ITEM, "query_tower.hidden=null", f"item_tower.dimension={WIDTH}"),
        *("item_tower.id_embedding=false", "training.max_epochs=1", "training.learning_rate=1e-12"),
        *("training.logger=none", "training.accelerator=cpu"),
    ]
    split = held_out_queries(data, 0.2, 0.2, fold_in=0.0, cold="keep")
    said = []
    model = fit(split, Config.load(None, changes), progress=False, on_message=lambda text: said.append(str(text)))
    assert any(text.startswith("start: text similarity from m") for text in said)
    assert model.artifact.metadata["training"]["start"] is None
    rows = sum(
        one / np.linalg.norm(one, axis=1, keepdims=True)
        for one in (encoder(data.item_table[name], "m") for name in ("title", "text"))
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(model.artifact.item_embeddings.numpy(), rows, atol=1e-4)
