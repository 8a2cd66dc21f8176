"""An index stored with its model: built, loaded, and refused if it does not match."""

import json
import shutil

import numpy as np
import pytest

from support.postgres import postgres
from twotower.errors import InputError
from twotower.index.approximate.pgvector import DATABASE
from twotower.serving import Retriever, build_stored_index, read_index_report
from twotower.serving.model_folder import SavedModel


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run" / "model").parent


@pytest.fixture(scope="module", autouse=True)
def _faiss():
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")


def test_the_index_is_found_and_answers_within_its_recall(copy):
    report = build_stored_index(copy, "hnsw", k=10, min_recall=0.95, queries=30)
    assert set(report.recall) == {"popularity 1", "popularity 0"} and min(report.recall.values()) >= 0.95
    saved = read_index_report(copy / "model")
    assert saved["recall"] == report.recall and saved["min_recall"] == 0.95 and saved["num_queries"] == 30
    loaded, exact = Retriever.load(copy), Retriever.load(copy, exact=True)
    assert loaded.index.kind == "hnsw" and not loaded.index.is_exact and exact.index.is_exact
    queries = exact.artifact.queries.ids.to_list()
    one = exact.recommend(queries, k=10, exclude_seen=False)["item"].to_numpy().reshape(-1, 10)
    two = loaded.recommend(queries, k=10, exclude_seen=False)["item"].to_numpy().reshape(-1, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(one, two, strict=True)])
    assert recall >= 0.95
    seen = set(loaded.history("u004")["item"])
    found = loaded.recommend(["u004"], k=70, filter=None)
    assert len(found) == 70 and not seen & set(found["item"])


def test_rank_stays_exact_with_an_index(copy, model, planted_split):
    """Evaluation does not depend on an index stored with the model."""
    build_stored_index(copy, "hnsw", k=5, settings={"links": 4, "build_effort": 4, "effort": 1})
    test = planted_split.test
    assert np.array_equal(Retriever.load(copy).rank(test, 10, True), model.rank(test, 10, True))


def test_exact_removes_the_index(copy):
    build_stored_index(copy, "hnsw", k=5)
    assert build_stored_index(copy, "exact") is None
    assert read_index_report(copy / "model") is None and Retriever.load(copy).index.kind == "exact"


def test_saving_a_model_removes_its_old_index(copy):
    build_stored_index(copy, "hnsw", k=5)
    SavedModel.load(copy).save(copy / "model")
    assert Retriever.load(copy).index.is_exact


def test_an_index_below_the_floor_is_not_written(copy, monkeypatch):
    build_stored_index(copy, "hnsw", k=5)
    before = read_index_report(copy / "model")
    monkeypatch.setattr("twotower.index.approximate.build.recall_of", lambda *asked: 0.5)
    with pytest.raises(InputError, match="below the floor 0.9"):
        build_stored_index(copy, "hnsw", k=5, min_recall=0.9)
    assert read_index_report(copy / "model") == before


def damage(name, change):
    def apply(folder):
        change(folder / name)

    return apply


def edit(**changes):
    def apply(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        path.with_name("SHA256SUMS").unlink()  # as in older versions

    return damage("index.json", apply)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("graph.faiss", lambda path: path.write_bytes(b"x")), "graph.faiss: its checksum differs"),
        (damage("rows.safetensors", lambda path: path.unlink()), "rows.safetensors: missing"),
        (damage("index.json", lambda path: path.write_text("{")), "not readable"),
        (edit(checksums={"../../metadata.json": "0" * 64}), "is not the name of a file in this folder"),
        (edit(items="0" * 64), "built for different item embeddings"),
        (edit(schema_version=9), "schema version 9"),
        (edit(kind="magic"), "unknown kind 'magic'"),
    ],
)
def test_an_index_that_does_not_match_is_refused(copy, change, message):
    build_stored_index(copy, "hnsw", k=5)
    change(copy / "model" / "index")
    with pytest.raises(InputError, match=message):
        Retriever.load(copy)
    assert len(Retriever.load(copy, exact=True).recommend(["u001"], k=3)) == 3


def test_refusals(copy):
    with pytest.raises(
        InputError, match="unknown kind 'annoy'; expected one of exact, hnsw, ivfpq, int8, binary, pgvector"
    ):
        build_stored_index(copy, "annoy")
    with pytest.raises(InputError, match="at least 1,000 items"):
        build_stored_index(copy, "ivfpq")
    assert read_index_report(copy / "model") is None


def test_a_folder_does_not_choose_the_database(copy, monkeypatch):
    """The URL in index.json is not connected to unless the user has named it too."""
    monkeypatch.delenv(DATABASE, raising=False)
    build_stored_index(copy, "hnsw", k=5)
    settings = {"url": "host=127.0.0.1 port=9", "table": "t", "links": 16, "build_effort": 64, "effort": 100}
    edit(kind="pgvector", settings=settings)(copy / "model" / "index")
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'twotower[pgvector]'")
    monkeypatch.setattr(psycopg, "connect", lambda *given, **named: pytest.fail(f"connected to {given}"))
    for own in (None, "", "host=127.0.0.1 port=8", "postgresql://me:secret@elsewhere/db"):
        monkeypatch.delenv(DATABASE, raising=False) if own is None else monkeypatch.setenv(DATABASE, own)
        with pytest.raises(InputError, match=r"in the database 'host=127.0.0.1 port=9'; if you trust it") as refusal:
            Retriever.load(copy)
        assert "secret" not in str(refusal.value)


def test_an_index_in_a_database(copy, monkeypatch):
    with postgres() as url:
        monkeypatch.setenv(DATABASE, url)
        report = build_stored_index(copy, "pgvector", k=10, min_recall=0.9, settings={"url": url})
        assert report.settings["table"].startswith("twotower_")
        loaded = Retriever.load(copy)
        exact = Retriever.load(copy, exact=True)
        for b in (1.0, 0.0):
            one = loaded.recommend(["u001", "u002"], k=20, popularity=b, deny=[2])
            two = exact.recommend(["u001", "u002"], k=20, popularity=b, deny=[2])
            assert one["item"].to_list() == two["item"].to_list()
        loaded.index.engine.close()
