"""Request context that determines the item: it is learned, and every entry point uses it."""

import json
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import twotower as tt
from support.service_models import client
from twotower.cli import main as cli
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.features.feature_set import FeatureSet
from twotower.run import read_data, reread, train_run
from twotower.serving.batch import recommend_file
from twotower.serving.export import export_query_tower
from twotower.serving.http import form_fields
from twotower.serving.http.handlers import PendingRequest, RecommendKey, answer
from twotower.serving.http.models import ServedModel

SMALL = [
    "data.split=leave-last-out",
    "training.max_epochs=8",
    "training.batch_size=128",
    "training.learning_rate=0.02",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "training.logger=none",
    "item_tower.dimension=16",
    "query_tower.history.length=5",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
    "evaluation.baselines=false",
]
CONTEXT = (
    "query_tower.context=[{column: device, kind: categorical}, {column: timestamp, kind: timestamp, parts: [hour]}]"
)
SEQUENCE = "query_tower.history.sequence={kind: gru, blocks: 1, dropout: 0}"


def log(days=(0, 14), queries=80, seed=0, devices=("phone", "desk", "tv")):
    """Make a log: items depend on the device, and on the time: lower half in the morning, upper half in the evening."""
    rng = np.random.default_rng(seed)
    rows = []
    for q in range(queries):
        for day in range(*days):
            device, evening = int(rng.integers(len(devices))), int(rng.integers(2))
            hour = 6 + 12 * evening + int(rng.integers(3))
            item = 12 * device + 6 * evening + int(rng.integers(6))
            when = 1_699_920_000 + day * 86_400 + hour * 3_600 + int(rng.integers(3_600))
            rows.append((f"u{q:02d}", item, when, devices[device], float(rng.random())))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "device", "noise"], orient="row")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of the same data, with and without its context: {name: (folder, model, evaluation)}."""
    folder = tmp_path_factory.mktemp("context")
    log().write_csv(folder / "log.csv")
    found = {}
    for name, changes in {"with": [CONTEXT], "without": [], "sequence": [CONTEXT, SEQUENCE]}.items():
        config = Config.load(None, [*SMALL, *changes])
        model, measured = train_run(
            folder / "log.csv", folder / name, config, progress=False, on_message=lambda text: None
        )
        found[name] = folder / name, model, measured["model"].values
    return found


def places(frame):
    """Return the device and the half of the day that recommended items belong to."""
    return (frame["item"] // 12).to_numpy(), (frame["item"] % 12 // 6).to_numpy()


@pytest.mark.parametrize("name", ["with", "sequence"])
def test_the_context_predicts_what_nothing_else_does(runs, name):
    """36 items, 6 of them correct for a context: recall of these six at 10, against 10 / 36 by chance."""
    with_, without = runs[name][2]["Recall@10"], runs["without"][2]["Recall@10"]
    assert without < 0.45
    assert with_ > 0.8
    assert with_ > without + 0.4


@pytest.mark.parametrize("name", ["with", "sequence"])
def test_the_service_answers_differently_for_different_contexts(runs, name):
    folder = runs[name][0]
    retriever = tt.Retriever.load(folder)
    with client(folder) as service:
        for device, number in (("phone", 0), ("desk", 1), ("tv", 2)):
            for evening, hour in ((0, "07:30"), (1, "19:15")):
                context = {"device": device, "timestamp": f"2024-06-03 {hour}:00"}
                question = {"query_id": "u07", "context": context, "k": 5, "exclude_seen": False}
                answer = service.post("/recommend", json=question)
                assert answer.status_code == 200, answer.text
                items = [one["item"] for one in answer.json()["items"]]
                found = retriever.recommend(["u07"], context=context, k=5, exclude_seen=False)
                assert items == found["item"].to_list()
                devices, halves = places(found)
                assert (devices == number).mean() >= 0.8 and (halves == evening).mean() >= 0.8
        alone = service.post("/recommend", json={"context": {"device": "tv"}, "k": 6})
        assert alone.status_code == 200
        assert np.mean([one["item"] // 12 == 2 for one in alone.json()["items"]]) > 0.6
        phone = service.post("/explain", json={"query_id": "u07", "items": [3], "context": {"device": "phone"}})
        other = service.post("/explain", json={"query_id": "u07", "items": [3], "context": {"device": "tv"}})
        assert phone.json()["items"][0]["logit"] > other.json()["items"][0]["logit"] + 0.5
        alone = service.post("/explain", json={"items": [30], "context": {"device": "tv"}}).json()["items"][0]
        ours = retriever.explain(item=30, context={"device": "tv"})
        assert alone["logit"] == pytest.approx(ours.logit, abs=1e-5) and not alone["history"]
        for wrong, message in (({"devise": "tv"}, "devise"), ({"timestamp": "soon"}, "timestamp"), (7, "context")):
            refused = service.post("/recommend", json={"query_id": "u07", "context": wrong})
            assert refused.status_code == 422 and message in refused.text


def test_missing_context_is_unknown(runs):
    retriever = tt.Retriever.load(runs["with"][0])
    plain = retriever.recommend(["u03", "u04"], k=4)
    for context in ({}, {"device": None}, [{}, None], {"timestamp": None, "device": None}):
        same = retriever.recommend(["u03", "u04"], context=context, k=4)
        assert same["item"].to_list() == plain["item"].to_list()
        assert np.allclose(same["score"], plain["score"], atol=1e-6)
    unseen = retriever.recommend(["u03"], context={"device": "watch"}, k=4)
    assert len(unseen) == 4
    each = retriever.recommend(["u03", "u03"], context=[{"device": "desk"}, {"device": "tv"}], k=3)
    devices, _ = places(each)
    assert (devices[:3] == 1).all() and (devices[3:] == 2).all()


def test_invalid_requests_are_refused(runs):
    retriever = tt.Retriever.load(runs["with"][0])
    with pytest.raises(InputError, match="context: expected one row for each query, 2; found 1"):
        retriever.recommend(["u03", "u04"], context=[{}])
    with pytest.raises(InputError, match="nothing is known about this query"):
        retriever.recommend(histories=[[999]], context=[None])
    plain = tt.Retriever.load(runs["without"][0])
    with pytest.raises(InputError, match="does not use a request context; set query_tower.context"):
        plain.recommend(["u03"], context={"device": "tv"})
    with client(runs["without"][0]) as service:
        refused = service.post("/recommend", json={"query_id": "u03", "context": {"device": "tv"}})
        assert refused.status_code == 422 and "does not use a request context" in refused.text


def test_a_training_row_and_the_same_request_have_one_embedding(runs):
    folder, model, _ = runs["with"]
    split = model.split
    retriever = tt.Retriever.load(folder)
    holdout = split.test
    histories = (holdout.history_offsets, holdout.history_items)
    by_rows = retriever.embed(holdout.queries, histories, context=holdout.context)
    seconds = (holdout.query_times // 1_000_000).tolist()
    asked = [
        {"device": d, "timestamp": [t, t * 1000, str(timestamp)][place % 3]}
        for place, (d, t, timestamp) in enumerate(
            zip(holdout.context["device"], seconds, holdout.context["timestamp"], strict=True)
        )
    ]
    by_requests = retriever.embed(holdout.queries, histories, context=asked)
    assert float((by_rows - by_requests).abs().max()) < 1e-6
    blind = retriever.embed(holdout.queries, histories)
    assert float((by_rows - blind).abs().max()) > 0.1


def test_the_service_reports_the_context_it_takes_and_the_column_at_fault(runs, monkeypatch):
    with client(runs["with"][0]) as service:
        (summary,) = service.get("/models").json()["models"]
        device = {"column": "device", "kind": "categorical", "values": ["desk", "phone", "tv"], "separator": None,
                  "default": None}  # fmt: skip
        timestamp = {"column": "timestamp", "kind": "timestamp", "values": None, "separator": None,
                     "default": None}  # fmt: skip
        assert summary["context"] == [device, timestamp]
        for path, more in (("/recommend", {}), ("/explain", {"items": [3]})):
            for column, value in (("timestamp", "soon"), ("devi/ce é", 1)):
                asked = {"query_id": "u07", "context": {"device": "tv", column: value}, **more}
                refused = service.post(path, json=asked).json()
                pointer = {"timestamp": "#/context/timestamp"}.get(column, "#/context/devi~1ce%20%C3%A9")
                assert refused["errors"] == [{"detail": refused["detail"], "pointer": pointer}]
        assert "errors" not in service.post("/recommend", json={"query_id": "nobody"}).json()
    with client(runs["without"][0]) as service:
        assert service.get("/models").json()["models"][0]["context"] == []
    features = tt.Retriever.load(runs["with"][0]).ranker.context_features()
    monkeypatch.setattr(form_fields, "MOST_VALUES", 2)
    assert form_fields.context_fields(features)[0] == {**device, "values": None}


@pytest.fixture
def encoded(monkeypatch):
    """Number of rows of each call that encodes features, in order."""
    calls, original = [], FeatureSet.encode_rows

    def counted(features, frame, place):
        calls.append(len(frame))
        return original(features, frame, place)

    monkeypatch.setattr(FeatureSet, "encode_rows", counted)
    return calls


@pytest.mark.parametrize("name", ["with", "sequence"])
def test_the_context_of_a_request_is_encoded_once(runs, name, encoded):
    folder = runs[name][0]
    retriever, context = tt.Retriever.load(folder), {"device": "tv", "timestamp": "2024-06-03 19:15"}
    with client(folder) as service:
        for path, more in (("/recommend", {"k": 3}), ("/explain", {"items": [3, 17, 30]})):
            encoded.clear()
            answer = service.post(path, json={"query_id": "u07", "context": context, **more})
            assert answer.status_code == 200 and encoded == [1], path
    for ask in (retriever.recommend, lambda q, context: retriever.explain(q[0], item=3, context=context)):
        encoded.clear()
        ask(["u07"], context=context)
        assert encoded == [1]


def listed(body):
    rows = json.loads(body)["items"]
    return [row["item"] for row in rows], [row["score"] for row in rows]


def assert_same(found, others):
    """Compare item lists, and scores up to the rounding of products with different batch sizes."""
    for (items, scores), (expected, logits) in zip(found, others, strict=True):
        assert items == expected and np.allclose(scores, logits, atol=1e-5)


def test_a_batch_is_encoded_together_and_an_invalid_context_is_found_in_few_calls(runs, encoded):
    model = ServedModel.load("with", runs["with"][0])
    key = RecommendKey("recommend", model, True, None, 1.0, None)
    asked = [PendingRequest(4, f"u{n:02d}", context={"device": ("phone", "tv")[n % 2]}) for n in range(32)]
    alone = [listed(answer(key, [one])[0]) for one in asked]
    assert len({tuple(items) for items, _ in alone}) > 16
    encoded.clear()
    assert_same([listed(one) for one in answer(key, asked)], alone)
    assert encoded == [32]
    # One invalid context, one unknown query, one without context: the others are answered as before.
    asked[13] = replace(asked[13], context={"timestamp": "soon"})
    asked[21], asked[30] = replace(asked[21], query="nobody"), replace(asked[30], context=None)
    alone[30] = listed(answer(key, [asked[30]])[0])
    encoded.clear()
    found = answer(key, asked)
    others = [place for place in range(32) if place not in (13, 21)]
    assert_same([listed(found[place]) for place in others], [alone[place] for place in others])
    assert str(found[13]).startswith("context: column 'timestamp', row 1: expected unix time or ISO text")
    assert "query_id" in str(found[21])
    # The whole batch, then two halves of the failing part each time; times the kinds of context in it.
    assert len(encoded) <= 3 * (1 + 2 * 5)


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["twotower", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_the_command_line_and_files(runs, tmp_path, monkeypatch, capsys):
    folder = runs["with"][0]
    context = {"device": "desk", "timestamp": "2024-06-03 07:00:00"}
    expected = tt.Retriever.load(folder).recommend(["u05"], context=context, k=4)
    words = ["recommend", folder, "--query", "u05", "--context", json.dumps(context), "-k", "4", "--json"]
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 0, err
    assert [one["item"] for one in json.loads(out)] == expected["item"].to_list()
    code, _, err = run(monkeypatch, capsys, "recommend", folder, "--query", "u05", "--context", "[1]")
    assert code == 2 and "--context [1]: expected an object" in err
    rows = pl.DataFrame({"user_id": ["u05", "u05", "nobody", "no one"], "device": ["desk", "tv", "tv", None]})
    rows.write_parquet(tmp_path / "asked.parquet")
    report = recommend_file(tt.Retriever.load(folder), tmp_path / "asked.parquet", tmp_path / "found.parquet", k=3)
    found = pl.read_parquet(tmp_path / "found.parquet")
    assert found["query"].unique(maintain_order=True).to_list() == ["u05", "nobody"] and report.unknown == 1
    # An unknown query is answered by its context, as from Python and over HTTP.
    assert places(found)[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 2]
    code, out, err = run(monkeypatch, capsys, "features", folder.parent / "log.csv")
    assert code == 0, err
    assert "query_tower:\n  context:" in out and "{column: timestamp, kind: timestamp, parts: [hour, weekday]}" in out
    assert "determined by the item" in out  # in this log no item occurs on two devices


def test_an_export_refuses(runs, tmp_path):
    with pytest.raises(InputError, match=r"reads the context of a request \(device, timestamp\)"):
        export_query_tower(runs["with"][0], tmp_path / "out", "torch")


def test_a_saved_model_is_evaluated_again_with_the_context_of_the_test(runs):
    folder, model, values = runs["with"]
    artifact, split = reread(folder)
    again = tt.evaluate(tt.Retriever(artifact), split.test, train=split.train, ks=(10,), baselines=False)
    assert again["model"].values["Recall@10"] == pytest.approx(values["Recall@10"])
    assert split.test.context.equals(model.split.test.context.select(split.test.context.columns))


@pytest.mark.parametrize("name", ["with", "sequence"])
def test_new_days_bring_new_devices(runs, name, tmp_path):
    """Continued training learns a device of the new days, and keeps what it knew of the old ones."""
    folder, model, _ = runs[name]
    log((14, 24), seed=3, devices=("phone", "desk", "watch")).write_csv(tmp_path / "new.csv")
    config = Config.load(None, ["training.max_epochs=6"], base=tt.run.settings_of(folder))
    child, _ = train_run(
        tmp_path / "new.csv",
        tmp_path / "child",
        config,
        warm_start=folder,
        progress=False,
        on_message=lambda text: None,
    )
    features = child.artifact.towers.query_tower.context.inputs.table.features
    assert features.encoders[0].values.known.ids.to_list() == ["desk", "phone", "tv", "watch"]
    old = model.artifact.towers.query_tower.context.inputs.embeddings["0"].weight
    new = child.artifact.towers.query_tower.context.inputs.embeddings["0"].weight
    assert len(new) == len(old) + 1
    found = tt.Retriever.load(tmp_path / "child").recommend(
        ["u01"] * 3, context=[{"device": d} for d in ("phone", "watch", "desk")], k=6
    )
    devices, _ = places(found)
    right = [(devices[6 * n : 6 * n + 6] == number).mean() for n, number in enumerate((0, 2, 1))]
    assert min(right) > 0.6
    artifact, split = reread(tmp_path / "child")
    assert len(split.test.context) == len(split.test) and len(split.validation) > 0
    for name in ("test", "validation"):
        kept, made = getattr(split, name), getattr(child.split, name)
        assert kept.context.equals(made.context.select(kept.context.columns))
        for field in ("queries", "history_offsets", "history_items", "target_offsets", "target_items",
                      "history_timestamps", "query_times"):  # fmt: skip
            assert np.array_equal(getattr(kept, field), getattr(made, field)), (name, field)
    data = read_data(tmp_path / "new.csv", config.data, context=["device", "timestamp"])
    assert set(split.test.context["device"]) <= set(data.context["device"])
    again = tt.evaluate(tt.Retriever(artifact), split.test, train=split.train, ks=(10,), baselines=False)
    saved = child.artifact.metadata["metrics"]
    assert again["model"].values["Recall@10"] == pytest.approx(
        json.loads(json.dumps(saved))["rows"][0]["values"]["Recall@10"]
    )
