"""Queries without a training row, for a model with query ids: served by other known inputs, or refused."""

import dataclasses

import numpy as np
import polars as pl
import pytest

import twotower as tt
from support.service_models import client
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.serving import Retriever
from twotower.serving.batch import recommend_file

SMALL = ["training={max_epochs: 1, batch_size: 64, logger: none, accelerator: cpu}", "item_tower.dimension=8"]


@pytest.fixture(scope="module")
def held(planted_data):
    return tt.splits.held_out_queries(planted_data, validation=0.1, test=0.1, cold="keep")


@pytest.fixture(scope="module")
def by_history(held):
    return tt.fit(held, Config.load(None, [*SMALL, "query_tower.id_embedding=true"]), progress=False)


@pytest.fixture(scope="module")
def by_id(held, tmp_path_factory):
    """A model that represents queries by their ids alone."""
    settings = Config.load(None, [*SMALL, "query_tower={history: null, id_embedding: true}"])
    return tt.fit(held, settings, progress=False).save(tmp_path_factory.mktemp("ids") / "model")


def test_held_out_queries_are_ranked_as_new_ones(by_history, held):
    rows = np.diff(held.train.offsets)
    assert (by_history.artifact.towers.trained_queries.numpy() == (rows > 0)).all() and not rows[
        held.test.queries
    ].any()
    new = dataclasses.replace(held.test, queries=np.full_like(held.test.queries, -1))
    assert np.array_equal(by_history.rank(held.test, 10, True), by_history.rank(new, 10, True))
    known = dataclasses.replace(held.test, queries=np.resize(np.flatnonzero(rows), len(held.test.queries)))
    assert not np.array_equal(by_history.rank(known, 10, True), by_history.rank(new, 10, True))


def test_they_are_served_by_their_history(by_history, held):
    retriever, code = by_history.retriever, int(held.test.queries[0])
    (query,) = retriever.artifact.queries.decode([code])
    history = retriever.history(query)["item"].to_list()
    found = retriever.recommend([query], k=5)
    assert found["item"].to_list() == retriever.recommend(histories=[history], k=5)["item"].to_list()
    with pytest.raises(InputError, match="has no training row.*give its history"):
        retriever.recommend([query], histories=[[]])


def test_by_the_id_alone_they_are_refused(by_id, held, tmp_path):
    retriever = Retriever.load(by_id)
    trained = np.flatnonzero(np.diff(held.train.offsets))[:2]
    unknown, *known = retriever.artifact.queries.decode([held.test.queries[0], *trained]).to_list()
    assert len(retriever.recommend(known, k=3)) == 6
    with pytest.raises(
        InputError, match=f"query '{unknown}': it has no training row.*expected a query with a training row"
    ):
        retriever.recommend([*known, unknown])
    pl.DataFrame({"query": [known[0], unknown, "nobody"]}).write_parquet(tmp_path / "asked.parquet")
    report = recommend_file(retriever, tmp_path / "asked.parquet", tmp_path / "answers.parquet", k=3)
    assert set(pl.read_parquet(tmp_path / "answers.parquet")["query"]) == {known[0]}, report
    with client(by_id) as service:
        assert service.post("/recommend", json={"query_id": known[0]}).status_code == 200
        refused = service.post("/recommend", json={"query_id": unknown})
    assert refused.status_code == 422 and "query_id: it has no training row" in refused.text
