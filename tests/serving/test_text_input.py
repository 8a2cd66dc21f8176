"""Queries given by their text, at every entry point: the same answers, and the same refusals."""

import json

import numpy as np
import polars as pl
import pytest

from support.command_line import command
from support.search import SMALL, documents, searches, topic_of
from support.service_models import client
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.run import train_run
from twotower.serving import Embedder, Retriever
from twotower.serving.batch import recommend_file
from twotower.serving.export import export_query_tower
from twotower.serving.queries import LONGEST_TEXT
from twotower.serving.search import QueryEmbedder

WORDS = ["ask3a ask3b", "ask1c ask1d"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: texts are the queries, texts beside users with histories, and a model that reads no text."""
    folder = tmp_path_factory.mktemp("text")
    documents().write_csv(folder / "documents.csv")
    searches().drop("user_id", "timestamp").write_csv(folder / "pairs.csv")
    searches().write_csv(folder / "log.csv")
    found = {}
    for name, source, changes in (
        ("alone", "pairs.csv", SMALL),
        ("beside", "log.csv", [*SMALL, "data.columns.query=user_id", "query_tower.hidden=[16]"]),
        ("none", "log.csv", [*SMALL[1:], "data.columns.query=user_id", "training.max_epochs=1"]),
    ):
        config = Config.load(None, [f"data.items={json.dumps(str(folder / 'documents.csv'))}", *changes])
        train_run(folder / source, folder / name, config, progress=False, on_message=lambda text: None)
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def retrievers(runs):
    return {name: Retriever.load(folder) for name, folder in runs.items()}


def test_new_words_find_documents_of_their_topic(retrievers):
    found = retrievers["alone"].recommend(text=WORDS, k=6)
    assert found["query"].unique(maintain_order=True).to_list() == WORDS
    topics = topic_of(found["item"])
    assert (topics[:6] == 3).mean() > 0.8 and (topics[6:] == 1).mean() > 0.8
    unseen = "ask5a ask5f ask5c"  # no query of the data has three words
    assert unseen not in set(retrievers["alone"].artifact.queries.ids)
    assert (topic_of(retrievers["alone"].recommend(text=unseen, k=6)["item"]) == 5).mean() > 0.8


def test_a_text_is_a_feature_or_a_part_of_the_context(retrievers):
    alone, beside = retrievers["alone"], retrievers["beside"]
    by_text = alone.recommend(text=WORDS).drop("query")
    assert by_text.equals(alone.recommend(features=[{"search": one} for one in WORDS]).drop("query"))
    assert beside.recommend(["u01", "u02"], text=WORDS).equals(
        beside.recommend(["u01", "u02"], context=[{"search": one} for one in WORDS])
    )
    one = beside.recommend(["u01"], text=WORDS[0])
    both = beside.recommend(["u01", "u02"], text=WORDS[0]).filter(query="u01")
    assert both["item"].equals(one["item"]) and np.allclose(both["score"], one["score"], atol=1e-5)
    assert not one.equals(beside.recommend(["u01"], text=WORDS[1])) and not one.equals(beside.recommend(["u01"]))
    new = beside.recommend(histories=[["d01"]], text=WORDS[0], exclude_seen=False)
    assert (topic_of(new["item"])[:5] == 3).mean() > 0.5
    assert beside.recommend(text=WORDS)["query"].unique().to_list() == [0, 1]


def test_a_known_text_has_the_answer_of_its_words(retrievers):
    retriever = retrievers["alone"]
    known = retriever.artifact.queries.ids[5]
    by_id = retriever.recommend([known], exclude_seen=False)
    assert by_id.equals(retriever.recommend(text=known))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("none", {"text": "x"}, "this model reads no text; train one with data.query_text"),
        ("alone", {"text": " "}, "expected words, found a blank text"),
        ("alone", {"text": 5}, "expected a text, or a list with one for each query, found 5"),
        ("alone", {"text": ["x", 5]}, "expected text, found 5"),
        ("alone", {"text": "x" * (LONGEST_TEXT + 1)}, "expected at most 20,000 characters, found 20,001"),
        ("alone", {"text": "\ud800"}, "expected valid Unicode"),
        ("alone", {"text": "x", "queries": ["ask3a ask3b"]}, "give a text or the id of a known query, not both"),
        ("alone", {"text": ["x", "y"], "features": [{}]}, "one for each query, 1; found 2"),
        ("alone", {"text": "x", "features": [{"search": "y"}]}, "features also has 'search'"),
        ("beside", {"text": "x", "queries": ["u01"], "context": {"search": "y"}}, "context also has 'search'"),
        ("beside", {"text": ["x"], "queries": ["u01", "u02"]}, "one for each query, 2; found 1"),
        ("alone", {}, "expected query ids, text, histories, features or context; found none of them"),
    ],
)
def test_texts_that_cannot_be_asked_are_refused(retrievers, model, given, message):
    with pytest.raises(InputError, match=message):
        retrievers[model].recommend(**given)


def test_the_command_line_asks_by_text(runs, retrievers, tmp_path, monkeypatch, capsys):
    words = [word for text in WORDS for word in ("--text", text)]
    assert command(tmp_path, monkeypatch, "recommend", runs["alone"], *words, "-k", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out) == retrievers["alone"].recommend(text=WORDS, k=4).to_dicts()
    assert command(tmp_path, monkeypatch, "recommend", runs["alone"], *words, "-k", 2) == 0
    printed = capsys.readouterr().out
    assert all(f"Recommended for '{text}'" in printed for text in WORDS)
    assert (
        command(tmp_path, monkeypatch, "recommend", runs["beside"], "--query", "u01", *words[:2], "-k", 3, "--json")
        == 0
    )
    wanted = retrievers["beside"].recommend(["u01"], text=WORDS[0], k=3).to_dicts()
    assert json.loads(capsys.readouterr().out) == wanted
    assert command(tmp_path, monkeypatch, "recommend", runs["none"], *words) == 2
    assert "text: this model reads no text" in capsys.readouterr().err


def test_a_file_of_texts(runs, retrievers, tmp_path):
    frame = pl.DataFrame({"query_id": [7, 8, 9], "search": [*WORDS, " "]})
    frame.write_csv(tmp_path / "asked.csv")
    report = recommend_file(retrievers["alone"], tmp_path / "asked.csv", tmp_path / "out.parquet", k=3)
    assert (report.queries, report.answered, report.unknown) == (3, 2, 1)
    found = pl.read_parquet(tmp_path / "out.parquet")
    wanted = retrievers["alone"].recommend(text=WORDS, k=3)
    assert found["query"].to_list() == ["7"] * 3 + ["8"] * 3 and found["item"].to_list() == wanted["item"].to_list()
    frame.select("search").write_parquet(tmp_path / "asked.parquet")
    recommend_file(retrievers["alone"], tmp_path / "asked.parquet", tmp_path / "rows.parquet", k=3)
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert rows["query"].to_list() == [0] * 3 + [1] * 3 and rows["item"].equals(found["item"])
    frame.rename({"search": "other"}).write_csv(tmp_path / "wrong.csv")
    recommended = recommend_file(retrievers["alone"], tmp_path / "wrong.csv", tmp_path / "none.parquet", k=3)
    assert recommended.answered == 0  # ids of texts that the data does not have
    frame.select(other="search").write_csv(tmp_path / "wrong.csv")
    with pytest.raises(InputError, match="expected a column 'search' with the texts of the queries"):
        recommend_file(retrievers["alone"], tmp_path / "wrong.csv", tmp_path / "no.parquet", k=3)


def test_a_file_of_users_with_texts(retrievers, tmp_path):
    pl.DataFrame({"user_id": ["u01", "u02"], "search": WORDS}).write_csv(tmp_path / "asked.csv")
    recommend_file(retrievers["beside"], tmp_path / "asked.csv", tmp_path / "out.parquet", k=3)
    wanted = retrievers["beside"].recommend(["u01", "u02"], text=WORDS, k=3)
    assert pl.read_parquet(tmp_path / "out.parquet")["item"].to_list() == wanted["item"].to_list()


def test_an_embedder_reads_the_texts(runs, retrievers):
    frame = pl.DataFrame({"query_id": ["a", "b", "c"], "search": [*WORDS, None]})
    found = Embedder(runs["alone"])(frame)["embedding"]
    assert found[2] is None
    text = retrievers["alone"].text_input
    nothing = np.zeros(3, dtype=np.int64), np.zeros(0, dtype=np.int32)
    wanted = retrievers["alone"].embed(np.array([-1, -1]), nothing, [text.features(one) for one in WORDS])
    assert np.allclose(np.stack(found[:2].to_list()), wanted.numpy(), atol=1e-6)


def test_the_service_answers_texts(runs, retrievers):
    with client(runs["alone"], runs["beside"], runs["none"]) as service:
        summaries = {one["name"]: one for one in service.get("/models").json()["models"]}
        assert [(summaries[name]["text"], summaries[name]["texts_are_queries"]) for name in runs] == [
            ("search", True),
            ("search", False),
            (None, False),
        ]
        answer = service.post("/recommend", json={"text": WORDS[0], "k": 5})
        wanted = retrievers["alone"].recommend(text=WORDS[0], k=5)
        assert answer.status_code == 200, answer.text
        assert [row["item"] for row in answer.json()["items"]] == wanted["item"].to_list()
        body = {"model": "beside", "query_id": "u01", "text": WORDS[0], "k": 5}
        wanted = retrievers["beside"].recommend(["u01"], text=WORDS[0], k=5)["item"].to_list()
        assert [row["item"] for row in service.post("/recommend", json=body).json()["items"]] == wanted
        explained = service.post("/explain", json={**{k: v for k, v in body.items() if k != "k"}, "items": wanted[:2]})
        assert explained.status_code == 200, explained.text
        for refused, message in (
            ({"text": " "}, "text: expected words, found only blanks"),
            ({"text": "x" * 20_001}, "20000"),
            ({"text": 5}, "text"),
            ({"text": "x", "model": "none"}, "text: this model reads no text"),
            ({"text": "x", "query_id": "ask3a ask3b"}, "give a text or the id of a known query"),
            ({}, "expected query_id, history, text, features or context"),
        ):
            answer = service.post("/recommend", json=refused)
            assert answer.status_code == 422 and message in answer.text, answer.text
        answer = service.post("/explain", json={"text": "x", "items": ["d01"]})
        assert answer.status_code == 422 and "only recommendations from a history can be explained" in answer.text
        schema = service.get("/openapi.json").json()["components"]["schemas"]["RecommendRequest"]
        assert {
            "required": ["text"],
            "properties": {"text": {"type": "string", "minLength": 1, "pattern": r"\S"}},
        } in schema["anyOf"]


def test_a_text_is_encoded_once_for_all_settings_of_the_dial(runs, retrievers, monkeypatch):
    encoded = []
    for_all = QueryEmbedder.embed
    monkeypatch.setattr(
        QueryEmbedder, "embed", lambda self, queries, *rest, **named: (
            encoded.append(len(queries)) or for_all(self, queries, *rest, **named)
        )
    )  # fmt: skip
    with client(runs["alone"], runs["beside"]) as service:
        encoded.clear()
        for name, asked in (("alone", {}), ("beside", {"query_id": "u01"}), ("beside", {"query_id": "u02"})):
            for dial in (1.0, 0.0, 0.5, 2.0):
                body = {"model": name, "text": WORDS[0], "k": 4, "popularity": dial, **asked}
                answer = service.post("/recommend", json=body).json()["items"]
                ids = None if not asked else [asked["query_id"]]
                with monkeypatch.context() as plain:
                    plain.setattr(QueryEmbedder, "embed", for_all)
                    wanted = retrievers[name].recommend(ids, text=WORDS[0], k=4, popularity=dial)
                assert [row["item"] for row in answer] == wanted["item"].to_list()
                assert [row["score"] for row in answer] == pytest.approx(wanted["score"].to_list(), abs=1e-5)
        assert encoded == [1, 1, 1]
        service.post("/recommend", json={"model": "beside", "query_id": "u01", "k": 4})
        service.post("/recommend", json={"model": "beside", "query_id": "u01", "k": 4})
        assert encoded == [1, 1, 1, 1, 1], "only requests with a text are kept"


def test_a_tower_that_encodes_texts_is_not_exported(runs, tmp_path):
    with pytest.raises(InputError, match="the queries of this model are texts"):
        export_query_tower(runs["alone"], tmp_path / "out", format="torch")
    with pytest.raises(InputError, match="reads the context of a request"):
        export_query_tower(runs["beside"], tmp_path / "out", format="torch")
