"""Files as other programs write them: read as meant, or refused with what to do; no row is lost silently."""

import gzip
import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.io.text_format import UNIT, count_lines, find_separator, records
from twotower.errors import InputError

START = 1_704_070_800
ROWS = [(f"u{n % 7}", f"i{n % 5}", START + 3600 * n) for n in range(35)]


def table(separator: str = ",", *, rows=ROWS, header=("user_id", "item_id", "timestamp"), end: str = "\n") -> str:
    return "".join(separator.join(map(str, line)) + end for line in (header, *rows))


def read(tmp_path: Path, content: str | bytes, name: str = "a.csv", **options) -> Interactions:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Interactions.read(path, **options)


def assert_rows(data: Interactions, rows=ROWS) -> None:
    found = {
        (data.queries.ids[int(q)], data.items.ids[int(i)], int(t) // 1_000_000)
        for q, i, t in zip(data.query_codes(), data.item_codes, data.timestamps, strict=True)
    }
    assert found == set(rows) and len(data) == len(rows)


@pytest.mark.parametrize("name", ["data[1]", "what?", "a*b", "dir [x]", "{a,b}"])
def test_a_path_is_never_a_pattern(tmp_path: Path, name: str) -> None:
    other = [("other", f"wrong{n}", START + n) for n in range(9)]
    for decoy in ("data1", "whatx", "axb", "dir x", "a"):
        read(tmp_path, table(rows=other), f"{decoy}.csv")
    assert_rows(read(tmp_path, table(), f"{name}.csv"))
    frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")
    (tmp_path / name).mkdir()
    with (tmp_path / name / "a.parquet").open("wb") as stream:
        frame.write_parquet(stream)
    data = Interactions.read(tmp_path / name / "a.parquet", cache=tmp_path / name / "cache [1]")
    assert_rows(data)
    data.save(tmp_path / name / "saved*")
    assert_rows(Interactions.open(tmp_path / name / "saved*"))


ODD = ['5" pan', 'the "best"', "a,b", "back\\slash", 'ends in \\"', 'a "b", c']


@pytest.mark.parametrize("escape", ["doubled", "backslash"])
def test_quotation_marks_of_every_writer(tmp_path: Path, escape: str) -> None:
    def quoted(text: str) -> str:
        if escape == "doubled":
            return '"' + text.replace('"', '""') + '"'
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    rows = [(f"u{n % 3}", ODD[n % len(ODD)], START + n) for n in range(24)]
    content = table(rows=[(q, quoted(i), t) for q, i, t in rows])
    assert_rows(read(tmp_path, content), rows)


@pytest.mark.parametrize("note", ['5" nail', 'say "hi"', '3" x 4"'])
def test_quotation_marks_inside_fields_without_quotes_are_text(tmp_path: Path, note: str) -> None:
    lines = [(*row, note if n % 3 else "plain") for n, row in enumerate(ROWS)]
    assert_rows(read(tmp_path, table(rows=lines, header=("user_id", "item_id", "timestamp", "note"))))


def test_quotation_marks_in_files_with_tabs_are_text(tmp_path: Path) -> None:
    rows = [(q, f'"{i}" live' if n % 2 else f'{i} "', t) for n, (q, i, t) in enumerate(ROWS)]
    assert_rows(read(tmp_path, table("\t", rows=rows), "a.tsv"), rows)


@pytest.mark.parametrize(
    ("field", "message"),
    [('"Big" Bob', "row 6: a stray quotation mark"), ('"open', "row 6: a "), ('"a" "b', "row 6: a ")],
)
def test_an_unreadable_quotation_mark_is_refused_with_its_row(tmp_path: Path, field: str, message: str) -> None:
    rows = [(q, field if n == 5 else i, t) for n, (q, i, t) in enumerate(ROWS)]
    with pytest.raises(InputError, match=message):
        read(tmp_path, table(rows=rows))


def test_line_breaks_in_fields_are_reported_and_refused_in_ids(tmp_path: Path) -> None:
    lines = [(*row, '"two\nlines"' if n % 5 == 0 else "one") for n, row in enumerate(ROWS)]
    data = read(tmp_path, table(rows=lines, header=("user_id", "item_id", "timestamp", "note")))
    assert_rows(data)
    assert data.account.count("line breaks in fields") == 7
    lost = table().replace("u3,", '",', 1).replace("u5,", '",', 1)  # two lone marks: the lines between are one field
    with pytest.raises(InputError, match=r"line break|fields|quotation"):
        read(tmp_path, lost, "lost.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_encodings_line_ends_and_compression(tmp_path: Path, end: str, encoding: str, packed: bool) -> None:
    raw = table("\t" if encoding == "utf-16" else ",", end=end).encode(encoding)
    assert_rows(read(tmp_path, gzip.compress(raw) if packed else raw))


def test_the_content_decides_what_a_file_is(tmp_path: Path) -> None:
    assert_rows(read(tmp_path, table(), "plain.csv.gz"))
    assert_rows(read(tmp_path, gzip.compress(table().encode()), "packed.tsv"))
    pl.DataFrame(ROWS, schema=["user", "item", "time"], orient="row").write_parquet(tmp_path / "b.csv")
    assert_rows(Interactions.read(tmp_path / "b.csv"))


@pytest.mark.parametrize("separator", [",", ";", "|", "\t", " ", "\x01", "::"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_the_separator_is_the_one_that_splits_every_line_alike(tmp_path: Path, separator: str, name: str) -> None:
    if (separator, name) == ("\x01", "a.csv"):
        name = "a.tsv"
    assert_rows(read(tmp_path, table(separator), name))


def test_a_separator_among_others() -> None:
    assert find_separator(["a;b;Price, EUR", '1;2;"1,50"', '3;4;"2,50"']) == ";"
    assert find_separator(["a,b;c", "1,x;y", "2,z"]) == ","
    assert find_separator(["a b,c d", "1 2,3 4"]) == ","
    assert find_separator(["a\tb,c", "1\t2", "3\t4,5"]) == "\t"


def test_headers(tmp_path: Path) -> None:
    spread = table().replace("user_id,", '"user\nid",', 1)
    assert_rows(read(tmp_path, spread, "spread.csv"))
    assert_rows(read(tmp_path, "sep=;\n" + table(";"), "excel.csv"))
    assert_rows(read(tmp_path, table(", "), "spaced.csv"))
    for name, rows in (("twice", [(3, 3, START)]), ("numbers", [(1, 2, START)]), ("dates", [("u", "i", "2024-01-01")])):
        with pytest.raises(InputError, match="The first line looks like data: add a header line"):
            read(tmp_path, table(rows=rows, header=rows[0]), f"{name}.csv")


@pytest.mark.parametrize("where", [0, 1, 3])
def test_columns_without_a_name_are_ignored_and_reported(tmp_path: Path, where: int) -> None:
    def with_extra(line: tuple, value: object) -> tuple:
        return (*line[:where], value, *line[where:])

    content = table(
        header=with_extra(("user_id", "item_id", "timestamp"), ""),
        rows=[with_extra(row, n) for n, row in enumerate(ROWS)],
    )
    data = read(tmp_path, content, items=None)
    assert_rows(data)
    assert data.account.count("columns without a name") == 1


@pytest.mark.parametrize("values", [["", "5"], ["good", "bad"], ["nan", "1"], ["inf", "2"]])
def test_a_column_that_nothing_needs_refuses_nothing(tmp_path: Path, values: list[str]) -> None:
    content = table(
        header=("user_id", "item_id", "timestamp", "rating"), rows=[(*r, values[n % 2]) for n, r in enumerate(ROWS)]
    )
    data = read(tmp_path, content)
    assert_rows(data)
    assert data.labels is None and "label ignored" in str(data.account)
    assert "label" not in str(read(tmp_path, content, "b.csv", columns={"label": None}).account)
    with pytest.raises(InputError, match="expected a finite number"):
        read(tmp_path, content, "c.csv", positive_label=1)
    grouped = content.replace("rating", "group", 1)
    assert_rows(read(tmp_path, grouped, "d.csv"))


def test_truth_values_are_labels(tmp_path: Path) -> None:
    rows = [(*row, ("true", "False")[n % 2]) for n, row in enumerate(ROWS)]
    content = table(header=("user_id", "item_id", "timestamp", "label"), rows=rows)
    assert len(read(tmp_path, content, positive_label=1)) == 18


def test_null_as_a_column_means_none(tmp_path: Path) -> None:
    config = Config.load(None, ["data.columns.label=null", "data.columns.query=1"])
    assert (config.data.columns.label, config.data.columns.query) == ("none", "1")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "c.yaml") == config
    with pytest.raises(InputError, match="query=none"):
        read(tmp_path, table(), columns={"query": None})


@pytest.mark.parametrize("word", ["nan", "NULL", "None", "null", "NA", "\\N", "<NA>"])
def test_missing_ids_written_as_text_are_reported(tmp_path: Path, word: str) -> None:
    rows = [(word if n % 5 == 0 else q, i, t) for n, (q, i, t) in enumerate(ROWS)]
    assert read(tmp_path, table(rows=rows)).account.count(f"rows with the query id {word!r}") == 7
    rows = [(q, word if n % 7 == 0 else i, t) for n, (q, i, t) in enumerate(ROWS)]
    assert read(tmp_path, table(rows=rows), "b.csv").account.count(f"rows with the item id {word!r}") == 5


def times_of(tmp_path: Path, values: list, name: str = "t.csv") -> Interactions:
    return read(tmp_path, table(rows=[(q, i, v) for (q, i, _), v in zip(ROWS, values, strict=False)]), name)


DAY = datetime(2024, 1, 31, tzinfo=UTC)
SECONDS = int(DAY.timestamp())


@pytest.mark.parametrize(
    "written",
    [
        "20240131", "2024013100", "202401310000", "20240131000000", "2024-01-31", "2024/01/31", "2024.1.31",
        "2024-01-31 00:00:00 UTC", "2024-01-31T00:00:00Z", "2024-01-31 00:00:00+00", "2024/1/31 00:00 GMT",
        "2024-01-31 02:00:00+02:00", " 2024-01-31 ",
    ],
)  # fmt: skip
def test_dates_as_they_are_written(tmp_path: Path, written: str) -> None:
    data = times_of(tmp_path, [written] * 9)
    assert set(data.timestamps.tolist()) == {SECONDS * 1_000_000}
    assert "2024-01-31 00:00:00 to 2024-01-31 00:00:00" in str(data.account)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (range(2000, 2025), "years"), (range(45_000, 45_025), "serial dates"), (range(1, 26), "days of a month"),
        (range(100, 125), "days of a year"), (range(202_301, 202_312), "months"),
    ],
)  # fmt: skip
def test_numbers_that_are_no_unix_time_are_reported(tmp_path: Path, values: range, what: str) -> None:
    account = times_of(tmp_path, list(values)).account
    assert account.count("timestamps in 1970") == len(values)
    assert f"these look like {what}" in str(account)


@pytest.mark.parametrize("scale", [1, 1000, 1_000_000])
@pytest.mark.parametrize("sentinel", [253_402_300_799, 253_402_214_400, 0, -62_135_596_800])
def test_a_placeholder_does_not_change_the_unit_and_is_reported(tmp_path: Path, scale: int, sentinel: int) -> None:
    data = times_of(tmp_path, [sentinel * scale, *((START + n) * scale for n in range(20))])
    times = sorted(data.timestamps.tolist())
    assert {START * 1_000_000, (START + 19) * 1_000_000, sentinel * 1_000_000} <= set(times)
    label = "timestamps years apart" if sentinel else "timestamps in 1970"
    assert data.account.count(label) == 1


@pytest.mark.parametrize("pair", [(1, 1000), (1000, 1_000_000), (1, 1_000_000)])
@pytest.mark.parametrize("shards", [False, True])
def test_two_units_are_refused(tmp_path: Path, pair: tuple[int, int], shards: bool) -> None:
    first, second = ([(START + n) * scale for n in range(10)] for scale in pair)
    with pytest.raises(InputError, match="timestamps in two units: 10 rows look like"):
        if shards:
            for name, values in (("p0", first), ("p1", second)):
                (tmp_path / "s").mkdir(exist_ok=True)
                content = table(rows=[(q, i, v) for (q, i, _), v in zip(ROWS, values, strict=False)])
                (tmp_path / "s" / f"{name}.csv").write_text(content)
            Interactions.read(tmp_path / "s")
        else:
            times_of(tmp_path, first + second)


def test_dates_far_away_are_reported_too(tmp_path: Path) -> None:
    data = times_of(tmp_path, ["9999-12-31", "1900-01-01", *["2024-01-31"] * 20])
    assert data.account.count("timestamps years apart") == 2
    assert data.account.count("timestamps in the future") == 1


def test_hive_folders_and_their_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame([row[:2] for row in ROWS], schema=["user_id", "item_id"], orient="row")
    for day in (1, 2, 3):
        folder = tmp_path / "hive" / f"dt=2024-01-0{day}" / "country=de"
        folder.mkdir(parents=True)
        frame[day::3].write_parquet(folder / "part-00000-abc.snappy.parquet")
    (tmp_path / "hive" / "_SUCCESS").touch()
    data = Interactions.read(tmp_path / "hive", columns={"timestamp": None})
    assert len(data) == len(frame) - 1 and data.account.count("files in subfolders") == 3
    for columns in (None, {"timestamp": "dt"}):  # the folders of days are the only time
        dated = Interactions.read(tmp_path / "hive", columns=columns, context=["country"])
        assert sorted({int(t) // 86_400_000_000 for t in dated.timestamps}) == [19_723, 19_724, 19_725]
        assert set(dated.context["country"]) == {"de"}


@pytest.mark.parametrize(
    "links",
    [
        {"dt=1/x=1": ".."},
        {"dt=1/x=1": "..", "dt=1/x=2": "../.."},
        {"dt=1/x=1": "."},
        {"dt=1/x=1": "../dt=2", "dt=2/x=1": "../dt=1"},
        {"other/x": "..", "other/y": ".."},
    ],
)
def test_links_to_a_folder_above_are_not_followed(tmp_path: Path, links: dict[str, str]) -> None:
    """Each file would be read again in every round, and two links would never end."""
    read(tmp_path, table(), "log/dt=1/a.csv")
    read(tmp_path, table(), "log/other/b.csv")
    (tmp_path / "log" / "dt=2").mkdir()
    for name, target in links.items():
        (tmp_path / "log" / name).symlink_to(target, target_is_directory=True)
    account = Interactions.read(tmp_path / "log").account
    between = "dt=2" in str(links)  # this link shows the files of dt=1 in dt=2, too
    assert account.count("rows read") == len(ROWS) * (2 if between else 1)
    assert "other (1 files)" in str(account)


def test_folders_of_years_and_months_and_other_subfolders(tmp_path: Path) -> None:
    for part in ("2023/12", "2024/01"):
        read(tmp_path, table(), f"log/{part}/a.csv")
    assert Interactions.read(tmp_path / "log").account.count("rows read") == 2 * len(ROWS)
    read(tmp_path, table(), "mixed/a.csv")
    read(tmp_path, table(), "mixed/old/b.csv")
    account = Interactions.read(tmp_path / "mixed").account
    assert account.count("subfolders not read") == 1 and "old (1 files)" in str(account)
    read(tmp_path, table(), "tables/interactions/a.csv")
    with pytest.raises(InputError, match=r"in subfolders: 'interactions \(1\)'; give one of them"):
        Interactions.read(tmp_path / "tables")


@pytest.mark.parametrize("kind", ["parquet", "header", "nothing"])
def test_empty_part_files_are_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")
    for number, part in enumerate((frame[:20], frame[:0], frame[20:])):
        if kind == "parquet":
            part.write_parquet(tmp_path / f"p{number}.parquet")
        else:
            (tmp_path / f"p{number}.csv").write_text(part.write_csv() if len(part) or kind == "header" else "")
    data = Interactions.read(tmp_path)
    assert_rows(data)
    assert data.account.count("empty files") == 1
    for path in (*tmp_path.glob("p0.*"), *tmp_path.glob("p2.*")):
        path.unlink()
    with pytest.raises(InputError, match=r"no rows|empty"):
        Interactions.read(tmp_path)


@pytest.mark.parametrize(
    "header", ["user id\titem id\ttimestamp", "visitor;product;time", "user|item|ts", "user item ts"]
)
def test_text_files_with_a_header_are_tables(tmp_path: Path, header: str) -> None:
    separator = next(mark for mark in "\t;| " if mark in header)
    assert_rows(read(tmp_path, table(separator, header=header.split(separator)), "a.txt"))


def test_triples_are_no_lists_of_items(tmp_path: Path) -> None:
    plain = [(n % 7, n % 5, t) for n, (_, _, t) in enumerate(ROWS)]
    once = [(n, n % 5, t) for n, (_, _, t) in enumerate(ROWS)]
    rated = [(n % 7, n % 5, 4, t) for n, (_, _, t) in enumerate(ROWS)]
    for name, rows in (("a", plain), ("b", once), ("c", rated)):
        content = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        with pytest.raises(InputError, match="a table without a header"):
            read(tmp_path, content, f"{name}.txt")
    lists = read(tmp_path, "1 5 6 7\n2 6 5 8\n3 7 5 6\n", "lists.txt")
    assert len(lists) == 9


@pytest.mark.parametrize("cell", ["16 3 7", "[16, 3, 7]", '"16,3,7"', "16|3|7", '"[""16"", ""3"", ""7""]"', "(16;3;7)"])
def test_cells_of_items_are_lists(tmp_path: Path, cell: str) -> None:
    quoted = cell if cell.startswith('"') else f'"{cell}"'
    data = read(tmp_path, f"user_id,items\n1,{quoted}\n2,{quoted}\n3,16\n")
    assert [data.items.ids[int(i)] for i in data.item_codes] == [16, 3, 7, 16, 3, 7, 16]


def test_words_under_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'red shirt' may be one id or a list of ids"):
        read(tmp_path, "user_id,items\n1,red shirt\n2,blue hat\n")
    assert len(read(tmp_path, "user_id,item_id\n1,red shirt\n2,blue hat\n", "b.csv")) == 2


def test_blanks_around_ids_are_removed_and_counted(tmp_path: Path) -> None:
    data = read(tmp_path, table(rows=[(f" {q}", f"{i} " if n % 2 else i, t) for n, (q, i, t) in enumerate(ROWS)]))
    assert_rows(data)
    assert data.account.count("blanks around ids") == 35 + 17
    numbers = read(tmp_path, "user, item\n1, 10\n2, 11\n", "n.csv")
    assert numbers.items.ids.to_list() == [10, 11]
    kept = Interactions.from_frame({"user": ["a", "b "], "item": ["x", "y"]})
    assert kept.queries.ids.to_list() == ["a", "b "] and kept.account.count("blanks kept around ids") == 1


def test_exact_copies_of_feature_rows_are_left_out(tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    items.write_text(",item_id,title\n0,i1,a\n0,i1,a\n1,i2,b\n")
    data = read(tmp_path, table(), items=items)
    assert data.account.count("item table rows repeated") == 1
    assert data.item_table["title"].drop_nulls().to_list() == ["a", "b"]
    items.write_text("item_id,title\ni1,a\ni1,other\n")
    with pytest.raises(InputError, match="occurs in an earlier row"):
        read(tmp_path, table(), items=items)


@pytest.mark.parametrize("kind", ["file", "frame", "folder"])
def test_columns_of_feature_tables_can_be_named(tmp_path: Path, kind: str) -> None:
    frame = pl.DataFrame({"nr": [f"i{n}" for n in range(5)], "label": [f"Item {n}" for n in range(5)]})
    people = pl.DataFrame({"person": [f"u{n}" for n in range(7)], "age": range(7)})
    named = {"item_columns": {"item": "nr", "title": "label"}, "query_columns": {"query": "person"}}
    if kind == "folder":
        folder = tmp_path / "data"
        read(tmp_path, table(), "data/interactions.csv")
        frame.write_csv(folder / "items.csv")
        people.write_parquet(folder / "users.parquet")
        data = Interactions.read(folder, **named)
    elif kind == "frame":
        data = read(tmp_path, table(), items=frame, queries=people, **named)
    else:
        frame.write_csv(tmp_path / "i.csv")
        people.write_csv(tmp_path / "p.tsv", separator="\t")
        data = read(tmp_path, table(), items=tmp_path / "i.csv", queries=tmp_path / "p.tsv", **named)
    assert data.item_table["title"].to_list() == [f"Item {n}" for n in range(5)]
    assert data.query_table["age"].to_list() == list(range(7))


def test_named_columns_of_feature_tables_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame({"nr": ["i1"], "label": ["a"], "title": ["b"]})
    for columns, message in (
        ({"item": "sku"}, r"no column 'sku', named in item_columns. Columns found: 'nr', 'label', 'title'"),
        ({"id": "nr"}, "'id' is not a role; the roles are 'item', 'title'"),
        ({"item": "nr", "title": "label"}, "a column 'title' exists too"),
        ({"title": "label"}, "no item id column"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, table(), items=frame, item_columns=columns)
    for setting, expected in (("data.item_columns.item=nr", "nr"), ("data.item_columns.item=3", "3")):
        assert Config.load(None, [setting]).data.item_columns.item == expected


def delta(folder: Path, *entries: list[dict]) -> Path:
    (folder / "_delta_log").mkdir(parents=True, exist_ok=True)
    for number, actions in enumerate(entries):
        lines = "".join(json.dumps(action) + "\n" for action in actions)
        (folder / "_delta_log" / f"{number:020d}.json").write_text(lines)
    return folder


def test_a_delta_table_is_read_by_its_log(tmp_path: Path) -> None:
    """Files that the log removed are still in the folder; reading them would bring deleted rows back."""
    frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")
    folder = tmp_path / "table"
    names = ["part-0.parquet", "part-1.parquet", "day=2024-01-01/part 2.parquet"]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frame[number::3].write_parquet(folder / name)
    frame.write_parquet(folder / "part-old.parquet")
    delta(
        folder,
        [{"protocol": {"minReaderVersion": 1}}, {"metaData": {"id": "a", "configuration": {}}}],
        [{"add": {"path": "part-old.parquet"}}, {"add": {"path": names[0]}}],
        [{"remove": {"path": "part-old.parquet"}}, {"add": {"path": names[1]}}, {"commitInfo": {}}],
        [{"add": {"path": "day=2024-01-01/part%202.parquet"}}],
    )
    assert_rows(Interactions.read(folder))
    (folder / names[1]).unlink()
    with pytest.raises(InputError, match=r"part-1.parquet: missing, but the log"):
        Interactions.read(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([[{"add": {"path": "a.parquet", "deletionVector": {"storageType": "u"}}}]], "with deleted rows in files"),
        ([[{"metaData": {"configuration": {"delta.columnMapping.mode": "name"}}}]], "with renamed columns"),
        ([[{"add": {"path": "../a.parquet"}}]], "with files in other folders"),
        ([[{"add": {"path": "/etc/passwd"}}]], "with files in other folders"),
        ([[{"add": {}}]], "not a readable Delta log"),
        ([[{"metaData": {}}]], "without files"),
    ],
)
def test_delta_tables_that_need_more_than_names_are_refused(tmp_path: Path, entries: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Interactions.read(delta(tmp_path / "table", *entries))
    (tmp_path / "table" / "_delta_log" / "00000000000000000010.checkpoint.parquet").touch()
    with pytest.raises(InputError, match="with checkpoints in its log"):
        Interactions.read(tmp_path / "table")


@pytest.mark.parametrize("rows", [ROWS, ROWS * 500])
def test_a_file_rewritten_with_its_size_and_time_is_read_again(tmp_path: Path, monkeypatch, rows: list) -> None:
    monkeypatch.setattr("twotower.data.io.folders.SAMPLED_BYTES", 100_000)  # the larger file is sampled
    first = read(tmp_path, table(rows=rows))
    path = tmp_path / "a.csv"
    before, content = path.stat(), path.read_bytes()
    assert (len(content) > 100_000) == (rows is not ROWS)
    path.write_bytes(content[:-20] + content[-20:].replace(b"i4", b"i3"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = Interactions.read(path)
    assert path.stat().st_size == before.st_size and again.fingerprint != first.fingerprint


def test_dat_files(tmp_path: Path) -> None:
    rows = [(n % 7, n % 5, 3, t) for n, (_, _, t) in enumerate(ROWS)]
    movies = tmp_path / "movies.dat"
    movies.write_bytes("".join(f"{n}::Café {n}::Drama|Comedy\n" for n in range(5)).encode("latin-1"))
    data = read(tmp_path, "".join("::".join(map(str, row)) + "\n" for row in rows), "ratings.dat", items=movies)
    assert len(data) == len(rows) and data.account.count("no header") == 1
    assert data.item_table["title"][1] == "Café 1"
    assert_rows(read(tmp_path, table("::"), "named.dat"))
    with pytest.raises(InputError, match="no header, and 2 columns with unknown meaning"):
        read(tmp_path, "1::2\n3::4\n", "pairs.dat")


def test_ids_of_databases(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1, 2], "item": [b"a", b"b"]}).with_columns(pl.col("user").cast(pl.Decimal(38, 0)))
    data = Interactions.from_frame(frame)
    assert data.queries.ids.to_list() == [1, 2] and data.items.ids.to_list() == ["a", "b"]
    with pytest.raises(InputError, match="Decimal"):
        Interactions.from_frame({"user": [Decimal("1.5"), Decimal(2)], "item": [1, 2]})
    with pytest.raises(InputError, match=r"above 2\^63"):
        Interactions.from_frame({"user": [Decimal(2**70), Decimal(2)], "item": [1, 2]})


def test_frames_with_other_names_and_numbers() -> None:
    frame = pd.DataFrame({0: [1, 2], 1: [3, 4]})
    assert len(Interactions.from_frame(frame, columns={"query": 0, "item": 1})) == 2
    large = pl.DataFrame({"user": [1, 2], "item": [3, 4], "time": pl.Series([2**64 - 1, 5], dtype=pl.UInt64)})
    with pytest.raises(InputError, match=r"'time', row 1: timestamp 18446744073709551615; expected unix time"):
        Interactions.from_frame(large)
    with pytest.raises(InputError, match="'__row' is reserved"):
        Interactions.from_frame({"user": [1], "item": [2], "__row": [3]})
    assert {"Interactions", "fit", "data"} <= set(dir(tt))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_records_do_not_depend_on_the_blocks(size: int) -> None:
    text = 'a,b\n"x\n""y""",2\n 3 ,"4"\n\n5,\n"6,7",8'
    blocks = iter([text[at : at + size] for at in range(0, len(text), size)])
    found = [fields for fields, _ in records(blocks, ",", backslash=False)]
    assert found == [["a", "b"], ['x\n"y"', "2"], [" 3 ", "4"], [""], ["5", ""], ["6,7", "8"]]


@pytest.mark.parametrize("size", [4, 5, 8, 1 << 20])
def test_lines_are_counted_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("twotower.data.io.text_format.BLOCK_BYTES", size)
    path = tmp_path / "a.csv"
    for content, expected in (
        ('a,b\n"x\n""y""",2\n3,"4"\n5,6', (4, 1, True)),
        ('a,b\n"x"y,2\n', (2, 0, False)),
        ('a,b\n1,x"\n2,"', (2, 1, False)),
        ("a,b\r\n1,2\r\n", (2, 0, True)),
    ):
        path.write_text(content, newline="")
        found = count_lines(path, ",", quoted=True)
        assert found.valid == expected[2]
        if found.valid:
            assert (found.outside, found.inside) == expected[:2]
    assert np.frombuffer(UNIT.encode(), dtype=np.uint8).tolist() == [31]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("log.jsonl", r"polars\.read_ndjson\(FILE\)\.write_parquet"),
        ("log.ndjson.gz", r"polars\.read_ndjson"),
        ("log.json", r"polars\.read_json\("),
        ("log.feather", r"polars\.read_ipc"),
        ("Sales 2024.XLSX", "Export the sheet as CSV"),
        ("log.zip", "Unpack the file; only gzip is read as is"),
        ("log.csv.zst", "Unpack the file"),
        ("log.sqlite", r"\(also \.csv\.gz\)\.$"),
    ],
)
def test_other_formats_say_how_to_convert_them(tmp_path: Path, name: str, advice: str) -> None:
    with pytest.raises(InputError, match=f"unknown format .*{advice}"):
        read(tmp_path, b"PK\x03\x04", name)


NESTED = {"query": "user.id", "item": "event.item.sku", "timestamp": "event.at"}


@pytest.mark.parametrize("kind", ["file", "polars", "pandas"])
def test_fields_of_nested_columns_are_columns(tmp_path: Path, kind: str) -> None:
    """As JSON lines become with read_ndjson: a struct in a struct."""
    records_ = [{"user": {"id": q, "age": 3}, "event": {"item": {"sku": i}, "at": t}} for q, i, t in ROWS]
    frame = pl.DataFrame(records_)
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(5)], "meta": [{"title": f"Item {n}"} for n in range(5)]})
    if kind == "file":
        frame.write_parquet(tmp_path / "a.parquet")
        data = Interactions.read(tmp_path / "a.parquet", columns=NESTED, items=items)
    else:
        data = Interactions.from_frame(
            frame if kind == "polars" else pd.DataFrame(records_), columns=NESTED, items=items
        )
    assert_rows(data)
    assert data.item_table["meta.title"].to_list() == [f"Item {n}" for n in range(5)]
    with pytest.raises(InputError, match=r"Columns found: 'user\.id', 'user\.age', 'event\.item\.sku', 'event\.at'"):
        Interactions.from_frame(frame)
    frame = frame.with_columns(pl.lit(1).alias("user.id"))
    frame.write_parquet(tmp_path / "b.parquet")
    for refused in (lambda: Interactions.from_frame(frame), lambda: Interactions.read(tmp_path / "b.parquet")):
        with pytest.raises(InputError, match="duplicate column"):
            refused()
