"""From raw rows to sorted codes in bounded memory: three passes over temporary files, one bucket of rows at a time.

1. Each chunk is read, checked, and coded against its own distinct ids; the codes go to disk.
2. The distinct ids of all chunks make the vocabulary; every chunk is recoded and dealt out into buckets of
   neighbouring queries.
3. Each bucket is sorted by query and time, duplicates are dropped, and the columns are appended to the final files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.cleaning import MICROSECONDS, Rows, unit_of
from twotower.data.storing import ColumnFile
from twotower.errors import InputError
from twotower.schema import Vocabulary

BUCKET_ROWS = 8_000_000
SIDES = ("queries", "items", "groups")
BUCKET_DTYPES: dict[str, Any] = {
    "queries": np.int32,
    "items": np.int32,
    "times": np.int64,
    "weights": np.float32,
    "labels": np.float32,
    "groups": np.int32,
    "arrival": np.int64,
}
FINAL_NAMES = {
    "items": "item_codes",
    "times": "timestamps",
    "weights": "weights",
    "labels": "labels",
    "groups": "groups",
}


def local_codes(ids: pl.Series) -> tuple[pl.Series, NDArray[np.int32]]:
    """The distinct ids in ascending order, and each row's position among them."""
    if ids.dtype == pl.Int64:
        values = ids.to_numpy()
        low, high = int(values.min()), int(values.max())
        if high - low < 4 * len(values) + 1024:  # ids are nearly dense: a table is faster than sorting
            seen = np.zeros(high - low + 1, dtype=bool)
            seen[values - low] = True
            table = np.cumsum(seen, dtype=np.int32) - np.int32(1)
            return pl.Series("id", np.flatnonzero(seen) + low, dtype=pl.Int64), table[values - low]
    distinct = ids.unique().sort().alias("id")
    return distinct, Vocabulary(distinct).encode(ids).astype(np.int32)


@dataclass
class Collected:
    """What the first pass leaves: codes of each chunk on disk, its distinct ids in memory.

    Args:
        directory: where temporary files go.
        text: whether ids came from text files, where integers and text may mix.
    """

    directory: Path
    chunk_rows: list[int] = field(default_factory=list)
    distinct: dict[str, list[pl.Series]] = field(default_factory=lambda: {side: [] for side in SIDES})
    origin: dict[str, list[tuple[str, bool]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    columns: set[str] = field(default_factory=set)
    calendar: bool | None = None
    largest_time: float = 0.0
    empty_lists: int = 0

    @property
    def rows(self) -> int:
        """Rows so far."""
        return sum(self.chunk_rows)

    def add(self, rows: Rows, where: str, text: bool) -> None:
        """Take one chunk's rows.

        Raises:
            InputError: dates in one file and numbers in another.
        """
        self.empty_lists += rows.empty_lists
        if not len(rows.queries):
            return
        chunk, before = len(self.chunk_rows), self.rows
        self.chunk_rows.append(len(rows.queries))
        for side in SIDES:
            ids: pl.Series | None = getattr(rows, side)
            if ids is not None:
                distinct, codes = local_codes(ids)
                self.distinct[side].append(distinct)
                self.origin[side].append((where, text))
                self._save(chunk, side, codes)
        if rows.times is not None:
            if self.calendar not in (None, rows.calendar):
                raise InputError(
                    f"{where}: timestamps are {'dates' if rows.calendar else 'numbers'}, those before it "
                    f"{'numbers' if rows.calendar else 'dates'}; write them in one way."
                )
            self.calendar = rows.calendar
            self.largest_time = max(self.largest_time, float(np.abs(rows.times.astype(np.float64)).max()))
            self._save(chunk, "times", rows.times)
        for name in ("weights", "labels"):
            values = getattr(rows, name)
            if values is not None:
                self._save(chunk, name, values)
        if rows.context is not None:  # rows are sorted as numbers; where each came from tells its context in the end
            self._save(chunk, "arrival", np.arange(before, before + len(rows.queries)))
            rows.context.write_parquet(self.directory / f"{chunk}.context.parquet")

    def context(self) -> pl.DataFrame:
        """The further columns of all chunks, in the order of arrival.

        Raises:
            InputError: a column is of another kind in a later file.
        """
        parts = [pl.read_parquet(self.directory / f"{chunk}.context.parquet") for chunk in range(len(self.chunk_rows))]
        try:
            return pl.concat(parts, how="vertical_relaxed", rechunk=True)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"context: a column is of another kind in a later file ({reason}).") from None

    def _save(self, chunk: int, name: str, values: NDArray[Any]) -> None:
        self.columns.add(name)
        np.save(self.directory / f"{chunk}.{name}.npy", values, allow_pickle=False)

    def load(self, chunk: int, name: str) -> NDArray[Any]:
        """A chunk's column, whose temporary file is gone afterwards."""
        path = self.directory / f"{chunk}.{name}.npy"
        values: NDArray[Any] = np.load(path, allow_pickle=False)
        path.unlink()
        return values

    def vocabulary(self, side: str, column: str, extra: pl.Series | None = None) -> Vocabulary:
        """The ids of one side, ascending, with `extra` ones of a feature table.

        Raises:
            InputError: integers in one file and text in another, where the files carry types.
        """
        parts = self.distinct[side]
        if len({part.dtype for part in parts}) > 1:
            first = self.origin[side][0]
            other = next(o for o, part in zip(self.origin[side], parts, strict=True) if part.dtype != parts[0].dtype)
            if not (first[1] and other[1]):
                raise InputError(
                    f"{other[0]}: column {column!r} is of mixed types: integers here and text in {first[0]} or the "
                    "other way round; write the ids as one type."
                )
            # Text files: integers stand as they were written, so that turning them back into text loses nothing.
            parts = self.distinct[side] = [part.cast(pl.String) for part in parts]
        if extra is not None:
            parts = [*parts, extra.cast(parts[0].dtype).alias("id")]
        return Vocabulary(pl.concat(parts).unique().sort())


@dataclass
class Finished:
    """What the last pass leaves beside the files: counts and digests."""

    offsets: NDArray[np.int64]
    negative_offsets: NDArray[np.int64]
    duplicates: int
    digests: dict[str, str]
    negative_digests: dict[str, str]
    arrival: NDArray[np.int64] | None = None


def finish(
    collected: Collected,
    *,
    vocabularies: dict[str, Vocabulary],
    positive_label: float | None,
    directory: Path,
    negative_directory: Path,
    where: str,
) -> Finished:
    """Passes two and three; writes the columns into `directory`, rows below `positive_label` into the other one."""
    scale = MICROSECONDS[unit_of(collected.largest_time, where)] if collected.calendar is False else 1
    names = [name for name in BUCKET_DTYPES if name in collected.columns]
    num_queries = len(vocabularies["queries"])
    maps = {
        side: [vocabularies[side].encode(part).astype(np.int32) for part in collected.distinct[side]]
        for side in SIDES
        if side in vocabularies
    }
    counts = np.zeros(num_queries, dtype=np.int64)
    for chunk in range(len(collected.chunk_rows)):
        codes = np.load(collected.directory / f"{chunk}.queries.npy", mmap_mode="r")
        counts[maps["queries"][chunk]] += np.bincount(codes, minlength=len(maps["queries"][chunk]))
    ends = np.cumsum(counts)
    bucket_of = ((ends - 1) // BUCKET_ROWS).astype(np.uint16)
    num_buckets = int(bucket_of[-1]) + 1
    fills = np.zeros(num_buckets + 1, dtype=np.int64)
    np.add.at(fills, bucket_of.astype(np.int64) + 1, counts)
    starts = np.cumsum(fills)
    _deal(collected, names=names, maps=maps, bucket_of=bucket_of, starts=starts, scale=scale)

    finals = [name for name in names if name not in ("queries", "arrival")]
    arrival: list[NDArray[np.int64]] = []
    kept: dict[str, ColumnFile] = {}
    below: dict[str, ColumnFile] = {}
    try:
        for name in finals:
            kept[name] = ColumnFile(directory, FINAL_NAMES[name])
            if positive_label is not None and "labels" in names:
                below[name] = ColumnFile(negative_directory, FINAL_NAMES[name])
        positive_counts = np.zeros(num_queries, dtype=np.int64)
        negative_counts = np.zeros(num_queries, dtype=np.int64)
        duplicates = 0
        for bucket in _sorted_buckets(collected.directory, names, starts):
            duplicates += bucket.pop("dropped")
            chosen: Any = slice(None)
            if below:
                chosen = bucket["labels"] >= positive_label
                _count(negative_counts, bucket["queries"][~chosen])
            _count(positive_counts, bucket["queries"][chosen])
            if "arrival" in names:
                arrival.append(bucket["arrival"][chosen])
            for name in finals:
                kept[name].append(bucket[name][chosen])
                if below:
                    below[name].append(bucket[name][~chosen])
        digests = {FINAL_NAMES[name]: column.close() for name, column in kept.items()}
        negative_digests = {FINAL_NAMES[name]: column.close() for name, column in below.items()}
    finally:
        for column in (*kept.values(), *below.values()):
            column.abandon()
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(positive_counts)])
    negative_offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(negative_counts)])
    return Finished(
        offsets,
        negative_offsets,
        duplicates,
        digests,
        negative_digests,
        np.concatenate(arrival) if arrival else None,
    )


def _count(totals: NDArray[np.int64], codes: NDArray[np.int32]) -> None:
    if len(codes):
        low = int(codes[0])  # codes of a bucket are sorted and neighbouring
        found = np.bincount(codes - low)
        totals[low : low + len(found)] += found


def _deal(
    collected: Collected,
    *,
    names: list[str],
    maps: dict[str, list[NDArray[np.int32]]],
    bucket_of: NDArray[np.uint16],
    starts: NDArray[np.int64],
    scale: int,
) -> None:
    """Write every chunk's rows to their buckets, in the order of arrival."""
    cursor = starts[:-1].copy()
    streams = {name: (collected.directory / f"{name}.bin").open("wb") for name in names}
    try:
        for chunk in range(len(collected.chunk_rows)):
            queries = maps["queries"][chunk][collected.load(chunk, "queries")]
            buckets = bucket_of[queries]
            order = np.argsort(buckets, kind="stable") if len(cursor) > 1 else None
            sizes = np.bincount(buckets, minlength=len(cursor))
            cuts = np.concatenate([[0], np.cumsum(sizes)])
            for name in names:
                values = queries if name == "queries" else collected.load(chunk, name)
                if name in ("items", "groups"):
                    values = maps[name][chunk][values]
                elif name == "times":
                    values = _microseconds(values, scale)
                values = values.astype(BUCKET_DTYPES[name], copy=False)
                if order is not None:
                    values = values[order]
                for b in np.flatnonzero(sizes):
                    streams[name].seek(int(cursor[b]) * values.itemsize)
                    streams[name].write(np.ascontiguousarray(values[cuts[b] : cuts[b + 1]]).data)
            cursor += sizes
    finally:
        for stream in streams.values():
            stream.close()


def _microseconds(values: NDArray[Any], scale: int) -> NDArray[np.int64]:
    if values.dtype == np.int64:
        return values * np.int64(scale)
    return np.asarray(np.rint(values * float(scale)), dtype=np.int64)


def _sorted_buckets(directory: Path, names: list[str], starts: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The buckets one after the other, sorted and without duplicates; ``dropped`` counts those."""
    for low, high in pairwise(starts.tolist()):
        if low == high:
            continue
        bucket: dict[str, Any] = {}
        for name in names:
            dtype = np.dtype(BUCKET_DTYPES[name])
            bucket[name] = np.fromfile(
                directory / f"{name}.bin", dtype=dtype, count=int(high - low), offset=int(low) * dtype.itemsize
            )
        order = _order(bucket["queries"], bucket.get("times"))
        for name in names:
            bucket[name] = bucket[name][order]
        dropped = _duplicates(bucket["queries"], bucket["items"], bucket.get("times"))
        if dropped.size:
            for name in names:
                bucket[name] = np.delete(bucket[name], dropped)
        bucket["dropped"] = int(dropped.size)
        yield bucket


def _order(queries: NDArray[np.int32], times: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The stable order by query, then time."""
    if times is None:
        return np.argsort(queries, kind="stable")
    low, span = int(times.min()), int(times.max()) - int(times.min()) + 1
    first = int(queries.min())
    if (int(queries.max()) - first + 1) * span < 2**62:  # one key sorts faster than two
        return np.argsort((queries - first).astype(np.int64) * span + (times - low), kind="stable")
    return np.lexsort((times, queries))


def _duplicates(
    queries: NDArray[np.int32], items: NDArray[np.int32], times: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Positions of rows that repeat an earlier (query, item, time); none without times, where order is the time."""
    if times is None or len(queries) < 2:
        return np.zeros(0, dtype=np.int64)
    same = (queries[1:] == queries[:-1]) & (times[1:] == times[:-1])
    if not same.any():
        return np.zeros(0, dtype=np.int64)
    moment = np.concatenate([[0], np.cumsum(~same)])  # rows of one query and time share a number
    tied = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
    order = np.lexsort((items[tied], moment[tied]))
    tied = tied[order]
    repeats = (moment[tied][1:] == moment[tied][:-1]) & (items[tied][1:] == items[tied][:-1])
    return np.sort(tied[1:][repeats])
