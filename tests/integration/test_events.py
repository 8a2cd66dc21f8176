"""Types of events and exposure from the file to the service: the commands of the how-to pages, run as written."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from support.command_line import command
from twotower.comparison import evaluate_folder
from twotower.config.run import Config
from twotower.data import exposure_log
from twotower.errors import InputError
from twotower.run import reread
from twotower.serving import Retriever
from twotower.serving.events import EventTypes

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
WEIGHTS = {"click": 1.0, "cart": 3.0, "purchase": 10.0}


def shop(seed=0, users=80, rows=4000, items=30):
    """Make events in time order; each type has its own half of the items, by parity of the item."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(list(WEIGHTS), rows, p=[0.6, 0.1, 0.3])
    item = 2 * rng.integers(0, items // 2, rows) + (kind == "purchase")
    return pl.DataFrame(
        {
            "user_id": [f"u{one}" for one in rng.integers(0, users, rows)],
            "item_id": [f"i{one}" for one in item],
            "timestamp": 1_700_000_000 + 3600 * np.arange(rows),
            "event": kind,
        }
    )


def blocks(page, language):
    text = (PAGES / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run the commands of events.md, and return the folder."""
    path = tmp_path_factory.mktemp("events")
    shop().write_csv(path / "shop.csv")
    (path / "events.yaml").write_text(blocks("events.md", "yaml")[0])
    with pytest.MonkeyPatch.context() as patch:
        for line in blocks("events.md", "sh")[0].splitlines():
            assert command(path, patch, *shlex.split(line)[1:]) == 0, line
    return path


def test_the_table_has_the_metrics_of_each_type(trained):
    found = json.loads((trained / "my-model" / "results.json").read_text())
    names = [f"event={name}" for name in sorted(WEIGHTS)]
    assert found["slice_groups"]["events"] == names
    model = found["rows"][0]
    sizes = [found["slice_sizes"][name]["queries"] for name in names]
    assert sum(sizes) == found["num_queries"] and min(sizes) > 0
    mean = sum(model["slices"][name]["NDCG@10"] * size for name, size in zip(names, sizes, strict=True)) / sum(sizes)
    assert model["values"]["NDCG@10"] == pytest.approx(mean)
    again = evaluate_folder(trained / "my-model")
    assert again["model"].values["NDCG@10"] == pytest.approx(model["values"]["NDCG@10"])
    assert "event=purchase" in str(again) and "a query is evaluated once for each event" in str(again)
    config = Config.load(trained / "my-model" / "config.yaml")
    assert config.training.question == "next" and config.data.events.weights == WEIGHTS


def purchases(frame):
    """Return the share of the items that only purchases have."""
    return np.mean([int(item[1:]) % 2 for item in frame["item"]])


def test_a_request_names_the_type_and_the_default_has_the_largest_weight(trained):
    retriever = Retriever.load(trained / "my-model")
    assert retriever.events == EventTypes("event", tuple(WEIGHTS), "purchase")
    users = [f"u{one}" for one in range(20)]
    found = {name: retriever.recommend(users, event=name, exclude_seen=False) for name in WEIGHTS}
    assert purchases(found["purchase"]) > 0.9 and purchases(found["click"]) < 0.1
    assert found["purchase"].equals(retriever.recommend(users, exclude_seen=False))
    assert found["click"].equals(retriever.recommend(users, context={"event": "click"}, exclude_seen=False))
    new = retriever.recommend(histories=[["i2", "i4"]], event="click", exclude_seen=False)
    assert purchases(new) < 0.2
    one = retriever.explain("u3", item="i3", event="purchase").lift
    assert one > retriever.explain("u3", item="i3", event="click").lift + 1
    for given, message in (
        ({"queries": ["u1"], "event": "refund"}, "event: 'refund'; expected 'click', 'cart', 'purchase'"),
        ({"queries": ["u1"], "context": {"event": "refund"}}, "event: 'refund'; expected"),
        ({"queries": ["u1"], "context": {"event": "click"}, "event": "cart"}, "event: 'cart', but the context has"),
        ({"context": {"event": "click"}}, "no value is given, so nothing is known about this query"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.recommend(**given)


def test_files_and_the_command_line_name_the_type(trained, tmp_path, monkeypatch):
    model = trained / "my-model"
    retriever = Retriever.load(model)
    users = [f"u{one}" for one in range(20)]
    pl.DataFrame({"user_id": [*users, "nobody"]}).write_csv(tmp_path / "users.csv")
    mixed = pl.DataFrame({"user_id": users, "event": ["click", None] * 10})
    mixed.write_parquet(tmp_path / "mixed.parquet")
    for given, options, wanted in (
        ("users.csv", ["--event", "click"], dict.fromkeys(users, "click")),
        ("users.csv", [], dict.fromkeys(users, "purchase")),
        ("mixed.parquet", [], {name: kind or "purchase" for name, kind in mixed.rows()}),
    ):
        args = ["recommend", model, "--input", given, "--output", "found.csv", "--force", "-k", 5, *options]
        assert command(tmp_path, monkeypatch, *args) == 0
        found = pl.read_csv(tmp_path / "found.csv")
        assert set(found["query"]) == set(users), "the type alone does not make an unknown query known"
        for kind in set(wanted.values()):
            own = [name for name, one in wanted.items() if one == kind]
            assert found.filter(pl.col("query").is_in(own))["item"].to_list() == (
                retriever.recommend(own, event=kind, k=5)["item"].to_list()
            )
    args = ["recommend", model, "--input", "mixed.parquet", "--output", "no.csv", "--event", "click"]
    assert command(tmp_path, monkeypatch, *args) == 2


def test_the_service_and_its_page_name_the_type(trained):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from twotower.serving.http.app import create_app

    retriever = Retriever.load(trained / "my-model")
    with TestClient(create_app([trained / "my-model"])) as client:
        field = client.get("/models").json()["models"][0]["context"][0]
        assert field["column"] == "event" and field["default"] == "purchase" and field["values"] == sorted(WEIGHTS)
        for given, event in (({"event": "click"}, "click"), ({}, "purchase"), ({"context": {"event": "cart"}}, "cart")):
            body = client.post("/recommend", json={"query_id": "u3", "k": 5, **given}).json()
            wanted = retriever.recommend(["u3"], event=event, k=5)["item"].to_list()
            assert [one["item"] for one in body["items"]] == wanted
        lift = client.post("/explain", json={"query_id": "u3", "items": ["i3"], "event": "click"}).json()["items"][0]
        assert lift["lift"] == pytest.approx(retriever.explain("u3", item="i3", event="click").lift, abs=1e-4)
        for given in ({"event": "refund"}, {"event": "click", "context": {"event": "cart"}}):
            answer = client.post("/recommend", json={"query_id": "u3", **given})
            assert answer.status_code == 422 and "event" in answer.json()["detail"]


def shown(seed=0, rows=16_000):
    """Make a log of shown items with known propensities; users click on items of their own parity."""
    rng = np.random.default_rng(seed)
    user, odd = rng.integers(0, 200, rows), np.arange(20) % 2
    share = np.where(odd == 0, 3.0, 1.0)
    share /= share.sum()
    item = rng.choice(20, rows, p=share)
    click = rng.random(rows) < np.where(item % 2 == user % 2, 0.5, 0.05)
    return pl.DataFrame(
        {
            "user_id": user, "item_id": item, "timestamp": 1_700_000_000 + 60 * np.arange(rows),
            "clicked": click.astype(int), "p": share[item],
        }
    )  # fmt: skip


@pytest.mark.slow
def test_the_reward_of_every_ranker_is_estimated_from_a_log_with_propensities(tmp_path, monkeypatch, capsys):
    shown().write_csv(tmp_path / "shown.csv")
    text = next(block for block in blocks("evaluate.md", "yaml") if "exposure" in block)
    (tmp_path / "shown.yaml").write_text(text)
    line = next(line for block in blocks("evaluate.md", "sh") for line in block.splitlines() if "shown.yaml" in line)
    short = ["--set", "training.max_epochs=5", "--set", "evaluation.exclude_seen=false"]
    assert command(tmp_path, monkeypatch, *shlex.split(line)[1:], *short) == 0
    printed = capsys.readouterr().out
    assert "reward @5" in printed and "propensities from p" in printed
    results = json.loads((tmp_path / "my-model" / "results.json").read_text())["off_policy"]
    assert results["logged"]["mean"] == pytest.approx(0.275, abs=0.05)
    model, popular = (results["rows"][name]["5"]["estimates"] for name in ("model", "popularity"))
    assert set(model) == {"IPS", "SNIPS", "DR"}
    artifact, split = reread(tmp_path / "my-model")
    log = exposure_log(split, artifact.config.evaluation.exposure, [5])
    ranked = split.data.items.decode(Retriever(artifact).rank(log.asked, 5, False).reshape(-1)).to_numpy()
    users = split.data.queries.decode(log.asked.queries).to_numpy()
    rewards = np.where(ranked.reshape(-1, 5) % 2 == users[:, None] % 2, 0.5, 0.05).mean(1)
    truth = float(rewards[log.owners].mean())
    assert truth > 0.35, "the model has learnt what each user clicks on"
    for name, found in model.items():
        assert found["low"] < truth < found["high"], name
        assert popular[name]["low"] < 0.275 < popular[name]["high"] < truth, name
    assert command(tmp_path, monkeypatch, "evaluate", "my-model", "--json") == 0
    again = json.loads(capsys.readouterr().out)["off_policy"]["rows"]["model"]["5"]
    assert again["estimates"]["DR"]["mean"] == pytest.approx(model["DR"]["mean"])
    page = (tmp_path / "my-model" / "report.html").read_text()
    assert f">{model['SNIPS']['mean']:.4f}<" in page[page.index('id="reward"') :]
    quick = ["--objectives", "expected-count", "--seeds", "1", "--no-audit", "--set", "training.max_epochs=1"]
    assert command(tmp_path, monkeypatch, "compare", "shown.csv", "--out", "compared", "--config", "shown.yaml",
                   *quick) == 0  # fmt: skip
    compared = json.loads((tmp_path / "compared" / "results.json").read_text())["evaluation"]["off_policy"]
    assert compared["logged"]["mean"] == pytest.approx(results["logged"]["mean"], rel=1e-5)
    assert (
        set(compared["rows"]) > {"popularity"} and 'id="reward"' in (tmp_path / "compared" / "report.html").read_text()
    )
    assert command(tmp_path, monkeypatch, "train", "shown.csv", "--out", "other", "--config", "shown.yaml",
                   "--set", "data.split=random") == 2  # fmt: skip


@pytest.mark.parametrize("types", [[["cart"]], [b"\xff"]])
def test_types_of_requests_that_are_no_text_are_named(types):
    with pytest.raises(InputError, match="context: column 'event' has .*; expected text"):
        EventTypes("event", ("cart", "click"), "cart").completed(pl.DataFrame({"event": types}), 1)
