"""Reading in every format, compared with plain Python loops; saved data and the cache."""

import errno
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.slow_reference import Row, as_sequences, sequences
from twotower.data import Interactions
from twotower.data.io.layout import META
from twotower.data.prepare import bucket_sort
from twotower.errors import InputError

SECOND = 1_000_000


def some_rows(n: int = 300, text: bool = False, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    mark = (lambda x: f"k{x}") if text else (lambda x: x)
    return [(mark(rng.randint(5, 30)), mark(rng.randint(100, 140)), rng.randint(0, 9) * SECOND) for _ in range(n)]


def frame_of(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(
        {"user_id": [r[0] for r in rows], "item_id": [r[1] for r in rows], "timestamp": [r[2] // SECOND for r in rows]}
    )


def write_as(frame: pl.DataFrame, kind: str, folder: Path) -> Path:
    if kind == "parquet":
        frame.write_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    if kind == "csv":
        frame.write_csv(folder / "a.csv")
        return folder / "a.csv"
    if kind == "csv.gz":
        (folder / "a.csv.gz").write_bytes(gzip.compress(frame.write_csv().encode()))
        return folder / "a.csv.gz"
    if kind == "inter":
        text = frame.write_csv(separator="\t").replace(
            "user_id\titem_id\ttimestamp", "user_id:token\titem_id:token\ttimestamp:float"
        )
        (folder / "a.inter").write_text(text)
        return folder / "a.inter"
    shards = folder / "shards"
    shards.mkdir()
    for i, part in enumerate(frame.iter_slices(70)):
        part.write_parquet(shards / f"part-{i:03d}.parquet")
    return shards


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "inter", "shards"])
@pytest.mark.parametrize("text", [False, True])
def test_every_format_matches_the_loops(tmp_path: Path, kind: str, text: bool) -> None:
    rows = some_rows(text=text)
    data = Interactions.read(write_as(frame_of(rows), kind, tmp_path))
    assert as_sequences(data) == sequences(rows)
    assert data.queries.ids.to_list() == sorted({r[0] for r in rows})
    assert data.items.ids.to_list() == sorted({r[1] for r in rows})
    assert (data.offsets.dtype, data.item_codes.dtype, data.timestamps.dtype) == (np.int64, np.int32, np.int64)
    assert data.account.count("duplicates") == len(rows) - len(data) > 0


@pytest.mark.parametrize("bucket", [1, 7, 50])
def test_many_small_buckets_and_chunks_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int
) -> None:
    rows = some_rows(500)
    path = write_as(frame_of(rows), "parquet", tmp_path)
    monkeypatch.setattr(bucket_sort, "BUCKET_ROWS", bucket)
    monkeypatch.setattr("twotower.data.io.readers.CHUNK_ROWS", 33)
    data = Interactions.read(path)
    monkeypatch.undo()
    assert as_sequences(data) == sequences(rows)
    assert data.fingerprint == Interactions.from_frame(frame_of(rows)).fingerprint


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4), st.integers(-4, 4)), min_size=2, max_size=40))
def test_any_rows_are_sorted_like_the_loops(rows: list[Row]) -> None:
    if len({r[1] for r in rows}) < 2:
        return
    frame = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")
    scaled = [(q, i, t * SECOND) for q, i, t in rows]
    assert as_sequences(Interactions.from_frame(frame)) == sequences(scaled)


@pytest.mark.parametrize("make", [lambda f: f, lambda f: f.lazy(), lambda f: f.to_pandas(), lambda f: f.to_arrow()])
def test_frames_of_all_libraries(make: Any) -> None:
    rows = some_rows(text=True)
    assert as_sequences(Interactions.from_frame(make(frame_of(rows)))) == sequences(rows)


def test_pandas_dates_and_text() -> None:
    frame = pd.DataFrame({"user": ["b", "a"], "item": ["x", "y"], "time": pd.to_datetime(["2020-01-02", "2020-01-01"])})
    data = Interactions.from_frame(frame)
    assert data.timestamps is not None
    assert data.timestamps.tolist() == [1_577_836_800 * SECOND, 1_577_923_200 * SECOND]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([1_577_836_800, 1], [1_577_836_800 * SECOND, SECOND]),
        ([1_577_836_800_000, 1], [1_577_836_800 * SECOND, 1000]),
        ([1_577_836_800_000_000, 1], [1_577_836_800 * SECOND, 1]),
        ([0.5, 1.25], [500_000, 1_250_000]),
        (["2020-01-01", "2020-01-01 00:00:01"], [1_577_836_800 * SECOND, 1_577_836_801 * SECOND]),
        (["2020-01-01T02:00:00+02:00", "2020-01-01T00:00:01.5Z"], [1_577_836_800 * SECOND, 1_577_836_801_500_000]),
        (["1577836800", "1.5"], [1_577_836_800 * SECOND, 1_500_000]),
    ],
)  # fmt: skip
def test_units_of_time(times: list[Any], expected: list[int]) -> None:
    data = Interactions.from_frame(pl.DataFrame({"user": [1, 2], "item": [1, 2], "time": times}))
    assert data.timestamps is not None
    assert data.timestamps.tolist() == expected


def test_without_timestamps_row_order_is_time_and_repeats_stay() -> None:
    data = Interactions.from_frame(pl.DataFrame({"user": [2, 1, 2, 2], "item": [9, 8, 7, 9]}))
    assert data.timestamps is None
    assert as_sequences(data) == {1: [(8, 0)], 2: [(9, 0), (7, 0), (9, 0)]}
    assert "row order is taken as time order" in str(data.account)


def test_ids_in_text_files_stay_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item\n007,1\n7,2\n")
    data = Interactions.read(tmp_path / "a.csv")
    assert data.queries.ids.to_list() == ["007", "7"]
    assert data.items.ids.to_list() == [1, 2]


def test_text_shards_of_integers_and_of_text_become_text(tmp_path: Path) -> None:
    (tmp_path / "p1.csv").write_text("user,item\n1,10\n1,9\n")
    (tmp_path / "p2.csv").write_text("user,item\n1,A1\n")
    assert as_sequences(Interactions.read(tmp_path)) == {1: [("10", 0), ("9", 0), ("A1", 0)]}


def test_lists_of_items_and_columns_of_the_query() -> None:
    frame = pl.DataFrame({"user_id": [5, 3, 4], "items": [[1, 2, 1], [2], []], "validation_user": [True, False, None]})
    data = Interactions.from_frame(frame)
    assert as_sequences(data) == {3: [(2, 0)], 5: [(1, 0), (2, 0), (1, 0)]}
    assert data.query_table is not None
    assert data.query_table.to_dict(as_series=False) == {"user_id": [3, 5], "validation_user": [False, True]}
    assert data.account.count("empty lists") == 1


def test_lists_of_times_are_expanded_with_the_items() -> None:
    frame = pl.DataFrame({"user": [1, 2], "items": [["a", "b"], ["a"]], "timestamps": [[9, 3], [5]]})
    assert as_sequences(Interactions.from_frame(frame)) == {
        1: [("b", 3 * SECOND), ("a", 9 * SECOND)],
        2: [("a", 5 * SECOND)],
    }


def test_lines_of_items_with_and_without_gaps(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("7 1 2 3\n5 2\n6\n\n")
    (tmp_path / "gaps.txt").write_text("7 1 2 3\t0 60 5\n5 2\t0\n")
    expected = {7: [(1, 0), (2, 0), (3, 0)], 5: [(2, 0)]}
    assert as_sequences(Interactions.read(tmp_path / "plain.txt")) == expected
    gaps = Interactions.read(tmp_path / "gaps.txt")
    assert as_sequences(gaps) == expected
    assert "no origin" in str(gaps.account)


def test_weights_labels_groups_follow_their_rows() -> None:
    frame = pl.DataFrame({"user": [2, 1, 2], "item": [1, 2, 3], "time": [5, 1, 2]}).with_columns(
        weight=pl.Series([0.0, 1.5, 2]), rating=pl.Series([1, 2, 3]), market=pl.Series(["b", "a", "a"])
    )
    data = Interactions.from_frame(frame)
    assert data.weights is not None
    assert data.labels is not None
    assert data.groups is not None
    assert data.group_names is not None
    assert (data.weights.tolist(), data.labels.tolist()) == ([1.5, 2, 0], [2, 3, 1])
    assert data.group_names.decode(data.groups).to_list() == ["a", "a", "b"]
    assert "labels ignored" in str(data.account)


def test_positive_label_separates_negatives() -> None:
    frame = pl.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3], "time": [1, 2, 3], "rating": [5, 2, 3]})
    data = Interactions.from_frame(frame, positive_label=4)
    assert as_sequences(data) == {1: [(1, SECOND)]}
    assert data.negatives is not None
    assert as_sequences(data.negatives) == {1: [(2, 2 * SECOND)], 2: [(3, 3 * SECOND)]}
    assert data.negatives.labels is not None
    assert data.negatives.labels.tolist() == [2, 3]
    assert (data.account.count("negatives"), data.account.count("queries without a positive")) == (2, 1)
    assert Interactions.from_frame(frame, positive_label=1).negatives is None


def test_tables_join_by_id_and_the_catalog_may_grow() -> None:
    frame = pl.DataFrame({"user": [1, 1], "movie_id": [30, 10]})
    movies = pl.DataFrame({"movie_id": [20, 10], "title": ["b", "a"]})
    users = pl.DataFrame({"user": ["1"], "age": [33]})
    data = Interactions.from_frame(frame, items=movies, queries=users)
    assert data.item_table is not None
    assert data.query_table is not None
    assert data.item_table.rows() == [(10, "a"), (30, None)]
    assert data.query_table.rows() == [(1, 33)]
    assert data.account.count("item ids without features") == data.account.count("item table rows unused") == 1
    grown = Interactions.from_frame(frame, items=movies, catalog="table")
    assert grown.items.ids.to_list() == [10, 20, 30]
    assert grown.item_counts().tolist() == [1, 0, 1]


def test_counts_codes_and_select() -> None:
    data = Interactions.from_frame(frame_of(some_rows()))
    codes = data.query_codes()
    assert [int(np.searchsorted(data.offsets, r, side="right")) - 1 for r in range(len(data))] == codes.tolist()
    plain = [0] * data.num_items
    for item in data.item_codes:
        plain[item] += 1
    assert data.item_counts().tolist() == plain
    mask = np.random.default_rng(0).random(len(data)) < 0.4
    for rows in (mask, np.flatnonzero(mask)):
        part = data.select(rows)
        assert part.item_codes.tolist() == data.item_codes[mask].tolist()
        assert part.query_codes().tolist() == codes[mask].tolist()
        assert part.fingerprint != data.fingerprint
    assert data.select(np.ones(len(data), dtype=bool)).fingerprint == data.fingerprint
    for wrong in (np.ones(3, dtype=bool), np.array([2, 1]), np.array([0, len(data)])):
        with pytest.raises(ValueError, match=r"mask|ascend"):
            data.select(wrong)


def test_save_and_open_are_the_same_and_memory_mapped(tmp_path: Path) -> None:
    frame = frame_of(some_rows()).with_columns(rating=pl.int_range(300) % 5, market=pl.lit("x"), weight=pl.lit(2.0))
    data = Interactions.from_frame(
        frame, items=pl.DataFrame({"item_id": [100, 101], "title": ["a", "b"]}), positive_label=2
    )
    data.save(tmp_path / "saved")
    again = Interactions.open(tmp_path / "saved")
    assert isinstance(again.item_codes, np.memmap)
    assert as_sequences(again) == as_sequences(data)
    assert again.negatives is not None
    assert data.negatives is not None
    assert as_sequences(again.negatives) == as_sequences(data.negatives)
    assert again.item_table is not None
    assert again.item_table.equals(data.item_table)  # type: ignore[arg-type]
    assert again.fingerprint == data.fingerprint
    assert again.known_fingerprint is not None
    assert str(again.account) == str(data.account)
    again.known_fingerprint = None
    assert again.fingerprint == data.fingerprint, "the stored fingerprint equals the one computed from the content"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert as_sequences(Interactions.read(tmp_path / "saved")) == as_sequences(data)


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="no saved data set"):
        Interactions.from_frame(frame_of(some_rows())).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_the_cache_is_used_until_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_as(frame_of(some_rows()), "csv", tmp_path)
    first = Interactions.read(path)
    with monkeypatch.context() as patched:
        patched.setattr("twotower.data.prepare.cache.build", lambda *a, **k: pytest.fail("read again"))
        assert Interactions.read(path).fingerprint == first.fingerprint
    path.write_text(path.read_text() + "5,100,77\n")
    assert Interactions.read(path).fingerprint != first.fingerprint
    assert Interactions.read(path, columns={"timestamp": None, "label": "timestamp"}).labels is not None


def test_a_damaged_cache_is_prepared_again(tmp_path: Path) -> None:
    path = write_as(frame_of(some_rows()), "csv", tmp_path)
    first = Interactions.read(path, cache=tmp_path / "cache")
    (tmp_path / "cache" / "item_codes.npy").write_bytes(b"short")
    assert Interactions.read(path, cache=tmp_path / "cache").fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["item_codes.npy", "offsets.npy", "items.parquet", META])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damaged_saved_data_is_refused_by_name(tmp_path: Path, name: str, harm: str) -> None:
    Interactions.from_frame(frame_of(some_rows())).save(tmp_path / "saved")
    file = tmp_path / "saved" / name
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        file.unlink()
    with pytest.raises(InputError, match=name.split(".", maxsplit=1)[0]):
        Interactions.open(tmp_path / "saved")


def test_another_layout_is_refused(tmp_path: Path) -> None:
    Interactions.from_frame(frame_of(some_rows())).save(tmp_path / "saved")
    meta = json.loads((tmp_path / "saved" / META).read_text())
    (tmp_path / "saved" / META).write_text(json.dumps({**meta, "layout": 99}))
    (tmp_path / "saved" / "SHA256SUMS").unlink()  # as in older versions
    with pytest.raises(InputError, match="layout version 99"):
        Interactions.open(tmp_path / "saved")


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_as(frame_of(some_rows()), "csv", tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bucket_sort.ColumnFile, "append", full)
    with pytest.raises(InputError, match="disk is full"):
        Interactions.read(path, cache=tmp_path / "cache" / "here")
    assert not list((tmp_path / "cache").iterdir())


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("1 5 6\r\n")
    (tmp_path / "a.txt").write_text("1 7\r\n2 5\r\n")
    data = Interactions.read([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert as_sequences(data) == {1: [(5, 0), (6, 0), (7, 0)], 2: [(5, 0)]}
