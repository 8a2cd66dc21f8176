"""Malformed inputs, each with parts of its error message of one or two lines; and no partial output is left."""

# ruff: noqa: E501 - a table reads best with one case per line

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data import Interactions, by_time, held_out_queries, leave_last_out
from twotower.errors import InputError

GOOD = "user_id,item_id,timestamp\n1,10,100\n1,11,200\n2,10,300\n"


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def parquet(name: str, frame: pl.DataFrame, cut: int = 0) -> Callable[[Path], Any]:
    def write(folder: Path) -> Path:
        path = folder / name
        frame.write_parquet(path)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        return path

    return write


def several(*writers: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def write(folder: Path) -> Path:
        for writer in writers:
            writer(folder)
        return folder

    return write


def twice_named(folder: Path) -> Path:
    pq.write_table(pa.table([[1, 2], [1, 2], [3, 4]], names=["user", "item", "item"]), folder / "a.parquet")
    return folder / "a.parquet"


PAIRS = pl.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3]})
ONE_ITEM_TABLE = {"items": pl.DataFrame({"item_id": [10, 10], "title": ["a", "b"]})}

# name, how to make the input, options of `read`, and parts of the expected message
MALFORMED: list[tuple[str, Callable[[Path], Any], dict[str, Any], list[str]]] = [
    ("no such file", lambda d: d / "gone.csv", {}, ["gone.csv", "no such file"]),
    ("empty file", text("a.csv", ""), {}, ["a.csv", "empty"]),
    ("empty Parquet", text("a.parquet", b""), {}, ["a.parquet", "empty"]),
    ("blank first line", text("a.csv", "\n1,2\n"), {}, ["a.csv", "empty"]),
    ("header only", text("a.csv", "user,item\n"), {}, ["a.csv", "no rows"]),
    ("Parquet without rows", parquet("a.parquet", PAIRS.clear()), {}, ["a.parquet", "no rows"]),
    ("unknown format", text("a.xlsx", "PK"), {}, ["a.xlsx", "unknown format '.xlsx'", ".parquet"]),
    ("empty folder", lambda d: d, {}, ["no data files in this folder"]),
    ("truncated Parquet", parquet("a.parquet", PAIRS, cut=30), {}, ["a.parquet", "truncated or damaged"]),
    ("not Parquet at all", text("a.parquet", "user,item\n1,2\n"), {}, ["a.parquet", "truncated or damaged"]),
    ("truncated gzip", text("a.csv.gz", gzip.compress((GOOD * 500).encode())[:-40]), {}, ["a.csv.gz", "truncated or damaged gzip"]),
    ("a zip archive", text("a.csv", b"PK\x03\x04" + bytes(99)), {}, ["a.csv", "zip archive or a workbook", "export it as CSV"]),
    ("latin-1 text", text("a.csv", "user,item\nJosé,1\nb,2\n".encode("latin-1")), {}, ["a.csv", "not UTF-8"]),
    ("no query column", text("a.csv", "who,item\n1,2\n"), {}, ["a.csv", "no query column", "'who', 'item'"]),
    ("no item column", text("a.csv", "user,what\n1,2\n"), {}, ["a.csv", "no item column", "'user', 'what'"]),
    ("named column absent", text("a.csv", GOOD), {"columns": {"item": "sku"}}, ["a.csv", "'sku'", "does not exist", "'item_id'"]),
    ("named timestamp absent", text("a.csv", GOOD), {"columns": {"timestamp": "when"}}, ["a.csv", "'when'", "timestamp"]),
    ("unknown role", text("a.csv", GOOD), {"columns": {"when": "timestamp"}}, ["'when' is not a role"]),
    ("one column, two roles", text("a.csv", GOOD), {"columns": {"item": "user_id", "query": "user_id"}}, ["two roles"]),
    ("ambiguous item", text("a.csv", "user,item_id,movie_id\n1,2,3\n"), {}, ["a.csv", "'item_id', 'movie_id'", "each be the item"]),
    ("duplicate header", text("a.csv", "user,item,item\n1,2,3\n"), {}, ["a.csv", "'item' occurs twice"]),
    ("duplicate Parquet column", twice_named, {}, ["a.parquet", "duplicate column", "'item'"]),
    ("too many fields", text("a.csv", "user,item\n1,2\n3,4,5\n"), {}, ["a.csv", "row 2", "3 fields"]),
    ("too few fields", text("a.csv", "user,item\n1,2\n3\n"), {}, ["a.csv", "'item'", "row 2", "empty item id"]),
    ("open quote", text("a.csv", 'user,item\n"1,2\n3,4\n'), {}, ["a.csv", "never closed"]),
    ("null query", parquet("a.parquet", PAIRS.with_columns(user=pl.Series([1, None, 2]))), {}, ["a.parquet", "'user'", "row 2", "empty query id"]),
    ("null item in CSV", text("a.csv", "user,item\n1,2\n1,\n"), {}, ["a.csv", "'item'", "row 2", "empty item id"]),
    ("blank item", text("a.csv", "user,item\n1,x\n1, \n"), {}, ["a.csv", "'item'", "row 2", "blank item id"]),
    ("ids as floats", parquet("a.parquet", PAIRS.cast({"user": pl.Float64})), {}, ["a.parquet", "'user'", "Float64"]),
    ("ids as dates", parquet("a.parquet", PAIRS.with_columns(item=pl.date(2020, 1, 1))), {}, ["a.parquet", "'item'", "Date"]),
    ("ids as booleans", parquet("a.parquet", PAIRS.with_columns(user=pl.lit(True))), {}, ["a.parquet", "'user'", "Boolean"]),
    ("ids above 2^63", parquet("a.parquet", PAIRS.with_columns(item=pl.lit(2**63 + 5, dtype=pl.UInt64))), {}, ["'item'", "above 2^63"]),
    (
        "mixed types of shards",
        several(parquet("p0.parquet", PAIRS), parquet("p1.parquet", PAIRS.cast({"item": pl.String}))),
        {},
        ["p1.parquet", "'item'", "mixed types", "p0.parquet"],
    ),
    (
        "a shard without a column",
        several(parquet("p0.parquet", PAIRS), parquet("p1.parquet", PAIRS.drop("item"))),
        {},
        ["p1.parquet", "'item' is missing", "p0.parquet"],
    ),
    (
        "a truncated shard",
        several(parquet("p0.parquet", PAIRS), parquet("p1.parquet", PAIRS, cut=9)),
        {},
        ["p1.parquet", "truncated"],
    ),
    (
        "dates and numbers",
        several(text("p0.csv", GOOD), text("p1.csv", GOOD.replace("100", "2020-01-01").replace("200", "2020-01-01").replace("300", "2020-01-01"))),
        {},
        ["p1.csv", "dates", "numbers"],
    ),
    ("null timestamp", text("a.csv", GOOD.replace("200", "")), {}, ["a.csv", "'timestamp'", "row 2", "no timestamp"]),
    ("infinite timestamp", text("a.csv", GOOD.replace("200", "inf")), {}, ["a.csv", "'timestamp'", "row 2", "'inf'"]),
    ("NaN timestamp", text("a.csv", GOOD.replace("300", "nan")), {}, ["a.csv", "'timestamp'", "row 3", "'nan'"]),
    ("NaN timestamp in Parquet", parquet("a.parquet", PAIRS.with_columns(time=pl.Series([1.0, 2.0, float("nan")]))), {}, ["'time'", "row 3"]),
    ("unparsable timestamp", text("a.csv", GOOD.replace("200", "soon")), {}, ["a.csv", "'timestamp'", "row 2", "'soon'"]),
    ("impossible date", text("a.csv", "user,item,date\n1,2,2020-01-01\n1,3,2020-02-31\n"), {}, ["'date'", "row 2", "'2020-02-31'", "ISO"]),
    ("nanoseconds", text("a.csv", GOOD.replace("300", "1577836800000000000")), {}, ["a.csv", "'timestamp'", "nanoseconds"]),
    ("timestamps of another type", parquet("a.parquet", PAIRS.with_columns(time=pl.lit(True))), {}, ["'time'", "Boolean"]),
    ("negative weight", text("a.csv", "user,item,weight\n1,2,1\n1,3,-0.5\n"), {}, ["a.csv", "'weight'", "row 2", "negative"]),
    ("weight no number", text("a.csv", "user,item,weight\n1,2,1\n1,3,much\n"), {}, ["a.csv", "'weight'", "row 2", "'much'"]),
    ("rating missing", text("a.csv", "user,item,rating\n1,2,\n1,3,5\n"), {"positive_label": 4}, ["a.csv", "'rating'", "row 1", "finite number"]),
    ("group missing", text("a.csv", "user,item,market\n1,2,x\n1,3,\n"), {"columns": {"group": "market"}}, ["a.csv", "'market'", "row 2", "empty group id"]),
    ("one item only", text("a.csv", "user,item\n1,7\n2,7\n"), {}, ["a.csv", "'item'", "only one item", "7"]),
    ("no label column", text("a.csv", GOOD), {"positive_label": 4}, ["a.csv", "positive_label=4", "label column"]),
    ("no label high enough", text("a.csv", "user,item,rating\n1,2,3\n1,3,3\n"), {"positive_label": 4}, ["a.csv", "'rating'", "at least 4"]),
    ("positive_label NaN", text("a.csv", GOOD), {"positive_label": float("nan")}, ["positive_label", "finite"]),
    ("unknown catalog", text("a.csv", GOOD), {"catalog": "all"}, ["catalog", "'interactions' or 'table'"]),
    ("catalog of no table", text("a.csv", GOOD), {"catalog": "table"}, ["data.catalog=table needs an item table", "--items"]),
    ("item table repeats an id", text("a.csv", GOOD), ONE_ITEM_TABLE, ["item table", "'item_id'", "row 2", "occurs in an earlier row"]),
    ("item table without id", text("a.csv", GOOD), {"items": pl.DataFrame({"title": ["x"]})}, ["item table", "no item id column", "'title'"]),
    ("item table has null id", text("a.csv", GOOD), {"items": pl.DataFrame({"item_id": [1, None]})}, ["item table", "row 2", "empty item id"]),
    ("item table of other ids", text("a.csv", GOOD), {"items": pl.DataFrame({"item_id": [5, 6]})}, ["item table", "none of its 2 item ids"]),
    ("gaps do not fit", text("a.txt", "1 2 3\t0 5\n2 3 4\t0\n"), {}, ["a.txt", "row 2", "2 items but 1 gaps"]),
    ("a list is null", parquet("a.parquet", pl.DataFrame({"user": [1, 2], "items": [[1, 2], None]})), {}, ["'items'", "row 2", "null instead of a list"]),
    ("lists of two lengths", parquet("a.parquet", pl.DataFrame({"user": [1], "items": [[1, 2]], "timestamps": [[1]]})), {}, ["'timestamps'", "row 1", "not as long"]),
    ("only empty lists", parquet("a.parquet", pl.DataFrame({"user": [1], "items": [[]]}, schema_overrides={"items": pl.List(pl.Int64)})), {}, ["a.parquet", "no interactions"]),
    ("item null in a list", parquet("a.parquet", pl.DataFrame({"user": [1, 2], "items": [[1, 2], [None]]})), {}, ["'items'", "row 2", "empty item id"]),
    ("two interaction files", several(text("ratings.csv", GOOD), text("interactions.csv", GOOD)), {}, ["'interactions.csv', 'ratings.csv'", "name the file"]),
    ("a ready-made split", several(text("train.txt", "1 2\n"), text("test.txt", "1 3\n")), {}, ["ready-made split", "from_parts"]),
    ("formats of two kinds", several(text("a.csv", GOOD), parquet("b.parquet", PAIRS)), {}, ["'a.csv', 'b.parquet'", "one format"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "parts"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_malformed_input_is_refused_in_two_lines_and_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], Any], options: dict[str, Any], parts: list[str]
) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    path = make(source)
    before = sorted(source.rglob("*"))
    with pytest.raises(InputError) as caught:
        Interactions.read(path, cache=cache / "here", **options)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    for part in parts:
        assert part in message
    assert sorted(source.rglob("*")) == before
    assert not cache.exists() or not list(cache.iterdir())


def test_the_list_is_long_enough() -> None:
    assert len(MALFORMED) >= 30


FRAMES: list[tuple[str, Any, list[str]]] = [
    ("not a frame", 17, ["expected a polars, pandas or Arrow data frame", "int"]),
    ("no rows", PAIRS.clear(), ["data frame", "no rows"]),
    ("mixed column", {"user": [1, "x"], "item": [1, 2]}, ["data frame", "mixed types"]),
    ("mixed objects", pl.DataFrame({"user": pl.Series([1, "x"], dtype=pl.Object), "item": [1, 2]}), ["'user'", "mixed types"]),
    ("Arrow duplicate name", pa.table([[1], [2]], names=["user", "user"]), ["data frame", "duplicate column"]),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "parts"), [f[1:] for f in FRAMES], ids=[f[0] for f in FRAMES])
def test_invalid_frames_are_refused(frame: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Interactions.from_frame(frame)
    for part in parts:
        assert part in str(caught.value)


def test_a_pandas_frame_of_mixed_types_is_refused() -> None:
    with pytest.raises(InputError, match="mixed types"):
        Interactions.from_frame(pd.DataFrame({"user": [1, "x"], "item": [1, 2]}))
    with pytest.raises(InputError, match="duplicate column"):
        Interactions.from_frame(pd.DataFrame([[1, 2, 3]], columns=["user", "item", "item"]))


def timed(n: int, queries: int = 3) -> Interactions:
    return Interactions.from_frame(
        {"user": [i % queries for i in range(n)], "item": list(range(n)), "time": list(range(n))}
    )


PAIRS_ONLY = {"user": [1, 1, 2, 2], "item": [1, 2, 3, 4]}
SPLITS: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("no timestamps", lambda: by_time(Interactions.from_frame(PAIRS_ONLY)), ["no timestamps", "data.split=leave-last-out", "data.columns.timestamp"]),
    ("all of it", lambda: by_time(timed(9), validation=0.5, test=0.5), ["together below 1"]),
    ("no test", lambda: by_time(timed(9), test=0), ["test=0"]),
    ("only cold items", lambda: by_time(timed(30)), ["validation is empty", "cold='keep'"]),
    ("unknown cold", lambda: by_time(timed(30), cold="maybe"), ["'drop' or 'keep'"]),  # type: ignore[arg-type]
    ("no query long enough", lambda: leave_last_out(Interactions.from_frame(PAIRS_ONLY)), ["no query has 3"]),
    ("no such column", lambda: leave_last_out(timed(9), "chosen"), ["'chosen'", "not a boolean column"]),
    ("no such query", lambda: leave_last_out(timed(9), [0, 77]), ["query 77", "not in the data"]),
    ("too many", lambda: leave_last_out(timed(9), 4), ["validation_queries=4", "3 queries"]),
    ("too few queries", lambda: held_out_queries(timed(9)), ["is empty", "3 queries"]),
    ("no training", lambda: held_out_queries(timed(9), 0.4, 0.59), ["training is empty"]),
    ("fold_in", lambda: held_out_queries(timed(90), fold_in=1), ["fold_in=1"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "parts"), [s[1:] for s in SPLITS], ids=[s[0] for s in SPLITS])
def test_impossible_splits_are_refused(make: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)
