"""Queries given by features alone, by features and history, or by id with other features, at every entry point."""

import json
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from support.service_models import client, drawn
from twotower.cli import main as cli
from twotower.config.run import Config
from twotower.data import Interactions, leave_last_out
from twotower.errors import InputError
from twotower.serving.batch import recommend_file
from twotower.serving.queries import require_flat

SETTINGS = [
    "training.max_epochs=8",
    "training.batch_size=64",
    "training.learning_rate=0.02",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "item_tower.dimension=16",
    "query_tower.history.length=10",
    "query_tower.features=[{column: taste, kind: categorical}, {column: tags, kind: multi}]",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 30}}]",
]


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """A model of a log where even queries take even items; the query table has the taste."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{q:02d}", int(item), int(rng.integers(1e9, 1.1e9)))
        for q in range(60)
        for item in rng.choice(np.arange(q % 2, 80, 2), size=14, replace=False)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    people = pl.DataFrame({
        "user_id": [f"u{q:02d}" for q in range(60)], "taste": [["even", "odd"][q % 2] for q in range(60)],
        "tags": [[str(q % 3), "x"][: 1 + q % 2] for q in range(60)],
    })  # fmt: skip
    data = Interactions.from_frame(frame, queries=people)
    model = tt.fit(leave_last_out(data), Config.load(None, SETTINGS), progress=False)
    folder = tmp_path_factory.mktemp("features") / "run"
    model.save(folder / "model")
    found = tt.Retriever.load(folder)
    found.folder = folder
    return found


def parity(found):
    return float((found["item"] % 2 == 0).mean())


def test_features_alone_determine_what_a_new_query_likes(retriever):
    rows = [{"taste": "even", "tags": ["0"]}, {"taste": "odd", "tags": ["1", "x"]}]
    found = retriever.recommend(features=rows, k=10)
    even, odd = (found.filter(pl.col("query") == place) for place in (0, 1))
    assert parity(even) > 0.8 and parity(odd) < 0.2


def test_the_known_features_given_again_change_nothing(retriever):
    ids = ["u03", "u10"]
    known = retriever.recommend(ids, k=5)
    same = retriever.recommend(
        ids, features=[{"taste": "odd", "tags": ["0", "x"]}, {"taste": "even", "tags": ["1"]}], k=5
    )
    assert known["item"].to_list() == same["item"].to_list()
    assert np.allclose(known["score"], same["score"], atol=1e-6)
    half = retriever.recommend(ids, features=[None, {"taste": "odd", "tags": ["0"]}], k=5)
    of = [[frame.filter(pl.col("query") == name)["score"].to_list() for frame in (known, half)] for name in ids]
    assert of[0][0] == pytest.approx(of[0][1], abs=1e-6)
    assert of[1][0] != pytest.approx(of[1][1], abs=1e-4)


def test_features_of_requests_that_share_a_batch_do_not_disturb_each_other(tmp_path, planted_data):
    """Mixed formats in a batch (unix seconds, milliseconds, text, dates) are read as in single requests."""
    people = pl.DataFrame({
        "user_id": planted_data.queries.ids, "code": [str(q % 4) for q in range(60)],
        "since": [f"20{10 + q % 9}-05-31" for q in range(60)],
    })  # fmt: skip
    declared = "query_tower.features=[{column: code, kind: categorical}, {column: since, kind: timestamp}]"
    data = replace(planted_data, query_table=people)
    found = tt.Retriever.load(drawn(data, tmp_path / "model", changes=[declared]))
    times = [1_400_000_000, 1_400_000_000_000, "1400000000", "2014-05-13 16:53:20", None]
    rows = [{"code": code, "since": one} for one, code in zip(times, (3, "3", 3, "3", "none such"), strict=True)]
    nobody = np.full(1, -1), (np.zeros(2, dtype=np.int64), np.zeros(0, dtype=np.int32))
    alone = torch.cat([found.embed(*nobody, [row]) for row in rows])
    together = found.embed(np.full(5, -1), (np.zeros(6, dtype=np.int64), nobody[1][1]), rows)
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(alone[:4], alone[:1].expand(4, -1), atol=1e-6)
    assert float((alone[4] - alone[0]).abs().max()) > 1e-3


def test_features_and_history_together_match_the_towers(retriever):
    row, history = {"taste": "even", "tags": None}, [4, 8, 20]
    found = retriever.recommend(features=[row], histories=[history], k=7)
    towers, artifact = retriever.artifact.towers, retriever.artifact
    codes = torch.from_numpy(artifact.items.encode(history))[None]
    padded = torch.nn.functional.pad(codes, (7, 0), value=-1)
    scores = towers.embed_new_queries([row], padded) @ artifact.item_embeddings.T
    scores[0, codes[0]] = -torch.inf
    best = scores[0].topk(7)
    assert found["item"].to_list() == artifact.items.decode(best.indices.numpy()).to_list()
    assert np.allclose(found["score"], best.values.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"features": [{"taste": "even"}]}, "column 'tags', declared in query_tower.features, does not exist"),
        ({"features": [{"taste": "even", "tags": []}], "histories": [[1], [2]]}, "features: expected one row for each"),
        ({"features": [None]}, "nothing is known about this query"),
        ({}, "query ids, text, histories, features or context"),
    ],
)
def test_invalid_requests_are_refused(retriever, asked, message):
    with pytest.raises(InputError, match=message):
        retriever.recommend(**asked)


def test_a_model_without_query_features_says_so(model):
    with pytest.raises(InputError, match="set query_tower.features"):
        tt.Retriever(model.artifact).recommend(features=[{"taste": "even"}])


def test_a_history_alone_is_refused_by_a_model_that_reads_none(tmp_path, planted_data, monkeypatch, capsys):
    """Refused at every entry point; with an id or features, it only says which items were seen."""
    people = pl.DataFrame({"user_id": planted_data.queries.ids, "code": [str(q % 4) for q in range(60)]})
    changes = [
        "query_tower.history=null",
        "query_tower.id_embedding=true",
        "query_tower.features=[{column: code, kind: categorical}]",
    ]
    folder = drawn(replace(planted_data, query_table=people), tmp_path / "run" / "model", changes=changes)
    found, row = tt.Retriever.load(folder), {"code": "1"}
    message = r"this model reads no history \(query_tower.history: null\).* give the id of a known query, or features"
    for asked in ({}, {"features": [row, None]}):
        with pytest.raises(InputError, match="history 2: " + message if asked else "history 1: " + message):
            found.recommend(histories=[[1, 2], [3]], **asked)
    with pytest.raises(InputError, match=message):
        found.explain(history=[1, 2], item=4)
    for known in ({"queries": ["u003"]}, {"features": [row]}):
        best, second = found.recommend(**known, histories=[[]], k=2)["item"]
        assert found.recommend(**known, histories=[[best]], k=1)["item"].to_list() == [second]

    source, target = tmp_path / "q.parquet", tmp_path / "r.parquet"
    pl.DataFrame({"history": [[1, 2]]}).write_parquet(source)
    with pytest.raises(InputError, match="q.parquet: column 'history': " + message):
        recommend_file(found, source, target)
    pl.DataFrame({"query": ["nobody", "u003", "u004"], "history": [[1, 2, 3], [best], [4]]}).write_parquet(source)
    report = recommend_file(found, source, target, k=3)
    assert (report.unknown, report.answered) == (1, 2)
    wanted = found.recommend(["u003", "u004"], histories=[[best], [4]], k=3)
    assert pl.read_parquet(target)["item"].to_list() == wanted["item"].to_list()

    monkeypatch.setattr(sys, "argv", ["twotower", "recommend", str(folder), "--history", "1,2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "this model reads no history" in capsys.readouterr().err
    with client(folder) as service:
        answer = service.post("/recommend", json={"history": [1, 2]})
        assert answer.status_code == 422 and "history: this model reads no history" in answer.json()["detail"]
        assert service.post("/explain", json={"history": [1, 2], "items": [4]}).status_code == 422
        for known in ({"query_id": "u003"}, {"features": row}):
            assert service.post("/recommend", json={**known, "history": [1, 2]}).status_code == 200


def test_the_command_line_and_the_service_give_the_same_results(retriever, monkeypatch, capsys):
    row = {"taste": "odd", "tags": ["1"]}
    wanted = retriever.recommend(features=[row], k=4)
    monkeypatch.setattr(
        sys,
        "argv",
        ["twotower", "recommend", str(retriever.folder), "--features", json.dumps(row), "-k", "4", "--json"],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert [one["item"] for one in json.loads(capsys.readouterr().out)] == wanted["item"].to_list()
    with client(retriever.folder) as service:
        answer = service.post("/recommend", json={"features": row, "k": 4})
        assert answer.status_code == 200, answer.text
        assert [one["item"] for one in answer.json()["items"]] == wanted["item"].to_list()
        wrong = service.post("/recommend", json={"features": {"taste": "odd"}})
        assert wrong.status_code == 422 and "tags" in wrong.text


def test_a_decimal_that_is_no_number_is_refused():
    """Polars would end in a failed assertion."""
    require_flat({"load": Decimal("1.5")}, "context")
    for text in ("NaN", "Infinity"):
        with pytest.raises(InputError, match="context: column 'load': expected a finite number"):
            require_flat({"load": Decimal(text)}, "context")
