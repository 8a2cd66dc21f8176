"""Runs whose queries are texts: read again, continued, refitted, with other settings; and judged queries."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from support.command_line import command
from support.search import SMALL, TOPICS, documents, searches, topic_of
from twotower.config.run import Config
from twotower.data import Interactions, by_time
from twotower.errors import InputError
from twotower.run import fit, reread, split_options, train_run
from twotower.run.judgements import evaluate_judged, item_texts
from twotower.serving import Retriever

QUICK = [*SMALL, "training.max_epochs=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of documents, pairs, a log, judgements and queries; and the run `alone` on the pairs."""
    path = tmp_path_factory.mktemp("query-text")
    documents().write_csv(path / "documents.csv")
    searches().drop("user_id", "timestamp").write_csv(path / "pairs.csv")
    searches().write_csv(path / "log.csv")
    queries = [(f"q{topic}", f"ask{topic}a ask{topic}d") for topic in range(TOPICS)]
    pl.DataFrame([*queries, ("q98", "doc1a doc1b")], schema=["query_id", "text"], orient="row").write_csv(
        path / "queries.tsv", separator="\t"
    )
    judged = [
        f"q{topic} 0 {item} 1"
        for topic in range(TOPICS)
        for item in documents()["item_id"]
        if topic_of([item]) == topic
    ]
    (path / "qrels").write_text("\n".join([*judged, "q0 0 d01 -1", "q1 0 elsewhere 2", "q99 0 d01 1"]))
    train(path, "alone", "pairs.csv", SMALL)
    return path


def train(path, name, source, changes, **options):
    config = Config.load(None, [f"data.items={json.dumps(str(path / 'documents.csv'))}", *changes])
    said = []
    model, measured = train_run(
        path / source, path / name, config, progress=False, on_message=lambda text: said.append(str(text)), **options
    )
    return model, measured, "\n".join(said)


def test_two_files_become_a_model_whose_test_is_new_texts(folder):
    measured = json.loads((folder / "alone" / "results.json").read_text())
    assert measured["rows"][0]["values"]["Recall@10"] > 0.9  # chance is 10 of 48
    artifact, split = reread(folder / "alone")
    assert split.name == "held_out_queries" and not len(split.test.history_items)
    assert not set(split.test.queries) & set(np.flatnonzero(np.diff(split.train.offsets)))
    assert artifact.config.query_tower.history is None


def test_a_split_by_time_is_read_again_and_continued(folder):
    model, _, said = train(folder, "time", "log.csv", [*QUICK, "data.split=time"])
    assert "training question: next (each row pairs a text with an item)" in said
    _, split = reread(folder / "time")
    assert np.array_equal(split.test.queries, model.split.test.queries)
    assert np.array_equal(split.test.target_items, model.split.test.target_items)
    later = searches(150, seed=5).with_columns(pl.col("timestamp") + 3600 * 700)
    later = later.with_columns(search=pl.col("search") + pl.Series(["", " new", ""] * 50))
    later.write_csv(folder / "later.csv")
    model, _, _ = train(folder, "later", "later.csv", [*QUICK, "data.split=time"], warm_start=folder / "time")
    new = [text for text in model.artifact.queries.ids if text.endswith(" new")]
    assert new and len(Retriever.load(folder / "later").recommend(text=new[:2], k=3)) == 6
    reread(folder / "later")


def test_texts_beside_users_are_evaluated_by_text_and_read_again(folder):
    changes = [*QUICK, "data.columns.query=user_id", "query_tower.hidden=[16]", "query_tower.history.length=5"]
    model, measured, _ = train(folder, "beside", "log.csv", changes)
    assert any("evaluated once for each search" in note for note in measured.notes)
    _, split = reread(folder / "beside")
    assert split.test.query_text == "search" and split.test.context["search"].equals(model.split.test.context["search"])
    with pytest.raises(InputError, match="may have several texts"):
        train(folder, "set", "log.csv", [*changes, "training.question=set"])


@pytest.mark.parametrize("column", ["user_id", None])
def test_features_that_are_proposed_have_the_text_too(folder, column):
    side = "features" if column is None else "context"
    beside = [] if column is None else ["data.columns.query=user_id", "data.split=random"]
    changes = [*QUICK, f"query_tower.{side}=auto", "training.max_epochs=1", "query_tower.hidden=[8]", *beside]
    model, _, _ = train(folder, f"auto-{column}", "log.csv", changes)
    found = getattr(model.artifact.config.query_tower, side)
    assert [one.kind for one in found if one.column == "search"][-1] == "text"


def test_data_that_does_not_say_where_its_texts_are_is_refused():
    data = Interactions.from_frame(searches(200), columns={"query": "search"})
    with pytest.raises(InputError, match="pass the interactions through with_query_text"):
        fit(by_time(data), Config.load(None, QUICK), progress=False)


def test_a_ready_made_split_is_refused(folder):
    with pytest.raises(InputError, match="not supported for a ready-made split"):
        train(folder, "parts", "pairs.csv", [*QUICK, f"data.test={json.dumps(str(folder / 'log.csv'))}"])


def test_items_without_features_are_asked_only_if_they_are_in_training():
    with_features = Config.load(None, QUICK)
    assert split_options(with_features) == {"histories": False, "cold": "keep"}
    assert split_options(Config.load(None, ["data.query_text=search"])) == {"histories": False, "cold": None}


def test_judged_queries_with_bm25_and_the_hybrid(folder):
    found = evaluate_judged(folder / "alone", folder / "qrels", folder / "queries.tsv")
    assert list(found.values) == ["model", "BM25", "hybrid"] and len(found.queries) == TOPICS
    assert found.mean("model", "nDCG@10") > 0.8 and found.mean("BM25", "nDCG@10") == 0  # no word in common
    ranked = Retriever.load(folder / "alone").recommend(text="ask2a ask2d", k=48)
    relevant = topic_of(ranked["item"]) == 2
    precision = [relevant[: place + 1].mean() for place in np.flatnonzero(relevant)]
    assert found.values["model"]["MAP"][2] == pytest.approx(np.mean(precision))
    notes = "\n".join(found.notes)
    assert "1 of 9 queries has no judgement and was left out" in notes
    assert "1 of 9 judged queries has no text and was left out" in notes
    assert "1 relevant judgements are of items outside the catalog" in notes
    assert "1 judgement is negative" in notes and "reciprocal rank fusion" in notes


def test_the_columns_of_bm25_can_be_named(folder):
    artifact = Retriever.load(folder / "alone").artifact
    row = documents().row(3, named=True)
    assert item_texts(artifact)[3] == row["text"]
    assert item_texts(artifact, ["title", "text"])[3] == f"{row['title']} {row['text']}"
    table = artifact.item_table.with_columns(odd=pl.Series([b"\xff"] * len(artifact.items)))
    with pytest.raises(InputError, match=r"BM25: the item table: column 'odd' has bytes that are not UTF-8"):
        item_texts(replace(artifact, item_table=table), ["title", "odd"])
    with pytest.raises(InputError, match="no text column 'abstract'; name columns with --text-columns"):
        evaluate_judged(folder / "alone", folder / "qrels", folder / "queries.tsv", columns=["abstract"])


def test_judged_queries_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
    asked = ["evaluate", folder / "alone", "--qrels", folder / "qrels", "--queries", folder / "queries.tsv"]
    assert command(tmp_path, monkeypatch, *asked, "--json", "--per-query", tmp_path / "values.parquet") == 0
    assert set(json.loads(capsys.readouterr().out)["rows"]) == {"model", "BM25", "hybrid"}
    values = pl.read_parquet(tmp_path / "values.parquet")
    assert len(values) == 3 * TOPICS and values["query"][0] == "q0"
    assert command(tmp_path, monkeypatch, *asked) == 0
    assert "BM25" in capsys.readouterr().out
    (tmp_path / "others.jsonl").write_text('{"_id": "other", "text": "ask1a"}')
    for wrong, message in (
        (asked[:4], "--qrels FILE and --queries FILE must be given together"),
        ([*asked[:2], "--text-columns", "text"], "only with --qrels FILE"),
        ([*asked[:5], folder / "documents.csv"], "expected columns query_id and text"),
        ([*asked[:5], tmp_path / "others.jsonl"], "no query has a judgement"),
    ):
        assert command(tmp_path, monkeypatch, *wrong) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_without_bm25_the_model_is_measured_alone(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    found = evaluate_judged(folder / "alone", folder / "qrels", folder / "queries.tsv")
    assert list(found.values) == ["model"] and any(note.startswith("BM25 left out: needs") for note in found.notes)
