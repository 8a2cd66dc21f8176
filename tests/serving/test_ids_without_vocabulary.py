"""Query ids that are hashed or codes: retriever, query files and service find the training rows."""

import polars as pl
import pytest

from planted import planted
from support.service_models import client, drawn
from twotower.data import Hashed, Interactions
from twotower.data.schema.vocabulary import HashedIds, hash_ids
from twotower.errors import InputError
from twotower.serving import Retriever, SavedModel
from twotower.serving.batch import recommend_file

ROWS = 40  # for 60 queries: many share a row, some rows are empty


@pytest.fixture(scope="module")
def data():
    return Interactions.from_frame(planted(), query_ids=Hashed(ROWS))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    return drawn(data, tmp_path_factory.mktemp("hashed") / "model")


@pytest.fixture(scope="module")
def retriever(folder):
    return Retriever.load(folder)


def row(query) -> int:
    return int(hash_ids([query])[0]) % ROWS


def history(data, code: int) -> list:
    return data.items.decode(data.item_codes[data.offsets[code] : data.offsets[code + 1]]).to_list()


def strangers(data) -> tuple[str, str]:
    """Find two unseen ids: one whose row is in use, and one whose row is empty."""
    names = [f"stranger {n}" for n in range(1000)]
    taken = next(name for name in names if history(data, row(name)))
    return taken, next(name for name in names if not history(data, row(name)))


def test_the_history_of_a_row_is_that_of_all_ids_that_share_it(data, retriever, folder):
    assert SavedModel.load(folder).queries == HashedIds(Hashed(ROWS))
    frame = planted()
    for query in ("u000", "u017"):
        of_row = frame.filter(pl.Series([row(q) == row(query) for q in frame["user_id"]])).sort("timestamp")
        assert retriever.history(query)["item"].to_list() == of_row["item_id"].to_list() == history(data, row(query))


def test_retriever_and_service_use_the_row_of_an_id(data, retriever, folder):
    queries = ["u003", "u021", "u059"]
    found = retriever.recommend(queries, k=5)
    assert found["query"].to_list() == [query for query in queries for _ in range(5)], "the ids as given"
    with client(folder) as service:
        for query in queries:
            own = found.filter(pl.col("query") == query)["item"].to_list()
            assert own == retriever.recommend(histories=[history(data, row(query))], k=5)["item"].to_list()
            answer = service.post("/recommend", json={"query_id": query, "k": 5})
            assert [item["item"] for item in answer.json()["items"]] == own
            assert service.get("/page/history", params={"query_id": query}).status_code == 200
            assert service.get("/page/queries", params={"text": query}).json()["queries"] == [query]
        assert service.get("/page/queries").json()["queries"] == []


def test_an_id_with_an_empty_row_is_unknown_and_one_with_a_used_row_gets_its_results(data, retriever, folder):
    taken, empty = strangers(data)
    with pytest.raises(InputError, match=f"query '{empty}': unknown to this model"):
        retriever.recommend([empty])
    same = retriever.recommend(histories=[history(data, row(taken))], k=3)["item"].to_list()
    assert retriever.recommend([taken], k=3)["item"].to_list() == same
    with client(folder) as service:
        refused = service.post("/recommend", json={"query_id": empty})
        assert refused.status_code == 404 and "unknown to this model" in refused.json()["detail"]
        assert service.post("/recommend", json={"query_id": taken, "k": 3}).status_code == 200


def test_a_file_of_queries_is_answered_by_its_ids(data, retriever, tmp_path):
    _, empty = strangers(data)
    pl.DataFrame({"user_id": ["u003", empty, "u021"]}).write_parquet(tmp_path / "in.parquet")
    report = recommend_file(retriever, tmp_path / "in.parquet", tmp_path / "out.parquet", k=4)
    assert (report.answered, report.unknown) == (2, 1)
    found = pl.read_parquet(tmp_path / "out.parquet")
    expected = retriever.recommend(["u003", "u021"], k=4)
    assert found["item"].to_list() == expected["item"].to_list()


def test_codes_are_the_same_model_as_a_vocabulary_of_them(tmp_path):
    frame = planted().with_columns(pl.col("user_id").str.slice(1).cast(pl.Int64))
    plain, coded = (
        Retriever.load(drawn(Interactions.from_frame(frame, **kinds), tmp_path / name / "model"))
        for name, kinds in (("plain", {}), ("coded", {"query_ids": "codes", "item_ids": "codes"}))
    )
    assert len(coded.artifact.items) == len(plain.artifact.items), "all items occur"
    for asked in ({"queries": [3, 40]}, {"queries": ["3"]}, {"histories": [[1, 2, 10**6]]}):
        assert coded.recommend(**asked, k=7).equals(plain.recommend(**asked, k=7))
    with pytest.raises(InputError, match="query 60: unknown to this model"):
        coded.recommend([60])
    with client(tmp_path / "coded" / "model") as service:
        answer = service.post("/recommend", json={"query_id": "3", "k": 7}).json()["items"]
        assert [item["item"] for item in answer] == plain.recommend([3], k=7)["item"].to_list()
        assert service.post("/recommend", json={"query_id": 60}).status_code == 404
