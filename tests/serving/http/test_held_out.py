"""Held-out items of known users: which they are, and the ranks that a model gives them without having seen them."""

import numpy as np
import pytest

import twotower as tt
from support.service_models import client, drawn, replace


@pytest.fixture(scope="module")
def service(folder):
    with client(folder, watch_seconds=0) as made:
        yield made


def test_ranks_are_those_of_the_training_history(service, folder, planted_split):
    """The same ranks as from Python with the training rows of each query as its history."""
    retriever = tt.Retriever.load(folder)
    data, train = planted_split.data, planted_split.train
    ranks = []
    for code, query in enumerate(data.queries.ids.to_list()):
        rows = data.items.decode(data.item_codes[data.offsets[code] : data.offsets[code + 1]]).to_list()
        history = rows[: train.offsets[code + 1] - train.offsets[code]]
        expected = list(dict.fromkeys(rows[len(history) :]))
        found = service.get("/page/held-out", params={"query_id": query}).json()
        assert found["trained"] == len(history) > 0 and found["last_rank"] == 1000
        assert [row["item"] for row in found["items"]] == expected and expected
        order = retriever.recommend([query], histories=[history], k=1000)["item"].to_list()
        for row in found["items"]:
            assert row["rank"] == (order.index(row["item"]) + 1 if row["item"] in order else None)
            ranks.append(row["rank"])
    assert len(set(ranks)) > 10, "the comparison would not see a constant rank"


def test_the_rank_of_the_last_item_agrees_with_the_evaluation(service, folder, planted_split):
    """A validation item is ranked from the training rows in the evaluation, too."""
    ranked = tt.Retriever.load(folder).rank(planted_split.validation, 100, exclude_seen=True)
    held = planted_split.validation
    compared = 0
    for row, code in enumerate(held.queries):
        target = held.target_items[held.target_offsets[row]]
        place = np.flatnonzero(ranked[row] == target)
        query = planted_split.data.queries.decode([code]).to_list()[0]
        found = service.get("/page/held-out", params={"query_id": query}).json()["items"][0]
        assert found["rank"] == (int(place[0]) + 1 if len(place) else None)
        compared += 1
    assert compared == len(held) > 20


def test_unknown_users_and_models_without_rows(service, planted_data, folder, tmp_path):
    assert service.get("/page/held-out", params={"query_id": "nobody"}).status_code == 404
    assert service.get("/page/held-out").status_code == 422
    with client(drawn(planted_data, tmp_path / "model")) as bare:  # as a model of an older version
        answer = bare.get("/page/held-out", params={"query_id": "u001"}).json()
        assert (answer["trained"], answer["items"]) == (None, [])


def test_the_rows_are_those_of_the_model_in_use(folder, planted_data, tmp_path):
    """A folder that is replaced does not change the answers of the model that was read from it."""
    import shutil

    own = shutil.copytree(folder, tmp_path / "model")
    with client(own, watch_seconds=0) as service:
        replace(own, drawn(planted_data, tmp_path / "other"))
        assert service.get("/page/held-out", params={"query_id": "u001"}).json()["trained"] > 0
