"""Files of judgements and of queries in the forms of TREC and BEIR, and what is wrong with others."""

import gzip
import json
from datetime import timedelta

import polars as pl
import pytest

from twotower.data.io import judgements
from twotower.data.io.judgements import read_qrels, read_queries
from twotower.errors import InputError

WANTED = [("q1", "d7", 2), ("q1", "d 8", -1), ("q2", "d7", 0)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.qrels", "q1\t0\td7\t2\nq1\t0\td 8\t-1\n\nq2\t0\td7\t0\n"),
        ("b.tsv", "query-id\tcorpus-id\tscore\nq1\td7\t2\nq1\td 8\t-1\nq2\td7\t0"),
        ("c.tsv", "q1\td7\t2.0\r\nq1\td 8\t-1\r\nq2\td7\t0\r\n"),
        ("d.csv", 'relevance,query_id,doc_id\n2,q1,d7\n-1,q1,"d 8"\n0,q2,d7\n0,q2,d7\n'),
        ("e.txt", "topic\titem_id\trel\nq1\td7\t2\nq1\td 8\t-1\nq2\td7\t0\n"),
    ],
)
def test_judgements_in_all_forms(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_qrels(tmp_path / name).rows() == WANTED
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_qrels(tmp_path / f"{name}.gz").rows() == WANTED


def test_judgements_separated_by_blanks_and_in_parquet(tmp_path):
    (tmp_path / "qrels").write_text("301 0 FBIS3-10082 1\n301   Q0 FBIS3-10169 0\n")
    assert read_qrels(tmp_path / "qrels").rows() == [("301", "FBIS3-10082", 1), ("301", "FBIS3-10169", 0)]
    pl.DataFrame({"query_id": [1, 2], "doc_id": [5, 6], "relevance": [1, 0]}).write_parquet(tmp_path / "q.parquet")
    assert read_qrels(tmp_path / "q.parquet").rows() == [("1", "5", 1), ("2", "6", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 0 d1 1\nq1 0 d1 2\n", r"line 2: query 'q1', item 'd1': judged 1 before and 2 here"),
        ("q1 0 d1 1\nq1 0 d2 high\n", "line 2: relevance 'high'; expected an integer"),
        ("q1 0 d1 1\nq1 0 d2 1.5\n", "line 2: relevance '1.5'; expected an integer"),
        ("q1 0 d1 1\nq1 0 d2 1e99\n", "line 2: relevance '1e99'; expected an integer"),
        ("q1 0 d1 1\nq1 0 d2 1_0\n", "line 2: relevance '1_0'; expected an integer"),
        ("q1 0 d1 1\nq1 0 d2 \u0661\n", "line 2: relevance '\u0661'; expected an integer"),
        ("q1 0 d1 1\nq1 d2 1\n", "line 2: 3 fields, expected 4"),
        ("q1\t0\td1\t1\nq1\t0\t\t1\n", "line 2: an id is empty"),
        ("who\twhat\tscore\n1\t2\t3\n", "columns 'who', 'what', 'score'; expected lines"),
        ("query_id\tdoc_id\trelevance\n", "no judgements"),
        ("", "the file is empty"),
    ],
)
def test_wrong_judgements_are_reported_with_their_line(tmp_path, text, message):
    (tmp_path / "qrels.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_qrels(tmp_path / "qrels.txt")


def test_size_is_bounded(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such file; expected lines"):
        read_qrels(tmp_path / "none")
    path = tmp_path / "qrels.gz"
    path.write_bytes(gzip.compress(b"q1 0 d1 1\n" * 1000))
    monkeypatch.setattr(judgements, "MOST_BYTES", 5000)
    with pytest.raises(InputError, match="more than 5,000 characters after decompression"):
        read_qrels(path)
    (tmp_path / "qrels").write_bytes(b"q1 0 d1 1\n" * 1000)
    with pytest.raises(InputError, match="10,000 bytes; expected at most 5,000"):
        read_qrels(tmp_path / "qrels")
    monkeypatch.setattr(judgements, "LONGEST_LINE", 100)
    (tmp_path / "qrels").write_bytes(b"q" * 200)
    with pytest.raises(InputError, match="line 1: longer than 100 characters"):
        read_qrels(tmp_path / "qrels")


ASKED = [("1", "what is a wing?"), ("q 2", 'the "flat" plate, 3')]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(json.dumps({"_id": one, "text": two, "metadata": {}}) for one, two in ASKED)),
        ("b.tsv", "query_id\ttext\n" + "\n".join(f"{one}\t{two}" for one, two in ASKED)),
        ("c.tsv", "\n".join(f"{one}\t{two}" for one, two in ASKED) + "\n"),
        ("d.csv", 'qid,query\n1,what is a wing?\nq 2,"the ""flat"" plate, 3"\n'),
    ],
)
def test_queries_in_all_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_queries(tmp_path / name).rows() == ASKED


def test_other_columns_of_queries_are_kept(tmp_path):
    pl.DataFrame({"id": [1, 2], "device": ["a", "b"], "text": ["x", "y"]}).write_parquet(tmp_path / "q.parquet")
    found = read_queries(tmp_path / "q.parquet")
    assert found.columns == ["query", "text", "device"] and found["query"].to_list() == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"_id": "1", "text": "x"}\n{"_id": "2"}', r"line 2: expected an id and a text"),
        ('{"_id": "1", "text": "x"}\n{', "line 2: not valid JSON"),
        ('{"_id": "1", "text": "x"}\n[1]', "line 2: expected a JSON object"),
        ('{"_id": "1", "text": "x"}\n{"_id": "1", "text": "y"}', "query '1' has several rows"),
        ('{"_id": "1", "text": " "}', "row 1: the text is empty"),
        ("{" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_wrong_queries_are_reported(tmp_path, text, message):
    (tmp_path / "queries.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_queries(tmp_path / "queries.jsonl")


def test_a_field_longer_than_the_csv_module_reads_is_named(tmp_path):
    (tmp_path / "q.csv").write_text("query_id,doc_id,relevance\nq1," + "x" * 200_000 + ",1\n")
    with pytest.raises(InputError, match=r"q\.csv: line 2: field larger than field limit"):
        read_qrels(tmp_path / "q.csv")


@pytest.mark.parametrize("text", ['{"_id": "\\ud800", "text": "b"}', '{"_id": "a", "text": "b\\udfff"}'])
def test_half_of_a_pair_of_codes_is_no_text(tmp_path, text):
    (tmp_path / "q.jsonl").write_text(f'{{"_id": "0", "text": "x"}}\n{text}\n')
    with pytest.raises(InputError, match="line 2: unpaired"):
        read_queries(tmp_path / "q.jsonl")


#: Values of columns of Parquet that are neither ids nor text.
OTHER = {
    "lists": ["a"],
    "arrays": pl.Series([[1, 2]], dtype=pl.Array(pl.Int64, 2)),
    "bytes": b"\xff",
    "durations": timedelta(1),
}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("column", ["query_id", "doc_id", "relevance"])
def test_columns_of_parquet_that_are_no_text_are_named(tmp_path, column, kind):
    values = OTHER[kind] if isinstance(OTHER[kind], pl.Series) else [OTHER[kind]]
    table = {"query_id": ["q"], "doc_id": ["d"], "relevance": [1]} | {column: values}
    pl.DataFrame(table).write_parquet(tmp_path / "q.parquet")
    with pytest.raises(InputError, match=rf"q\.parquet: column '{column}'"):
        read_qrels(tmp_path / "q.parquet")
    if column != "relevance":
        name = {"query_id": "query_id", "doc_id": "text"}[column]
        pl.DataFrame({"query_id": ["q"], "text": ["t"]} | {name: values}).write_parquet(tmp_path / "q.parquet")
        with pytest.raises(InputError, match=rf"q\.parquet: column '{name}'"):
            read_queries(tmp_path / "q.parquet")


def test_a_message_about_columns_names_only_those_of_the_file(tmp_path):
    pl.DataFrame({"who": ["q"], "what": ["d"]}).write_parquet(tmp_path / "q.parquet")
    with pytest.raises(InputError, match="columns 'who', 'what'; expected"):
        read_qrels(tmp_path / "q.parquet")
