"""Readers of judged queries: relevance judgements (qrels) and query texts, in TREC and BEIR formats."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from twotower.data.io.readers import TAB_SUFFIXES, open_source, suffix_of
from twotower.data.io.text_format import damaged, magic, read_head, text_blocks
from twotower.data.schema.columns import USUAL_NAMES, plain_name
from twotower.data.schema.vocabulary import ids_of, listed, texts_of
from twotower.errors import InputError
from twotower.system.filesystem import require_file

#: Maximum size of a file, in bytes, and maximum length of a line, in characters.
MOST_BYTES, LONGEST_LINE = 1 << 30, 1 << 20
#: Usual names of the columns of judgement and query files, without separators and in lower case.
QUERY_NAMES = ("queryid", "qid", "query", "topicid", "topic")
DOCUMENT_NAMES = ("corpusid", "docid", "documentid", "doc", *(name for tier in USUAL_NAMES["item"] for name in tier))
RELEVANCE_NAMES = ("relevance", "rel", "score", "grade", "judgement", "judgment", "label")
ID_NAMES = ("id", "queryid", "qid", "topicid")
#: Matches an integer; some spreadsheets write 1 as 1.0.
_WHOLE = re.compile(r"([+-]?[0-9]{1,10})(?:\.0*)?")
TEXT_NAMES = ("text", "querytext", "query", "title", "question")


def read_qrels(path: str | Path) -> pl.DataFrame:
    """Read relevance judgements.

    Supported formats are TREC (`query 0 document relevance`, separated by blanks, without a header), BEIR (a header
    `query-id corpus-id score`, separated by tabs), three columns without a header, and CSV, TSV or Parquet with the
    usual column names (query_id, doc_id, relevance).

    Args:
        path: the file; text may be compressed with gzip.

    Returns:
        Columns `query` and `item` (text) and `relevance` (integers; below 1 means not relevant). Exact duplicates are
        merged.

    Raises:
        InputError: the file cannot be read, a line has the wrong format, or a pair has two different judgements.
    """
    file = Path(path)
    expected = "lines `query 0 document relevance` (TREC), or columns query-id, corpus-id and score (BEIR)"
    _require_file(file, expected)
    if magic(file).startswith(b"PAR1"):
        source = open_source(file)
        names = _columns(source.columns, (QUERY_NAMES, DOCUMENT_NAMES, RELEVANCE_NAMES), file, expected)
        found = pl.concat(source.chunks(names))
        ids = [_id_texts(found[name], file) for name in names[:2]]
        columns = [*ids, texts_of(found[names[2]], str(file))]
        numbered: Iterator[tuple[int, Sequence[str]]] = iter(enumerate(zip(*columns, strict=True), start=1))
        where = "row"
    else:
        numbered, where = _judged_lines(file, expected), "line"
    rows: dict[tuple[str, str], int] = {}
    for number, fields in numbered:
        query, item, relevance = (str(field or "").strip() for field in fields)
        if not query or not item:
            raise InputError(f"{file}: {where} {number}: an id is empty; expected {expected}")
        grade = _grade(relevance)
        if grade is None:
            raise InputError(
                f"{file}: {where} {number}: relevance {relevance[:40]!r}; expected an integer, such as 0, 1 or 2"
            )
        if rows.setdefault((query, item), grade) != grade:
            raise InputError(
                f"{file}: {where} {number}: query {query!r}, item {item!r}: judged {rows[query, item]} before and "
                f"{grade} here; keep one of the two"
            )
    if not rows:
        raise InputError(f"{file}: no judgements; expected {expected}")
    return pl.DataFrame(
        {
            "query": [query for query, _ in rows],
            "item": [item for _, item in rows],
            "relevance": list(rows.values()),
        },
        schema={"query": pl.String, "item": pl.String, "relevance": pl.Int64},
    )


def read_queries(path: str | Path) -> pl.DataFrame:
    """Read the texts of queries.

    Supported formats are JSON lines (`{"_id": ..., "text": ...}`, BEIR), two columns without a header, separated by a
    tab, and CSV, TSV or Parquet with the usual column names (query_id, text).

    Args:
        path: the file; text may be compressed with gzip.

    Returns:
        Columns `query` and `text`, both of type text, followed by the other columns of a table with a header. The rows
        are in file order.

    Raises:
        InputError: the file cannot be read, a line has the wrong format, an id or a text is missing, or an id repeats.
    """
    file = Path(path)
    expected = 'columns query_id and text, or JSON lines {"_id": ..., "text": ...}'
    _require_file(file, expected)
    if not magic(file).startswith(b"PAR1") and read_head(file, allow_json=True).lines[0].lstrip().startswith("{"):
        frame = _json_queries(file, expected)
    elif (lines := _headerless(file)) is not None:
        frame = lines
    else:
        source = open_source(file)
        names = _columns(source.columns, (ID_NAMES, TEXT_NAMES), file, expected)
        whole = pl.concat(source.chunks(source.columns)).select(source.columns)
        others = [name for name in source.columns if name not in (*names, "query", "text")]
        frame = whole.select(
            _id_texts(whole[names[0]], file).str.strip_chars().alias("query"),
            texts_of(whole[names[1]], str(file)).alias("text"),
            *others,
        )
    for name in ("query", "text"):
        blank = frame[name].is_null() | (frame[name].str.strip_chars() == "")
        if blank.any():
            raise InputError(f"{file}: row {int(blank.arg_true()[0]) + 1}: the {name} is empty; expected {expected}")
    copies = frame["query"].is_duplicated()
    if copies.any():
        raise InputError(
            f"{file}: query {frame['query'].filter(copies)[0]!r} has several rows; expected one text per query"
        )
    return frame


def _id_texts(ids: pl.Series, file: Path) -> pl.Series:
    return ids_of(ids, f"{file}: column {ids.name!r}").cast(pl.String)


def _require_file(file: Path, expected: str) -> None:
    require_file(file)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected {expected}")
    if file.stat().st_size > MOST_BYTES:
        raise InputError(f"{file}: {file.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}")


def _columns(found: Sequence[str], roles: Sequence[Sequence[str]], file: Path, expected: str) -> list[str]:
    """Find one column per role, trying the usual names in order; a column gets at most one role."""
    chosen: list[str] = []
    for names in roles:
        by_name = {plain_name(column).lstrip("."): column for column in reversed(found) if column not in chosen}
        name = next((by_name[one] for one in names if one in by_name), None)
        if name is None:
            raise InputError(f"{file}: columns {listed(list(found))}; expected {expected}")
        chosen.append(name)
    return chosen


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not blank."""
    number, rest, total = 0, "", 0
    try:
        for block in text_blocks(file, read_head(file, allow_json=True).encoding):
            total += len(block)
            if total > MOST_BYTES:
                raise InputError(f"{file}: more than {MOST_BYTES:,} characters after decompression")
            *lines, rest = (rest + block).split("\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield number, line
            if len(rest) > LONGEST_LINE:
                raise InputError(f"{file}: line {number + 1}: longer than {LONGEST_LINE:,} characters")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise damaged(file, error) from None
    if rest.strip():
        yield number + 1, rest


def _judged_lines(file: Path, expected: str) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the line number, query, item and relevance of each line of a text file."""
    places: list[int] | None = None
    comma = suffix_of(file) == ".csv"
    for number, line in _lines(file):
        if comma:
            try:
                fields = next(csv.reader([line], skipinitialspace=True))
            except csv.Error as error:  # a field longer than `csv.field_size_limit`
                raise InputError(f"{file}: line {number}: {error}; expected {expected}") from None
        else:
            fields = line.split("\t") if "\t" in line else line.split()
        fields = [field.strip() for field in fields]
        if places is None:
            if len(fields) in (3, 4) and _grade(fields[-1]) is not None:
                places = [0, len(fields) - 2, len(fields) - 1]
            else:
                names = _columns(fields, (QUERY_NAMES, DOCUMENT_NAMES, RELEVANCE_NAMES), file, expected)
                places = [fields.index(name) for name in names]
                width = len(fields)
                continue
            width = len(fields)
        if len(fields) != width:
            raise InputError(f"{file}: line {number}: {len(fields)} fields, expected {width}: {expected}")
        yield number, [fields[place] for place in places]


def _grade(text: str) -> int | None:
    """Return a relevance, such as 1 or 1.0; None if it is not an integer of 32 bits."""
    found = _WHOLE.fullmatch(text)
    return int(found[1]) if found and abs(int(found[1])) < 2**31 else None


def _headerless(file: Path) -> pl.DataFrame | None:
    """Read two columns without a header, separated by a tab; return None if the file has a header or another format."""
    if magic(file).startswith(b"PAR1") or suffix_of(file) not in (*TAB_SUFFIXES, ".txt", ""):
        return None
    first = read_head(file).lines[0].split("\t")
    if len(first) != 2 or plain_name(first[0]).lstrip(".") in ID_NAMES:
        return None
    rows = []
    for number, line in _lines(file):
        fields = line.split("\t")
        if len(fields) != 2:
            raise InputError(f"{file}: line {number}: {len(fields)} fields; expected an id, a tab and a text")
        rows.append((fields[0].strip(), fields[1].strip()))
    return pl.DataFrame(rows, schema={"query": pl.String, "text": pl.String}, orient="row")


def _json_queries(file: Path, expected: str) -> pl.DataFrame:
    rows = []
    for number, line in _lines(file):
        where = f"{file}: line {number}"
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object ({expected})")
        named = {plain_name(str(name)): value for name, value in reversed(row.items())}
        values = [next((named[name] for name in names if name in named), None) for names in (ID_NAMES, TEXT_NAMES)]
        if isinstance(values[0], int) and not isinstance(values[0], bool):
            values[0] = str(values[0])
        if not all(isinstance(value, str) for value in values):
            raise InputError(f"{where}: expected an id and a text ({expected}); found fields {listed(list(row))}")
        try:
            "".join(map(str, values)).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: unpaired \\u surrogate; write the text as UTF-8") from None
        rows.append(values)
    return pl.DataFrame(rows, schema={"query": pl.String, "text": pl.String}, orient="row")
