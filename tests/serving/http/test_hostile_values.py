"""Values that could stop the service: nested, long or broken ones, filters, and failures of native code."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from support.hostile_conditions import HOSTILE as HOSTILE_CONDITIONS
from support.service_models import client, drawn, listening
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.serving.http.app import ServiceSettings, create_app
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.models import json_id
from twotower.serving.http.problems import Problem
from twotower.serving.http.service import Batcher, run_shielded

DECLARED = [
    "query_tower.features=[{column: code, kind: categorical}]",
    "query_tower.context=[{column: device, kind: categorical}]",
]


@pytest.fixture(scope="module")
def folder(planted_data, tmp_path_factory):
    people = pl.DataFrame({"user_id": planted_data.queries.ids, "code": [str(q % 4) for q in range(60)]})
    context = pl.DataFrame({"device": ["phone", "tv"] * (len(planted_data.item_codes) // 2)})
    data = replace(planted_data, query_table=people, context=context)
    return drawn(data, tmp_path_factory.mktemp("values") / "model", changes=DECLARED)


@pytest.fixture(scope="module")
def service(folder):
    with client(folder) as made:
        yield made


def nested(depth, shape):
    value = 1
    for _ in range(depth):
        value = [value] if shape == "list" else {"a": value}
    return value


HOSTILE = {
    "a list in a list": nested(2, "list"),
    "400 lists": nested(400, "list"),
    "900 lists": nested(900, "list"),
    "900 objects": nested(900, "object"),
    "an object": {"a": 1},
    "objects in a list": [{"a": 1}],
    "a long list": [1] * 5001,
    "long text": "x" * 20_001,
    "a huge integer": 10**300,
    "a huge integer in a list": [1, -(10**300)],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["features", "context"])
def test_only_scalars_and_flat_lists_pass(service, folder, name, field):
    column = "code" if field == "features" else "device"
    values = {column: HOSTILE[name]}
    began = time.perf_counter()
    answer = service.post("/recommend", json={"query_id": "u001", field: values})
    assert answer.status_code == 422 and field in answer.json()["detail"] and column in answer.json()["detail"]
    assert len(answer.text) < 500 and time.perf_counter() - began < 60
    with pytest.raises(InputError, match=f"^{field}: column '{column}': expected"):
        tt.Retriever.load(folder).recommend(["u001"], **{field: [values]})
    assert service.post("/recommend", json={"query_id": "u001"}).status_code == 200


def test_too_many_columns_are_refused(service):
    answer = service.post("/recommend", json={"context": {f"c{n}": 1 for n in range(201)}})
    assert answer.status_code == 422 and "200" in answer.json()["detail"]


@pytest.mark.parametrize("value", ["phone", 3, 2.5, True, None, ["phone", "tv"], [1, 2.5, None, True, "x"], []])
def test_scalars_and_flat_lists_are_checked_by_their_column_only(service, value):
    answer = service.post("/recommend", json={"query_id": "u001", "context": {"device": value}})
    assert answer.status_code in (200, 422), answer.text
    assert "flat list of these" not in answer.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"features": [{"code": np.ones((2, 2))}]}, "in a list"),
        ({"features": [7]}, "features: expected columns and values, found int"),
        ({"features": {"code": "1"}}, "features: expected a list with one dict for each query, found dict"),
        ({"features": "x"}, "features: expected a list with one dict for each query, found str"),
        ({"context": "phone"}, "context: expected a list with one dict for each query, found str"),
        ({"context": {"device": object()}}, "context: column 'device': expected a number, text"),
    ],
)
def test_the_python_door_checks_the_same(folder, asked, message):
    with pytest.raises(InputError, match=message):
        tt.Retriever.load(folder).recommend(["u001"], **asked)


def test_hostile_filters_delay_nobody(service, folder):
    """All are refused, while /healthz and an ordinary request are answered beside, again and again."""
    done, beside = threading.Event(), []

    def others(address):
        while not done.wait(0.05):
            asked = httpx.post(f"{address}recommend", json={"query_id": "u002", "k": 3}, timeout=200)
            beside.append((httpx.get(f"{address}healthz", timeout=200).status_code, asked.status_code))

    with listening(create_app([folder], ServiceSettings(hosts=("127.0.0.1",), watch_seconds=0))) as address:
        thread = threading.Thread(target=others, args=[address])
        thread.start()
        try:
            for condition in HOSTILE_CONDITIONS:
                answer = httpx.post(f"{address}recommend", json={"query_id": "u001", "filter": condition}, timeout=200)
                assert answer.status_code == 422 and answer.json()["detail"].startswith("filter"), condition[:200]
                assert "root:" not in answer.text and len(answer.text) < 2000
        finally:
            done.set()
            thread.join()
    assert len(beside) > 20 and set(beside) == {(200, 200)}
    ok = service.post("/recommend", json={"query_id": "u001", "filter": "title like '%1'"})
    assert ok.status_code == 200 and all(row["title"].endswith("1") for row in ok.json()["items"])


@pytest.mark.parametrize(
    "failure", [pl.exceptions.PanicException, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration]
)
def test_a_batch_that_raises_anything_fails_alone(failure):
    """The worker answers the next batch, whatever the one before raised."""

    def run(key, requests):
        if key == ("bad",):
            raise failure("native code")
        return [request * 2 for request in requests][: None if key == ("good",) else 0]

    async def scene():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(run, pool, capacity=8, largest=4, metrics=Metrics())
            batcher.start()
            found = await asyncio.gather(
                *(batcher.submit((key,), n) for n, key in enumerate(("good", "bad", "good", "short", "bad"))),
                return_exceptions=True,
            )
            again = await asyncio.wait_for(batcher.submit(("good",), 21), 10)
            await batcher.stop()
            return found, again

    found, again = asyncio.run(scene())
    assert (found[0], found[2], again) == (0, 4, 42)
    assert all(isinstance(found[place], Exception) for place in (1, 3, 4))


def test_the_service_answers_500_and_lives_on(service, monkeypatch):
    def panic(*_, **__):
        raise pl.exceptions.PanicException("called `Option::unwrap()` on a `None` value in /somewhere/secret.rs")

    body = {"query_id": "u001", "context": {"device": "tv"}}
    with monkeypatch.context() as patched:
        patched.setattr(service.app.state.service.models.model(None).retriever, "embed", panic)
        failed = service.post("/recommend", json=body)
        assert failed.status_code == 500 and "secret" not in failed.text and "unwrap" not in failed.text
        patched.setattr("twotower.serving.http.page_routes.explained", panic)
        failed = service.post("/explain", json={**body, "items": [1]})
        assert failed.status_code == 500 and "secret" not in failed.text
    assert service.post("/recommend", json=body).status_code == 200


def test_a_slow_answer_is_given_up_on(folder, monkeypatch):
    with client(folder, answer_seconds=0.2) as slow:
        served = slow.app.state.service.models.model(None)
        monkeypatch.setattr(served, "described", lambda code: time.sleep(1.0))
        answer = slow.get("/items/1")
        assert answer.status_code == 503 and "no answer within 0.2 seconds" in answer.json()["detail"]
        assert answer.headers["retry-after"] == "1"


def test_shielding_keeps_exceptions_and_results():
    assert run_shielded(int, "7") == 7
    with pytest.raises(InputError):
        run_shielded(lambda: (_ for _ in ()).throw(InputError("x")))
    with pytest.raises(Problem):
        run_shielded(lambda: (_ for _ in ()).throw(Problem(404, "x")))


def test_one_rule_for_what_can_be_answered(folder, service, tmp_path):
    """Python, a file and the service agree on every mixture of inputs, and give the same reason."""
    retriever = tt.Retriever.load(folder)
    inputs = {
        "history": ([1, 2], [99999], None),
        "features": ({"code": "1"}, None),
        "context": ({"device": "tv"}, {"device": None}, {}, None),
    }
    agreed = set()
    for history in inputs["history"]:
        for features in inputs["features"]:
            for context in inputs["context"]:
                given = {"history": history, "features": features, "context": context}
                body = {name: value for name, value in given.items() if value is not None}
                answer = service.post("/recommend", json=body)
                try:
                    found = retriever.recommend(
                        histories=None if history is None else [history],
                        features=None if features is None else [features],
                        context=context,
                    )
                except InputError as error:
                    # An unknown id is 404, and anything else that cannot be answered 422.
                    assert answer.status_code == (404 if history == [99999] else 422), given
                    reason = str(error).partition(": ")[2]
                    assert not reason or answer.json()["detail"].endswith(reason), (answer.text, str(error))
                    agreed.add(False)
                else:
                    assert [row["item"] for row in answer.json()["items"]] == found["item"].to_list(), given
                    agreed.add(True)
    assert agreed == {True, False}
    source, target = tmp_path / "q.parquet", tmp_path / "r.parquet"
    rows = {
        "query": ["u001", "new 1", "new 2", "new 3", "new 4"],
        "history": [None, [1, 2], [99999], [], None],
        "device": [None, None, None, "tv", None],
    }
    pl.DataFrame(rows, schema_overrides={"history": pl.List(pl.Int64)}).write_parquet(source)
    from twotower.serving.batch import recommend_file

    report = recommend_file(retriever, source, target, k=3)
    assert (report.answered, report.unknown) == (3, 2)
    alone = retriever.recommend(context={"device": "tv"}, k=3)
    assert pl.read_parquet(target)["item"].to_list()[6:] == alone["item"].to_list()


def test_large_integer_ids_reach_json_clients_exactly(tmp_path):
    """Above 2^53 ids are text, in every answer, and such text is accepted where an id is due."""
    base = 2**53
    frame = pl.DataFrame({
        "user_id": [base + 1 + n % 6 for n in range(60)],
        "item_id": [(base if n % 20 else 0) + 2 * (n % 20) + 1 for n in range(60)],
        "timestamp": list(range(1_600_000_000, 1_600_000_060)),
    })  # fmt: skip
    data = Interactions.from_frame(frame)
    torch.manual_seed(0)
    folder = drawn(data, tmp_path / "model", table=pl.DataFrame({"item_id": data.items.ids, "code": data.items.ids}))
    with client(folder) as service:
        body = {"query_id": str(base + 1), "k": 20, "exclude_seen": False}
        answer = service.post("/recommend", json=body)
        assert answer.status_code == 200, answer.text
        rounded = json.loads(answer.text, parse_int=float)["items"]
        items = [row["item"] for row in answer.json()["items"]]
        assert [int(row["item"]) for row in rounded] == [int(one) for one in items], (
            "a reader with doubles sees the same"
        )
        assert 1 in items and str(base + 3) in items and len(set(map(int, items))) == 20
        assert sorted(map(int, items)) == data.items.ids.to_list()
        again = service.post("/similar", json={"item": str(base + 3), "k": 19}).json()["items"]
        assert str(base + 3) not in {row["item"] for row in again} and len(again) == 19
        asked = service.post("/explain", json={**{"query_id": body["query_id"]}, "items": items[:2]}).json()["items"]
        assert [one["item"] for one in asked] == items[:2]
        assert all(isinstance(row["item"], str) or row["item"] == 1 for one in asked for row in one["history"])
        one = service.get(f"/items/{base + 3}").json()
        assert one["item"] == one["columns"]["code"] == str(base + 3)
        assert str(base + 1) in service.get("/page/queries").json()["queries"]
        assert set(map(int, service.get("/page/map").json()["items"])) == set(data.items.ids.to_list())
    assert (json_id(2**53 - 1), json_id(2**53), json_id("x")) == (2**53 - 1, str(2**53), "x")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.recommend("u001"), "queries: expected a list of ids, found 'u001'; write \\['u001'\\]"),
        (lambda r: r.recommend(1), "queries: expected a list of ids, found 1; write \\[1\\]"),
        (lambda r: r.recommend(histories=["12"]), "histories: expected a list of ids, found '12'"),
        (lambda r: r.recommend(histories="12"), "histories: expected a list of lists of item ids, found '12'"),
        (lambda r: r.recommend(histories=[1, 2]), "histories: expected a list of ids, found 1"),
        (lambda r: r.similar("1"), "items: expected a list of ids, found '1'"),
        (lambda r: r.similar(1), "items: expected a list of ids, found 1"),
        (lambda r: r.describe("1"), "items: expected a list of ids"),
        (lambda r: r.recommend(["u001"], allow="1"), "allow: expected a list of ids"),
        (lambda r: r.recommend(["u001"], deny=1), "deny: expected a list of ids"),
        (lambda r: r.recommend(["u001"], k=2.0), "k: expected an integer of at least 1, found 2.0"),
        (lambda r: r.recommend(["u001"], k="2"), "k: expected an integer of at least 1, found '2'"),
        (lambda r: r.recommend(["u001"], k=True), "k: expected an integer"),
        (lambda r: r.recommend(["u001"], k=np.int64(0)), "k: expected an integer of at least 1"),
        (lambda r: r.recommend(["u001"], k=None), "k: expected an integer"),
    ],
)
def test_a_single_value_where_a_list_is_due_is_refused(folder, ask, message):
    with pytest.raises(InputError, match=message):
        ask(tt.Retriever.load(folder))


def test_lists_of_any_kind_and_numpy_integers_are_accepted(folder):
    retriever = tt.Retriever.load(folder)
    expected = retriever.recommend(["u001", "u002"], k=2, deny=[3])
    for queries in (("u001", "u002"), np.array(["u001", "u002"]), pl.Series(["u001", "u002"])):
        for k in (np.int64(2), np.uint8(2)):
            assert retriever.recommend(queries, k=k, deny=np.array([3])).equals(expected)
    whole = retriever.recommend(["u001"], k=10**9, exclude_seen=False)
    assert len(whole) == 100 and whole.equals(retriever.recommend(["u001"], k=100, exclude_seen=False))
    assert len(retriever.similar([1], k=10**9)) == 99
    assert len(retriever.search_titles("item", k=10**9)) == 100
