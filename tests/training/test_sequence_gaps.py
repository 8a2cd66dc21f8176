"""Tests of time gaps: if only they predict the next item, a tower that reads them learns it and serves it."""

import numpy as np
import polars as pl
import pytest

import twotower as tt
from support.service_models import client
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.serving.export import export_query_tower

SMALL = [
    "training.max_epochs=12",
    "training.batch_size=128",
    "training.learning_rate=0.02",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "training.logger=none",
    "item_tower.dimension=16",
    "query_tower.history={length: 6, dropout: 0, sequence: {kind: gru, blocks: 1, dropout: 0}}",
    "objective.sources=[{uniform: {size: 20}}]",
    "objective.mask_known_positives=false",  # a user meets most of the thirty items
    "evaluation.baselines=false",
]
#: Seconds between two items, and which third of the 30 items follows each gap.
GAPS = (10, 3_600, 864_000)


def log(queries=150, rows=14, seed=0):
    """Draw sequences in which the gap before an item determines the third of the next item, random within it."""
    rng = np.random.default_rng(seed)
    found = []
    for q in range(queries):
        now, third = 1_600_000_000, int(rng.integers(3))
        for _ in range(rows):
            kind = int(rng.integers(3))
            now += int(GAPS[kind] * rng.uniform(1, 1.9))
            found.append((f"u{q:03d}", 10 * third + int(rng.integers(10)), now))
            third = kind
    return pl.DataFrame(found, schema=["user_id", "item_id", "timestamp"], orient="row")


@pytest.fixture(scope="module")
def models():
    split = tt.splits.leave_last_out(Interactions.from_frame(log()))
    settings = {"off": [], "on": ["query_tower.history.sequence.gaps=true"]}
    return split, {
        name: tt.fit(split, Config.load(None, [*SMALL, *changes]), progress=False) for name, changes in settings.items()
    }


def test_only_a_tower_with_gaps_learns(models):
    """Ten of thirty items are right, for ten ranks: a third by chance, all of them if the gap is learnt."""
    split, fitted = models
    recall = {
        name: tt.evaluate(one, split.test, ks=(10,), baselines=False, exclude_seen=False)["model"].values["Recall@10"]
        for name, one in fitted.items()
    }
    assert recall["off"] < 0.5
    assert recall["on"] > 0.75


def test_a_saved_model_uses_timestamps(models, tmp_path):
    split, fitted = models
    folder = fitted["on"].save(tmp_path / "model")
    retriever = tt.Retriever.load(folder)
    assert np.array_equal(retriever.rank(split.test, 5, False), fitted["on"].rank(split.test, 5, False))
    known = retriever.recommend(["u004"], k=5, exclude_seen=False)
    data = split.data
    rows = slice(data.offsets[4], data.offsets[5])
    items, times = data.item_codes[rows].tolist(), (data.timestamps[rows] / 1e6).tolist()
    ids = data.items.decode(items).to_list()
    given = retriever.recommend(histories=[ids], times=[times], k=5, exclude_seen=False)
    assert given["item"].to_list() == known["item"].to_list()
    assert np.allclose(given["score"], known["score"], atol=1e-6)
    for wrong in (5, [5], "x", ["x"]):
        with pytest.raises(InputError, match="times: expected"):
            retriever.recommend(histories=[ids], times=wrong)
    for kind, gap in enumerate(GAPS):
        found = retriever.recommend(histories=[[3, 17]], times=[[1e9, 1e9 + 1.3 * gap]], k=8, exclude_seen=False)
        assert (found["item"] // 10 == kind).mean() > 0.8
    explained = retriever.explain(item=5, history=[3, 17], times=[1e9, 1e9 + 13])
    assert explained.logit > retriever.explain(item=5, history=[3, 17], times=[1e9, 1e9 + 1e6]).logit + 1
    with client(folder) as service:
        question = {"history": [3, 17], "times": [1e9, 1e9 + 4_000], "k": 8, "exclude_seen": False}
        answer = service.post("/recommend", json=question)
        assert answer.status_code == 200, answer.text
        expected = retriever.recommend(histories=[[3, 17]], times=[question["times"]], k=8, exclude_seen=False)
        assert [one["item"] for one in answer.json()["items"]] == expected["item"].to_list()
        same = service.post("/recommend", json={"query_id": "u004", "k": 5, "exclude_seen": False})
        assert [one["item"] for one in same.json()["items"]] == known["item"].to_list()
        for wrong in ({"history": [3, 17], "times": [1.0]}, {"query_id": "u004", "times": [1.0]}):
            assert service.post("/recommend", json=wrong).status_code == 422
    report = export_query_tower(folder, tmp_path / "out", "torch")
    assert report["inputs"] == {"history": "int64 [B, 6]", "gaps": "int64 [B, 6]"}
    assert report["largest_difference"] <= 1e-5
