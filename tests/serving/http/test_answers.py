"""Results of the service: the ids that `evaluate` ranks and the retriever returns, alone and in batches."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from support.service_models import client, drawn
from twotower.evaluation import evaluate
from twotower.serving import Retriever
from twotower.serving.http.catalog_map import Atlas, principal
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.model_card import without_folders
from twotower.serving.http.problems import Problem
from twotower.serving.http.service import Batcher


@pytest.fixture(scope="module")
def folder(planted_data, tmp_path_factory):
    return drawn(planted_data, tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def retriever(folder):
    return Retriever.load(folder)


@pytest.fixture(scope="module")
def service(folder):
    with client(folder) as made:
        yield made


def ids(answer):
    assert answer.status_code == 200, answer.text
    return [row["item"] for row in answer.json()["items"]]


class Measured:
    """A ranker that records its rankings."""

    def __init__(self, ranker):
        self.ranker, self.ranked = ranker, []

    def rank(self, holdout, k, exclude_seen):
        self.ranked.append(self.ranker.rank(holdout, k, exclude_seen))
        return self.ranked[-1]


def test_the_service_answers_what_evaluate_ranks_and_the_retriever_returns(service, retriever, planted_split):
    """Concurrent requests for all test queries with their histories return the ids that `evaluate` measured."""
    test, artifact = planted_split.test, retriever.artifact
    measured = Measured(retriever)
    evaluate(measured, test, train=planted_split.train, ks=(10,), baselines=False)
    assert len(measured.ranked) == 1
    ranked = measured.ranked[0][:, :10]
    bodies = [
        {
            "query_id": artifact.queries.decode([code])[0],
            "history": artifact.items.decode(test.history_items[a:b].astype(np.int64)).to_list(),
            "k": 10,
        }
        for code, a, b in zip(test.queries, test.history_offsets[:-1], test.history_offsets[1:], strict=True)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: ids(service.post("/recommend", json=body)), bodies))
    assert len(bodies) == 60
    assert answers == [artifact.items.decode(row).to_list() for row in ranked]
    found = retriever.recommend([b["query_id"] for b in bodies], histories=[b["history"] for b in bodies], k=10)
    assert [item for row in answers for item in row] == found["item"].to_list()


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"query_id": "u003", "k": 7}, {"queries": ["u003"], "k": 7}),
        ({"query_id": "u003", "k": 100, "exclude_seen": False}, {"queries": ["u003"], "k": 100, "exclude_seen": False}),
        ({"history": [4, "6", 88], "popularity": 0.2}, {"histories": [[4, 6, 88]], "popularity": 0.2}),
        ({"history": [4, "no such item", 10**15, 6]}, {"histories": [[4, 6]]}),
        ({"query_id": "u008", "history": [1]}, {"queries": ["u008"], "histories": [[1]]}),
        ({"query_id": "u008", "filter": "title LIKE '%3%'", "popularity": 2}, {"queries": ["u008"], "popularity": 2.0}),
    ],
)
def test_every_kind_of_request_matches_the_retriever(service, retriever, body, asked):
    answer = service.post("/recommend", json=body)
    expected = retriever.recommend(**asked, filter=body.get("filter"))
    assert ids(answer) == expected["item"].to_list()
    rows = answer.json()["items"]
    assert [row["title"] for row in rows] == expected["title"].to_list()
    assert [row["rank"] for row in rows] == expected["rank"].to_list()
    assert [row["score"] for row in rows] == pytest.approx(expected["score"].to_list(), abs=1e-6)
    counts = retriever.artifact.item_counts.numpy()[retriever.artifact.items.encode(ids(answer))]
    assert [row["interactions"] for row in rows] == counts.tolist()


def test_similar_items_match_the_retriever(service, retriever):
    for body in ({"item": 4, "k": 6}, {"item": "17", "k": 99}, {"item": 3, "filter": "title LIKE '%1'"}):
        expected = retriever.similar([int(body["item"])], body.get("k", 10), filter=body.get("filter"))
        assert ids(service.post("/similar", json=body)) == expected["item"].to_list()


def test_explanations_match_the_retriever(service, retriever):
    items = ids(service.post("/recommend", json={"query_id": "u003", "k": 4}))
    explained = service.post("/explain", json={"query_id": "u003", "items": items, "popularity": 0.5}).json()["items"]
    for item, one in zip(items, explained, strict=True):
        expected = retriever.explain("u003", item=item, popularity=0.5).to_dict()
        assert one["item"] == item and one["lift"] == pytest.approx(expected["lift"], abs=1e-6)
        assert [row["item"] for row in one["history"]] == [row["item"] for row in expected["history"]]


def test_items_histories_and_queries(service, retriever):
    one = service.get("/items/17").json()
    assert (one["item"], one["title"], one["columns"]["title"]) == (17, "Item number 17", "Item number 17")
    found = service.get("/items", params={"text": "NUMBER 2", "k": 5}).json()["items"]
    assert [row["item"] for row in found] == retriever.search_titles("number 2", 5)["item"].to_list()
    history = service.get("/page/history", params={"query_id": "u003"}).json()["items"]
    assert [row["item"] for row in history] == retriever.history("u003")["item"].to_list()
    begins = service.get("/page/queries", params={"text": "u01"}).json()["queries"]
    assert begins == [f"u01{digit}" for digit in range(10)]
    assert len(service.get("/page/queries", params={"k": 5}).json()["queries"]) == 5


def test_the_map_puts_similar_items_together():
    """Ten clusters: neighbours on the map nearly always share a cluster, unlike with two principal components."""
    torch.manual_seed(0)
    cluster = torch.arange(300) % 10
    embeddings = torch.randn(10, 32)[cluster] + 0.6 * torch.randn(300, 32)

    def together(places):
        apart = ((places[:, None] - places[None]) ** 2).sum(-1) + 9 * np.eye(300)
        return (cluster.numpy()[np.argsort(apart, 1)[:, :5]] == cluster.numpy()[:, None]).mean()

    atlas = Atlas.draw(embeddings)
    assert together(atlas.places) > 0.95 > together(principal(atlas.embeddings)) + 0.1
    assert np.abs(atlas.places).max() == pytest.approx(1.0)
    assert np.array_equal(atlas.places, Atlas.draw(embeddings).places), "the same items must give the same map"


def test_items_outside_the_sample_lie_among_their_nearest(monkeypatch):
    monkeypatch.setattr("twotower.serving.http.catalog_map.SAMPLE", 150)
    torch.manual_seed(0)
    cluster = torch.arange(300) % 3
    atlas = Atlas.draw(torch.randn(3, 32)[cluster] + 0.3 * torch.randn(300, 32))
    assert len(atlas.sample) == 150
    places = atlas.place(np.arange(300))
    assert np.array_equal(places[atlas.sample], atlas.places)
    middles = np.stack([atlas.places[cluster.numpy()[atlas.sample] == c].mean(0) for c in range(3)])
    nearest = ((places[:, None] - middles[None]) ** 2).sum(-1).argmin(1)
    assert np.array_equal(nearest, cluster.numpy())


def test_the_map_over_http(service):
    found = service.get("/page/map").json()
    assert len(found["x"]) == len(found["titles"]) == 100
    places = service.post("/page/places", json={"items": [7, "nothing", 8]}).json()["places"]
    place = found["items"].index(7)
    assert places[1] is None and places[0] == [found["x"][place], found["y"][place]]


def test_the_card_describes_the_model_without_folder_names(service):
    card = service.get("/page/card").json()
    assert card["model"]["num_items"] == 100 and card["data"]["account"] and card["data"]["source"] == "purchases.csv"
    values = {"note": "/work/data/set/rows.parquet (a/b)", "list": ["read /a/b.csv, 3/4 of http://host/x"], "n": 1}
    assert without_folders(values) == {
        "note": "rows.parquet (a/b)",
        "list": ["read b.csv, 3/4 of http://host/x"],
        "n": 1,
    }


def test_concurrent_requests_are_searched_together():
    """Requests queue while a batch is searched; settings are never mixed; each request fails on its own."""
    release, calls = threading.Event(), []

    def run(key, questions):
        calls.append((key, list(questions)))
        release.wait(10)
        return [ValueError("this one") if one < 0 else (key, one) for one in questions]

    async def scene():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(run, pool, capacity=8, largest=3, metrics=Metrics())
            batcher.start()
            first = asyncio.create_task(batcher.submit(("a",), 0))
            while not calls:
                await asyncio.sleep(0.001)
            tasks = [asyncio.create_task(batcher.submit((key,), n)) for key, n in
                     [("a", 1), ("b", 2), ("a", 3), ("a", -4), ("a", 5), ("b", 6), ("a", 7), ("b", 8)]]  # fmt: skip
            await asyncio.sleep(0.01)
            with pytest.raises(Problem) as full:
                await batcher.submit(("a",), 9)
            assert full.value.status == 503 and full.value.headers["Retry-After"] == "1"
            release.set()
            answers = await asyncio.gather(first, *tasks, return_exceptions=True)
            await batcher.stop()
            with pytest.raises(Problem):
                await batcher.submit(("a",), 10)
            return answers

    answers = asyncio.run(scene())
    assert calls[1:] == [(("a",), [1, 3, -4]), (("b",), [2, 6, 8]), (("a",), [5, 7])]
    assert str(answers[4]) == "this one" and [a for a in answers if not isinstance(a, Exception)][1:3] == [
        (("a",), 1),
        (("b",), 2),
    ]


def test_operations(service):
    assert service.get("/healthz").json()["status"] == "alive"
    assert list(service.get("/readyz").json()["models"]) == [service.get("/models").json()["models"][0]["name"]]
    service.post("/recommend", json={"query_id": "u001"})
    text = service.get("/metrics").text
    assert 'twotower_requests_total{method="POST",route="/recommend",status="200"}' in text
    assert "twotower_batch_size_count" in text and "process_resident_memory_bytes" in text


def test_two_models_by_name(planted_data, folder, tmp_path):
    other = drawn(planted_data, tmp_path / "other" / "model", seed=1)
    with client(folder, other) as both:
        names = [model["name"] for model in both.get("/models").json()["models"]]
        assert names[1] == "other" and len(set(names)) == 2
        body = {"query_id": "u005", "k": 50}
        answers = [both.post("/recommend", json={**body, "model": name}).json() for name in names]
        assert [answer["model"] for answer in answers] == names
        assert answers[0]["items"] != answers[1]["items"]
        assert [row["item"] for row in answers[1]["items"]] == Retriever.load(other).recommend(["u005"], k=50)[
            "item"
        ].to_list()
        assert both.post("/recommend", json={**body, "model": "third"}).status_code == 404
