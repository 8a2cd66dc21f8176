"""A log with feedback, event types and markets in one file, from training to the service."""

import json

import numpy as np
import polars as pl
import pytest

from support.command_line import command
from support.service_models import client
from twotower.serving import Retriever

ITEMS, USERS, ROWS = 24, 60, 2400
MARKETS = ("DE", "FR")
SETTINGS = """
data:
  items: items.csv
  columns: {query: user_id, item: item_id, timestamp: timestamp, label: liked, group: market}
  positive_label: 1
  events: {column: event, weights: {click: 1, purchase: 5}}
  eligibility: {item_groups: markets, stock: left}
objective: {feedback: {weight: 2, form: softmax}}
training: {max_epochs: 2, batch_size: 256, logger: none}
query_tower: {history: {length: 8, heads: 2, event_weights: true}}
item_tower: {dimension: 8}
evaluation: {ks: [5], baselines: [popularity]}
"""


def offered(item):
    return MARKETS if item < 8 else (MARKETS[item % 2],)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("together"), np.random.default_rng(3)
    market = rng.choice(MARKETS, ROWS)
    of_market = {name: [item for item in range(ITEMS) if name in offered(item)] for name in MARKETS}
    item = np.array([rng.choice(of_market[name]) for name in market])
    pl.DataFrame(
        {
            "user_id": rng.integers(0, USERS, ROWS),
            "item_id": item,
            "timestamp": 1_700_000_000 + 3600 * np.arange(ROWS),
            "market": market,
            "event": rng.choice(["click", "purchase"], ROWS, p=[0.8, 0.2]),
            "liked": (rng.random(ROWS) < 0.7).astype(int),
        }
    ).write_csv(path / "log.csv")
    pl.DataFrame(
        {
            "item_id": range(ITEMS),
            "markets": ["|".join(offered(one)) for one in range(ITEMS)],
            "left": [0 if one in (2, 9, 10) else 4 for one in range(ITEMS)],
        }
    ).write_csv(path / "items.csv")
    (path / "together.yaml").write_text(SETTINGS)
    return path


def test_feedback_events_and_markets_in_one_file(folder, monkeypatch, capsys):
    assert command(folder, monkeypatch, "train", "log.csv", "--out", "model", "--config", "together.yaml") == 0
    printed = capsys.readouterr()
    said = printed.out + printed.err
    for part in ("events click", "items out of stock", "feedback: ", "training rows have items that were passed over"):
        assert part in said
    for part in ("event=click", "event=purchase", "only eligible items are ranked"):
        assert part in printed.out, "the table"
    assert command(folder, monkeypatch, "evaluate", "model", "--json", "--no-report") == 0
    measured = json.loads(capsys.readouterr().out)
    trained = json.loads((folder / "model" / "results.json").read_text())
    assert measured["rows"][0]["values"] == pytest.approx(trained["rows"][0]["values"])
    answers = {}
    for event in ("click", "purchase"):
        for market in MARKETS:
            asked = ["--query", "7", "--event", event, "--group", market, "-k", str(ITEMS), "--keep-seen", "--json"]
            assert command(folder, monkeypatch, "recommend", "model", *asked) == 0
            answers[event, market] = [row["item"] for row in json.loads(capsys.readouterr().out)]
            everything = {one for one in range(ITEMS) if market in offered(one) and one not in (2, 9, 10)}
            assert set(answers[event, market]) == everything
    assert any(answers["click", market] != answers["purchase", market] for market in MARKETS)
    assert command(folder, monkeypatch, "audit", "model") == 2
    assert "trained under data.eligibility" in capsys.readouterr().err
    with client(folder / "model") as service:
        body = {"query_id": 7, "k": ITEMS, "exclude_seen": False, "event": "click", "group": "FR"}
        found = service.post("/recommend", json=body).json()
        assert [one["item"] for one in found["items"]] == answers["click", "FR"]
        new = {"history": [0, 1], "k": 3, "event": "click", "group": "FR"}
        scores = [
            [one["score"] for one in service.post("/recommend", json={**new, **more}).json()["items"]]
            for more in ({"history_events": ["click", "purchase"]}, {"history_events": ["purchase"] * 2}, {})
        ]
        # Weights of a history have the sum 1, so the same type for every item is the same to any of them.
        assert scores[0] != pytest.approx(scores[1], abs=1e-3)
        assert scores[1] == scores[2], "without types, those of the default"
        for wrong in ({"history_events": ["click"]}, {"history_events": ["refund", "click"]}):
            refused = service.post("/recommend", json={**new, **wrong})
            assert refused.status_code == 422 and "history_events" in refused.text
        lift = service.post("/explain", json={"query_id": 7, "items": [3], "event": "purchase"}).json()["items"][0]
        assert lift["lift"] == pytest.approx(
            Retriever.load(folder / "model").explain(7, item=3, event="purchase").lift, abs=1e-4
        )


def test_what_a_log_with_all_of_them_cannot_do_says_so(folder, monkeypatch, capsys):
    for changes, message in (
        (["training.question=horizon"], "several event types"),
        (["objective.name=refined-logq"], "data.eligibility"),
        (["query_tower.history={sequence: {kind: gru}, event_weights: true}"], "does not read the types"),
        (["evaluation.exposure={propensity: liked}"], "evaluation.exposure: with data.events"),
    ):
        options = [part for change in changes for part in ("--set", change)]
        more = ["--out", "other", "--config", "together.yaml", *options]
        assert command(folder, monkeypatch, "train", "log.csv", *more) == 2
        assert message in capsys.readouterr().err
