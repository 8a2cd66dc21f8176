"""Recommendations for a file: the same as for single queries, in parts that can be resumed, without overwriting."""

import gzip
import json
import random
from pathlib import Path

import polars as pl
import pytest

from twotower.errors import InputError, Interrupted
from twotower.serving import Retriever
from twotower.serving.batch import recommend_file

QUERIES = [f"u{j:03d}" for j in range(25)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "queries.parquet"
    pl.DataFrame({"user_id": [*QUERIES, "stranger", None]}).write_parquet(path)
    return path


def test_a_file_gets_the_same_results_as_its_queries(model, source, tmp_path):
    retriever, target, calls = model.retriever, tmp_path / "recs.parquet", []
    report = recommend_file(
        retriever, source, target, k=7, popularity=0.5, deny=[3], block=4, progress=lambda *done: calls.append(done)
    )
    expected = retriever.recommend(QUERIES, k=7, popularity=0.5, deny=[3]).drop("title")
    found = pl.read_parquet(target)
    assert found.columns == ["query", "rank", "item", "score"]
    assert found.drop("score").equals(expected.drop("score"))
    assert found["score"].to_list() == pytest.approx(expected["score"].to_list(), abs=1e-6)
    assert (report.queries, report.answered, report.unknown, report.rows) == (27, 25, 2, 175)
    assert calls[-1] == (27, 27) and len(calls) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queries.parquet", "recs.parquet"]


@pytest.mark.parametrize("block", [2, 100])
def test_counts_are_of_the_rows_of_the_file(model, tmp_path, block):
    source = tmp_path / "q.parquet"
    pl.DataFrame({"query": ["u001", "u001", "stranger", "u002", "u001"]}).write_parquet(source)
    report = recommend_file(model.retriever, source, tmp_path / "r.parquet", k=3, block=block)
    assert (report.queries, report.answered, report.unknown, report.rows) == (5, 4, 1, 12)


def test_histories_alone_or_with_ids(model, tmp_path):
    retriever, source, target = model.retriever, tmp_path / "q.parquet", tmp_path / "r.parquet"
    histories = [[1, 3, 5], [], [2, 999, 4], None, [999]]
    pl.DataFrame({"history": histories}).write_parquet(source)
    report = recommend_file(retriever, source, target, k=3, block=2)
    found = pl.read_parquet(target)
    assert report.unknown == 3 and found["query"].unique().sort().to_list() == [0, 2]
    expected = retriever.recommend(histories=[histories[0], histories[2]], k=3)
    assert found["item"].to_list() == expected["item"].to_list()
    ids = ["u001", "u002", "new", "newer", "u003"]
    pl.DataFrame({"query": ids, "history": histories}).write_parquet(source)
    report = recommend_file(retriever, source, target, k=3, force=True)
    found = pl.read_parquet(target)
    answered = found["query"].unique(maintain_order=True).to_list()
    assert report.unknown == 1 and answered == ["u001", "u002", "new", "u003"]
    one = retriever.recommend(["u001"], histories=[[1, 3, 5]], k=3)
    assert found.filter(pl.col("query") == "u001")["item"].to_list() == one["item"].to_list()


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("q.csv", "1 3 5"), ("q.csv", '"1,3,5"'), ("q.csv", "1|3|5"), ("q.tsv", "[1, 3, 5]"), ("q.csv.gz", "1;3;5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", ["r.csv", "r.tsv", "r.parquet", "r"])
def test_text_is_read_and_written_as_parquet_is(model, tmp_path, name, cells, output):
    between = "\t" if name == "q.tsv" else ","
    text = f"query{between}history\nu001{between}{cells}\n u002 {between}\nnew{between}2\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    recommend_file(model.retriever, tmp_path / name, tmp_path / output, k=3)
    same = pl.DataFrame({"query": ["u001", "u002", "new"], "history": [[1, 3, 5], None, [2]]})
    same.write_parquet(tmp_path / "same.parquet")
    recommend_file(model.retriever, tmp_path / "same.parquet", tmp_path / "expected.parquet", k=3)
    expected = pl.read_parquet(tmp_path / "expected.parquet")
    if output in ("r", "r.parquet"):
        assert pl.read_parquet(tmp_path / output).equals(expected)
    else:
        found = pl.read_csv(tmp_path / output, separator="\t" if output == "r.tsv" else ",")
        assert found.drop("score").equals(expected.drop("score"), null_equal=True)
        assert found["score"].to_list() == pytest.approx(expected["score"].to_list(), abs=1e-5)


@pytest.mark.parametrize("name", ["r.xlsx", "r.json", "r.csv.gz"])
def test_another_format_to_write_is_refused(model, source, tmp_path, name):
    with pytest.raises(InputError, match="expected a name ending in .parquet, .csv or .tsv"):
        recommend_file(model.retriever, source, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_an_interrupted_file_is_resumed(model, source, tmp_path):
    target = tmp_path / "recs.parquet"

    def stop(done, total):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="stopped; finished parts are in"):
        recommend_file(model.retriever, source, target, block=4, progress=stop)
    assert not target.exists()
    parts = tmp_path / ".recs.parquet.parts"
    times = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert len(times) == 3
    with pytest.raises(InputError, match="pass --resume to continue it, or --force to start over"):
        recommend_file(model.retriever, source, target, block=4)
    with pytest.raises(InputError, match=r"had different options \(k, popularity\)"):
        recommend_file(model.retriever, source, target, block=4, k=3, popularity=0.2, resume=True)
    (parts / "part-000002.parquet").unlink()  # as if the machine had stopped while writing it
    report = recommend_file(model.retriever, source, target, block=4, resume=True)
    assert report.resumed == 8 and report.rows == 250
    assert pl.read_parquet(target).equals(model.retriever.recommend(QUERIES).drop("title")) or (
        pl.read_parquet(target)["item"].to_list() == model.retriever.recommend(QUERIES)["item"].to_list()
    )
    assert not parts.exists()


def test_a_run_on_a_changed_file_is_not_resumed(model, source, tmp_path):
    target = tmp_path / "recs.parquet"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        recommend_file(model.retriever, source, target, block=4, progress=stop)
    pl.DataFrame({"user_id": QUERIES[:9]}).write_parquet(source)
    with pytest.raises(InputError, match=r"had different options \(source\)"):
        recommend_file(model.retriever, source, target, block=4, resume=True)
    assert recommend_file(model.retriever, source, target, block=4, force=True).queries == 9


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"price": [1.0]}, "expected a column of query ids .* found 'price'"),
        ({"history": [["a", "b"]]}, "column 'history': ids: 'a' is not an integer"),
        ({"user_id": [0.5]}, "column 'user_id': ids: ids of type Float64"),
        (None, "no such file"),
    ],
)
def test_wrong_files_are_refused(model, tmp_path, table, message):
    source = tmp_path / "q.parquet"
    if table is not None:
        pl.DataFrame(table).write_parquet(source)
    with pytest.raises(InputError, match=message):
        recommend_file(model.retriever, source, tmp_path / "r.parquet")
    assert not (tmp_path / "r.parquet").exists()


def test_existing_files_are_not_overwritten(model, source, tmp_path):
    target = tmp_path / "recs.parquet"
    target.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        recommend_file(model.retriever, source, target)
    assert target.read_text() == "mine"
    source.write_text("not Parquet")
    with pytest.raises(InputError, match="truncated or damaged file"):
        recommend_file(model.retriever, source, tmp_path / "other.parquet")
    with pytest.raises(InputError, match="no such folder"):
        pl.DataFrame({"user_id": QUERIES}).write_parquet(source)
        recommend_file(model.retriever, source, tmp_path / "nowhere" / "r.parquet")


@pytest.mark.parametrize("name", ["q.parquet", "link.parquet", "../{folder}/q.parquet", "hard.parquet"])
def test_the_input_is_never_the_output(model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pl.DataFrame({"user_id": QUERIES}).write_parquet("q.parquet")
    Path("link.parquet").symlink_to("q.parquet")
    Path("hard.parquet").hardlink_to("q.parquet")
    before = Path("q.parquet").read_bytes()
    with pytest.raises(InputError, match="is also the file with the queries; choose another --output"):
        recommend_file(model.retriever, "q.parquet", name.format(folder=tmp_path.name), force=True)
    assert Path("q.parquet").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_an_empty_input_gives_an_empty_output(model, tmp_path):
    source, target = tmp_path / "q.parquet", tmp_path / "r.parquet"
    pl.DataFrame({"query": pl.Series([], dtype=pl.String)}).write_parquet(source)
    assert recommend_file(model.retriever, source, target).rows == 0
    assert pl.read_parquet(target).columns == ["query", "rank", "item", "score"]


def test_a_run_of_another_model_is_not_resumed(model, folder, source, tmp_path):
    """Parts written by different models are not mixed."""
    target = tmp_path / "recs.parquet"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        recommend_file(Retriever.load(folder), source, target, block=4, progress=stop)
    assert json.loads((tmp_path / ".recs.parquet.parts" / "journal.json").read_text())["k"] == 10
    with pytest.raises(InputError, match=r"had different options \(model\)"):
        recommend_file(model.retriever, source, target, block=4, resume=True)


def test_damaged_pages_of_the_input_are_reported(model, tmp_path):
    """Parquet has no checksum that is read: a flipped bit is found on decoding, or changes an id."""
    source, target = tmp_path / "q.parquet", tmp_path / "r.parquet"
    pl.DataFrame({"query": [f"u{n % 25:03d}" for n in range(3000)]}).write_parquet(source)
    content, chosen = source.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        flipped = bytearray(content)
        flipped[chosen.randrange(4, len(content) - 8)] ^= 1 << chosen.randrange(8)
        source.write_bytes(flipped)
        try:
            recommend_file(model.retriever, source, target, k=1, force=True)
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(source)), error
    assert refused > 20


def test_lines_of_queries_and_items_are_histories(model, tmp_path):
    (tmp_path / "q.txt").write_text("u001 1 3\nu002 2\n")
    report = recommend_file(model.retriever, tmp_path / "q.txt", tmp_path / "r.parquet", k=3)
    assert (report.queries, report.answered) == (2, 2)
    expected = model.retriever.recommend(["u001", "u002"], histories=[["1", "3"], ["2"]], k=3)
    assert pl.read_parquet(tmp_path / "r.parquet")["item"].to_list() == expected["item"].to_list()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"block": "x"}', '{"block": null}'])
def test_a_damaged_journal_is_named(model, source, tmp_path, text):
    parts = tmp_path / ".r.parquet.parts"
    parts.mkdir()
    (parts / "journal.json").write_text(text)
    with pytest.raises(InputError, match=r"journal\.json: damaged .*--force"):
        recommend_file(model.retriever, source, tmp_path / "r.parquet", resume=True)
    recommend_file(model.retriever, source, tmp_path / "r.parquet", force=True)


def test_a_file_in_the_place_of_the_parts_and_empty_parts_are_refused(model, source, tmp_path):
    (tmp_path / ".r.parquet.parts").write_text("of somebody else")
    for force in (False, True):
        with pytest.raises(InputError, match="is a file, expected the folder of an interrupted run"):
            recommend_file(model.retriever, source, tmp_path / "r.parquet", force=force)
    assert (tmp_path / ".r.parquet.parts").read_text() == "of somebody else"
    with pytest.raises(InputError, match="block: expected at least one query"):
        recommend_file(model.retriever, source, tmp_path / "s.parquet", block=0)
