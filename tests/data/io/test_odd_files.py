"""Files that are no tables, or tables in which something went wrong: refused by what they are, in bounded time."""

import gzip
import os
import sqlite3
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from twotower.config.messages import MOST_YAML, parse_yaml
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.io import readers, text_format
from twotower.data.io.id_lists import read_ids, read_items
from twotower.data.io.judgements import read_qrels, read_queries
from twotower.data.io.readers import open_source
from twotower.data.io.text_format import HEAD_BYTES, refuse_repeated
from twotower.data.loading.batches import TrainingBatches
from twotower.errors import InputError

START = 1_704_070_800
ROWS = [(f"u{n % 7}", f"i{n % 5}", START + 3600 * n) for n in range(35)]
FRAME = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")
TABLE = FRAME.write_csv()
#: Names that are patterns, addresses, options or home directories elsewhere.
NAMES = ["-n", "~", "$HOME", "%20", "a\nb", "*", "[!a]", "file:a", "{a,b}", "a#b?c=d"]


def refusal(path: Path, content: bytes | str, **options) -> str:
    """Return the message for a file, which has to be short and of one or two lines."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        Interactions.read(path, **options)
    message = str(caught.value)
    assert len(message) < 1000 and message.count("\n") < 2
    return message


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_is_found_by_its_exact_name(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    files = {suffix: Path(name + suffix) for suffix in (".csv", ".parquet", ".txt", ".csv.gz", ".yaml")}
    files[".csv"].write_text(TABLE)
    files[".csv.gz"].write_bytes(gzip.compress(TABLE.encode()))
    files[".txt"].write_text("1 5 6\n2 6 5\n")
    files[".yaml"].write_text("training: {max_epochs: 7}\n")
    with files[".parquet"].open("wb") as stream:
        FRAME.write_parquet(stream)
    for suffix in (".csv", ".csv.gz", ".parquet"):
        assert Interactions.read(files[suffix]).account.count("rows read") == len(ROWS)
    assert len(Interactions.read(files[".txt"])) == 4
    assert Config.load(files[".yaml"]).training.max_epochs == 7
    items = Path(f"{name}.items.csv")
    items.write_text("item_id,title\n" + "".join(f"i{n},t{n}\n" for n in range(5)))
    assert Interactions.read([files[".csv"]], items=items).item_table["title"].to_list() == [f"t{n}" for n in range(5)]
    assert read_ids(items).to_list() == [f"i{n}" for n in range(5)]  # --withdraw, --allow @FILE, items --remove @FILE
    assert read_ids(files[".txt"]).to_list() == ["1 5 6", "2 6 5"]


def contents() -> dict[str, tuple[bytes, str]]:
    """Return the beginnings of files of other programs, and what the message calls them."""
    noise = np.random.default_rng(0).bytes(3000)
    with sqlite3.connect(":memory:") as database:
        database.execute("create table a (b)")
        sqlite = database.serialize()
    return {
        "workbook": (b"PK\x03\x04" + noise, "a zip archive or a workbook"),
        "old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(3000), "an old Excel workbook"),
        "zstd": (b"\x28\xb5\x2f\xfd" + noise, "zstd, .*unpack"),
        "lz4": (b"\x04\x22\x4d\x18" + noise, "lz4, .*unpack"),
        "arrow": (b"ARROW1\0\0" + noise, "Arrow or Feather.*read_ipc"),
        "sqlite": (sqlite, "an SQLite database"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + noise, "HDF5"),
        "numpy": (b"\x93NUMPY\x01\0" + noise, "a NumPy array"),
        "orc": (b"ORC" + noise, "ORC"),
        "avro": (b"Obj\x01" + noise, "Avro"),
        "pdf": (b"%PDF-1.7\n" + noise, "PDF"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        "html": (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>\n", "an HTML page"),
        "html in capitals": (b"\xef\xbb\xbf<HTML>\n<BODY>404</BODY>\n", "an HTML page"),
        "json": (b'[\n  {"user_id": 1, "item_id": 2}\n]\n', "JSON.*read_json"),
        "json lines": (b'{ "user_id": 1, "item_id": 2}\n{"user_id": 1, "item_id": 3}\n', "JSON.*read_ndjson"),
        "never completed": (bytes(5000), "only zero bytes"),
    }


@pytest.mark.parametrize("kind", contents())
def test_other_contents_are_named(tmp_path: Path, kind: str) -> None:
    content, message = contents()[kind]
    for name in ("a.csv", "a.parquet", "a.txt", "a.csv.gz"):
        packed = gzip.compress(content) if name.endswith(".gz") else content
        with pytest.raises(InputError, match=message):
            raise InputError(refusal(tmp_path / name, packed))


def test_packed_twice_and_parquet_in_gzip(tmp_path: Path) -> None:
    assert "gzip inside gzip" in refusal(tmp_path / "a.csv.gz", gzip.compress(gzip.compress(TABLE.encode())))
    FRAME.write_parquet(tmp_path / "a.parquet")
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    for name in ("b.parquet", "b.parquet.gz", "b.csv.gz"):
        assert "gzip; unpack it" in refusal(tmp_path / name, packed).replace(", not a table", "").replace(
            "Parquet inside", ""
        )


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """Reading a pipe without a writer waits forever, and /dev/zero never ends."""
    (tmp_path / "a.csv").write_text(TABLE)
    pipes = [tmp_path / name for name in ("p.csv", "p.txt", "p.yaml", "p")]
    for pipe in pipes:
        os.mkfifo(pipe)
    for path in (pipes[0], pipes[1], Path("/dev/zero"), [tmp_path / "a.csv", pipes[0]]):
        with pytest.raises(InputError, match="a pipe or a device, not a file"):
            Interactions.read(path)
    for path in (pipes[0], Path("/dev/zero")):
        with pytest.raises(InputError, match="a pipe or a device, not a file"):
            Interactions.read(tmp_path / "a.csv", items=path)
    for path in (*pipes, Path("/dev/zero")):
        with pytest.raises(InputError, match="a pipe or a device, not a file"):
            read_ids(path)
    for path in (pipes[2], Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match="a folder, a pipe or a device; expected a settings file"):
            Config.load(path)
    assert Interactions.read(tmp_path, columns={"timestamp": "timestamp"}).account.count("rows read") == len(ROWS)


#: Nine lists of ten aliases each, which stand for 10^9 values.
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: " + "[" * 3000, "not valid YAML: the values are nested too deeply"),
        ("#" * (MOST_YAML + 1), "1,048,577 bytes; expected a settings file"),
        ("training:\0 1", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        (BOMB + "training: *a8\n", "not valid YAML: more than 100,000 values, aliases included"),
        (BOMB + "training:\n  max_epochs: *a8\n", "more than 100,000 values"),
        ("training: &a\n  seed: *a\n", "more than 100,000 values"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500)), "more than 100,000"),
    ],
)
def test_settings_that_are_too_much_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        Config.load(tmp_path / "c.yaml")


def test_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("evaluation: {ks: &ks [5, 10]}\nobjective: {name: expected-count}\n")
    assert Config.load(tmp_path / "c.yaml").evaluation.ks == [5, 10]
    text = "x: &x {a: 1}\ny: [*x, *x]\nz: {<<: *x, b: 2}\n"
    assert parse_yaml(text) == {"x": {"a": 1}, "y": [{"a": 1}] * 2, "z": {"a": 1, "b": 2}}


def test_deep_overrides_are_refused() -> None:
    with pytest.raises(InputError, match="the value is not valid YAML") as caught:
        Config.load(None, ["training.max_epochs=" + "[" * 3000])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "line",
    ["a" * 2 * HEAD_BYTES, "," * 2 * HEAD_BYTES, ",".join(f"c{n}" for n in range(100_000)), '"' * 2 * HEAD_BYTES],
)
def test_a_first_line_without_an_end_is_refused(tmp_path: Path, line: str) -> None:
    message = "the first line has more than 262,144 bytes"
    assert message in refusal(tmp_path / "a.csv", line)
    assert message in refusal(tmp_path / "b.csv", f"user_id,item_id,{line}\n1,2\n")
    assert message in refusal(tmp_path / "c.csv.gz", gzip.compress(line.encode()))


def test_many_columns_are_compared_in_linear_time() -> None:
    names = [f"c{n}" for n in range(300_000)]
    refuse_repeated(Path("a.csv"), names)
    with pytest.raises(InputError, match="'c7' occurs twice"):
        refuse_repeated(Path("a.csv"), [*names, "c7"])


def test_a_long_name_is_cut_in_messages(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.csv", "x" * 50_000 + ",y\n1,2\n")
    assert "no query column found" in message and "'y'" in message


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("rows", [ROWS, [(n % 7, n % 5, t) for n, (_, _, t) in enumerate(ROWS)]])
@pytest.mark.parametrize("mark", ["", "\ufeff", " "])
def test_joined_files_are_refused_where_the_header_is_repeated(
    tmp_path: Path, times: bool, rows: list[tuple], mark: str
) -> None:
    frame = pl.DataFrame(rows, schema=FRAME.columns, orient="row")
    text = (frame if times else frame.drop("timestamp")).write_csv()
    assert "row 36 repeats the header; were files concatenated?" in refusal(tmp_path / "a.csv", text + mark + text)


def test_an_id_that_is_the_name_of_its_column_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item\nuser,b\na,item\nb,c\n")
    assert len(Interactions.read(tmp_path / "a.csv")) == 3


@pytest.mark.parametrize("where", [30, 100, 300])
def test_zero_bytes_in_ids_are_refused_with_their_row(tmp_path: Path, where: int) -> None:
    content = TABLE.encode()
    start = content.rfind(b"\n", 0, where) + 2  # within the query id
    row = content[:start].count(b"\n")
    message = refusal(tmp_path / "a.csv", content[:start] + bytes(3) + content[start:])
    assert f"'user_id', row {row}: zero bytes in the query id" in message


def test_byte_order_marks_of_joined_or_repeated_conversions(tmp_path: Path) -> None:
    for name, text, encoding in (("two", "\ufeff\ufeff" + TABLE, "utf-8"), ("wide", "\ufeff" + TABLE, "utf-16")):
        (tmp_path / f"{name}.csv").write_bytes(text.encode(encoding))
        assert len(Interactions.read(tmp_path / f"{name}.csv")) == len(ROWS)
    assert "truncated or damaged UTF-16" in refusal(tmp_path / "odd.csv", TABLE.encode("utf-16")[:-1])


@pytest.mark.parametrize(
    "series",
    [
        pl.Series([2**31 - 1, 0, 1], dtype=pl.Int32).cast(pl.Date),
        pl.Series([-(2**31), 0, 1], dtype=pl.Int32).cast(pl.Date),
        pl.Series([2**63 - 1, 0, 1], dtype=pl.Int64).cast(pl.Datetime("ms")),
        pl.Series([2**54, 0, 1], dtype=pl.Int64).cast(pl.Datetime("ms", "UTC")),
    ],
)
def test_dates_that_microseconds_cannot_hold_are_refused(tmp_path: Path, series: pl.Series) -> None:
    frame = pl.DataFrame({"user": [1, 2, 3], "item": [1, 2, 3], "time": series})
    frame.write_parquet(tmp_path / "a.parquet")
    for read in (lambda: Interactions.read(tmp_path / "a.parquet"), lambda: Interactions.from_frame(frame)):
        with pytest.raises(InputError, match=r"'time', row 1: timestamp -?\d+ (d|ms) since 1970"):
            read()


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])
def test_times_of_every_unit_and_zone_are_the_same_moment(unit: str, zone: str | None) -> None:
    times = pl.Series([START - 1, START, START + 1]).cast(pl.Int64) * {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    frame = pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "time": times.cast(pl.Datetime(unit, zone))})
    found = Interactions.from_frame(frame).timestamps
    assert found.tolist() == [(START + n) * 1_000_000 for n in (-1, 0, 1)]


@pytest.mark.parametrize("value", ["1e39", "-1e39", "1e308", "3.5e38"])
def test_numbers_above_float32_are_refused(tmp_path: Path, value: str) -> None:
    for column in ("weight", "rating"):
        text = TABLE.replace("timestamp\n", f"timestamp,{column}\n").replace("00\n", f"00,{value}\n")
        message = refusal(tmp_path / f"{column}.csv", text, positive_label=1 if column == "rating" else None)
        assert "row 1: " in message and "expected a finite number" in message


@pytest.mark.parametrize("value", ["0", "0.0", "-0.0", "1e-46"])
def test_weights_that_are_all_zero_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(TABLE.replace("timestamp\n", "timestamp,weight\n").replace("00\n", f"00,{value}\n"))
    data = Interactions.read(path)
    with pytest.raises(InputError, match="weights of all training rows are 0"):
        TrainingBatches(data, 8)


@pytest.mark.parametrize("value", ["1", "1e-40", "3e38"])
def test_batches_of_zero_weights_have_finite_weights(tmp_path: Path, value: str) -> None:
    lines = TABLE.splitlines()
    path = tmp_path / "a.csv"
    path.write_text("\n".join([f"{lines[0]},weight", *(f"{line},0" for line in lines[2:]), f"{lines[1]},{value}"]))
    data = Interactions.read(path)
    weights = [float(weight) for one in TrainingBatches(data, 8, drop_last=False) for weight in one.weights]
    assert np.isfinite(weights).all() and sum(weight > 0 for weight in weights) == 1


@pytest.mark.parametrize(
    ("ids", "count"),
    [(["1.23457E+12", "1.23458E+12"], 35), (["12.0", "7.0"], 35), (["1e+5", "x"], 18), (["1.5", "v1.0", "1e5x"], 0)],
)
def test_ids_that_were_floats_are_reported(tmp_path: Path, ids: list[str], count: int) -> None:
    rows = [(ids[n % len(ids)], i, t) for n, (_, i, t) in enumerate(ROWS)]
    (tmp_path / "a.csv").write_text(pl.DataFrame(rows, schema=FRAME.columns, orient="row").write_csv())
    account = Interactions.read(tmp_path / "a.csv").account
    assert ("query ids written as floats" in str(account)) == bool(count)
    if count:
        assert account.count("query ids written as floats") == count


def test_a_panic_of_the_parquet_reader_is_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FRAME.write_parquet(tmp_path / "a.parquet")

    def panics(*_):
        raise pl.exceptions.PanicException("assertion failed: offset + length <= self.length")

    monkeypatch.setattr(readers, "scan_parquet", panics)
    with pytest.raises(InputError, match=r"a.parquet: truncated or damaged file \(assertion failed"):
        Interactions.read(tmp_path / "a.parquet")


def test_flipped_bits_of_parquet_are_read_or_refused(tmp_path: Path) -> None:
    """Parquet has no checksum of all its parts, so some flips change a value; none may end in another exception."""
    path = tmp_path / "a.parquet"
    FRAME.write_parquet(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*rng.integers(len(content), size=40), *range(len(content) - 12, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            Interactions.read(path, workers=1)
        except InputError as error:
            refused += 1
            assert str(error).count("\n") < 2
    assert refused >= 12


@pytest.mark.parametrize("name", ["a.csv.gz", "a.txt.gz"])
@pytest.mark.parametrize("repeated", [b"\n", b"\r", b" ", b"a\n", b"a b\n", b"x", b'"'])
def test_gzip_that_unpacks_to_repeated_bytes_ends_soon(
    name: str, repeated: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_format, "UNPACKED_BYTES", 1 << 19)
    head = b"q1 i1\nq2 i2 i3\n" if name == "a.txt.gz" else TABLE.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(head + repeated * ((1 << 20) // len(repeated))))
    with pytest.raises(InputError, match=rf"{name}: unpacks to more than 200 times its size"):
        list(open_source(path).chunks(open_source(path).columns))


def test_a_table_of_ids_is_far_below_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_format, "UNPACKED_BYTES", 1)
    path = tmp_path / "a.csv.gz"
    rows = "".join(f"user-{row // 20},item-{row % 20},1\n" for row in range(20_000))  # as regular as a table can be
    path.write_bytes(gzip.compress(b"user_id,item_id,rating\n" + rows.encode()))
    assert sum(map(len, open_source(path).chunks(["user_id"]))) == 20_000


def test_parquet_of_one_repeated_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNPACKED_BYTES", 1 << 18)
    path = tmp_path / "a.parquet"
    frame = pl.DataFrame({"user_id": [1], "item_id": [2]}).select(pl.all().repeat_by(1 << 19).explode())
    frame.write_parquet(path, row_group_size=1 << 19)
    with pytest.raises(InputError, match=r"a.parquet: 524,288 rows in [\d,]+ bytes"):
        open_source(path)


@pytest.mark.parametrize(
    ("one", "other", "line"),
    [
        ("caf\u00e9", "cafe\u0301", "item ids that differ only by Unicode form, blanks or invisible characters"),
        ("A1", "A1\u200b", "item ids that differ only by Unicode form, blanks or invisible characters"),
        ("A1", "\ufeffA1", "item ids that differ only by Unicode form, blanks or invisible characters"),
        ("A1", "A1\u00a0", "item ids that differ only by Unicode form, blanks or invisible characters"),
        ("\uff211", "A1", "item ids that differ only by Unicode form, blanks or invisible characters"),
        ("Abc", "abC", "item ids that differ only by case"),
        ("\u00c9t\u00e9", "\u00e9t\u00e9", "item ids that differ only by case"),
        ("A1", "B1", None),
        ("\u00e9", "\u00e8", None),
    ],
)
def test_ids_that_look_alike_are_told(one: str, other: str, line: str | None) -> None:
    frame = pl.DataFrame({"user_id": ["u1", "u1", "u2"], "item_id": [one, other, "z"]})
    data = Interactions.from_frame(frame)
    told = [x for x in data.account.lines if "differ only" in x.label]
    assert len(data.items) == 3, "they are not merged"
    assert [(x.label, x.count) for x in told] == ([] if line is None else [(line, 2)])
    if told:
        assert ascii(one) in told[0].note and ascii(other) in told[0].note


def test_names_that_are_not_utf8_are_refused_before_they_are_read_or_written(tmp_path: Path) -> None:
    """Polars opens only paths in UTF-8; on Linux a name may be any bytes."""
    folder = tmp_path / "d\udcff"
    folder.mkdir()
    FRAME.write_csv(tmp_path / "a.csv")
    FRAME.write_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        for target in (folder / name, tmp_path / f"\udcff{name}"):
            target.write_bytes((tmp_path / name).read_bytes())
            for call in (Interactions.read, open_source, read_ids, read_qrels, read_queries):
                with pytest.raises(InputError, match="the name is not valid UTF-8; rename"):
                    call(target)
            with pytest.raises(InputError, match="the name is not valid UTF-8"):
                Interactions.read(tmp_path / "a.csv", items=target)
    with pytest.raises(InputError, match="the name is not valid UTF-8"):
        Interactions.read(folder)
    with pytest.raises(InputError, match="the name is not valid UTF-8"):
        Interactions.read(tmp_path / "a.csv").save(tmp_path / "s\udcff")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.csv", "a.parquet", "d\udcff", "\udcffa.csv", "\udcffa.parquet"]
    )


def test_a_folder_that_is_not_utf8_is_found_out_from_inside(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "d\udcff"
    folder.mkdir()
    FRAME.write_csv(tmp_path / "a.csv")
    (folder / "a.csv").write_bytes((tmp_path / "a.csv").read_bytes())
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="the name is not valid UTF-8"):
        Interactions.read("a.csv")


def test_a_deep_log_of_a_delta_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_delta_log").mkdir()
    FRAME.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "_delta_log" / "0.json").write_text('{"add":' + "[" * 100_000)
    with pytest.raises(InputError, match=r"0\.json: not a readable Delta log"):
        Interactions.read(tmp_path)


def test_lines_of_queries_and_items_are_no_item_table(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("u1 i1 i2\nu2 i3\n")
    with pytest.raises(InputError, match=r"a\.txt: no header"):
        read_items(tmp_path / "a.txt")
