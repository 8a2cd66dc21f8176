"""External sort of the rows by query and time, in bounded memory, in three passes with temporary files.

1. Read and validate each chunk, encode ids as positions among its distinct ids, and write the codes (chunks.py).
2. Merge the distinct ids of all chunks into the vocabulary, recode every chunk, and distribute its rows to buckets of
   neighbouring queries.
3. Sort each bucket by query and time, drop duplicates, and append the columns to the final files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.data.io.layout import ColumnFile
from twotower.data.io.timestamps import to_microseconds
from twotower.data.prepare.chunks import SIDES, EncodedChunks
from twotower.data.schema.vocabulary import Vocabulary

BUCKET_ROWS = 8_000_000
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


@dataclass
class SortedTable:
    """Results of passes 2 and 3.

    Attributes:
        offsets, negative_offsets: int64 [Q+1], the offsets of the rows of each query.
        duplicates: number of duplicate rows dropped.
        digests, negative_digests: the sha256 of each column written.
        arrival, negative_arrival: int64 [n], the input row of each sorted row; None if there is no context to gather.
        seen: number of codes that occur, for the queries and the sides without a vocabulary.
        unit: the unit of numeric timestamps; None for dates, and without timestamps.
    """

    offsets: NDArray[np.int64]
    negative_offsets: NDArray[np.int64]
    duplicates: int
    digests: dict[str, str]
    negative_digests: dict[str, str]
    arrival: NDArray[np.int64] | None = None
    negative_arrival: NDArray[np.int64] | None = None
    seen: dict[str, int] = field(default_factory=dict)
    unit: str | None = None


def finish(
    collected: EncodedChunks,
    *,
    vocabularies: dict[str, Vocabulary],
    positive_label: float | None,
    directory: Path,
    negative_directory: Path,
    where: str,
) -> SortedTable:
    """Run passes 2 and 3: write the columns to `directory`, and rows below `positive_label` to `negative_directory`."""
    unit = collected.units.unit(where) if collected.calendar is False else None
    names = [name for name in BUCKET_DTYPES if name in collected.columns and name not in collected.unusable]
    num_queries = len(vocabularies["queries"])
    maps = {
        side: [vocabularies[side].encode(part).astype(np.int32) for part in collected.distinct[side]]
        for side in SIDES
        if side in vocabularies and side not in collected.direct
    }
    counts = np.zeros(num_queries, dtype=np.int64)
    for chunk in range(len(collected.chunk_rows)):
        found = np.bincount(np.load(collected.place(chunk, "queries.npy"), mmap_mode="r"))
        if "queries" in maps:
            counts[maps["queries"][chunk]] += found  # a chunk lists only ids that occur in it, so the lengths agree
        else:
            counts[: len(found)] += found
    ends = np.cumsum(counts)
    # `ends` is 0 for codes before the first one that has rows.
    bucket_of = (np.maximum(ends - 1, 0) // BUCKET_ROWS).astype(np.uint16)
    num_buckets = int(bucket_of[-1]) + 1
    fills = np.zeros(num_buckets + 1, dtype=np.int64)
    np.add.at(fills, bucket_of.astype(np.int64) + 1, counts)
    starts = np.cumsum(fills)
    seen = {"queries": counts > 0}
    seen |= {side: np.zeros(len(vocabularies[side]), dtype=np.bool_) for side in collected.direct if side != "queries"}
    _deal(collected, names=names, maps=maps, bucket_of=bucket_of, starts=starts, unit=unit, seen=seen)

    finals = [name for name in names if name not in ("queries", "arrival")]
    arrival, negative_arrival = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
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
                _append(bucket, ~chosen, below, negative_arrival)
            _count(positive_counts, bucket["queries"][chosen])
            _append(bucket, chosen, kept, arrival)
        digests = {FINAL_NAMES[name]: column.close() for name, column in kept.items()}
        negative_digests = {FINAL_NAMES[name]: column.close() for name, column in below.items()}
    finally:
        for column in (*kept.values(), *below.values()):
            column.abandon()
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(positive_counts)])
    negative_offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(negative_counts)])
    return SortedTable(
        offsets,
        negative_offsets,
        duplicates,
        digests,
        negative_digests,
        np.concatenate(arrival) if arrival else None,
        np.concatenate(negative_arrival) if negative_arrival else None,
        {side: int(occurs.sum()) for side, occurs in seen.items()},
        unit,
    )


def _append(
    bucket: dict[str, Any], chosen: Any, columns: dict[str, ColumnFile], arrival: list[NDArray[np.int64]]
) -> None:
    """Append the chosen rows of a bucket to the columns, and their input positions, if known, to `arrival`."""
    for name, column in columns.items():
        column.append(bucket[name][chosen])
    if "arrival" in bucket:
        arrival.append(bucket["arrival"][chosen])


def _count(totals: NDArray[np.int64], codes: NDArray[np.int32]) -> None:
    if len(codes):
        low = int(codes[0])  # the smallest: the rows of a bucket are sorted by code
        found = np.bincount(codes - low)
        totals[low : low + len(found)] += found


def _deal(
    collected: EncodedChunks,
    *,
    names: list[str],
    maps: dict[str, list[NDArray[np.int32]]],
    bucket_of: NDArray[np.uint16],
    starts: NDArray[np.int64],
    unit: str | None,
    seen: dict[str, NDArray[np.bool_]],
) -> None:
    """Write the rows of every chunk to their buckets, in input order."""
    cursor = starts[:-1].copy()
    streams = {name: (collected.directory / f"{name}.bin").open("wb") for name in names}
    try:
        for chunk in range(len(collected.chunk_rows)):
            queries = _coded(maps, "queries", chunk, collected.load(chunk, "queries"))
            buckets = bucket_of[queries]
            order = np.argsort(buckets, kind="stable") if len(cursor) > 1 else None
            sizes = np.bincount(buckets, minlength=len(cursor))
            cuts = np.concatenate([[0], np.cumsum(sizes)])
            for name in names:
                values = queries if name == "queries" else collected.load(chunk, name)
                if name in ("items", "groups"):
                    values = _coded(maps, name, chunk, values)
                    if name in seen:
                        seen[name][values] = True
                elif name == "times" and unit is not None:
                    values = to_microseconds(values, unit)
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


def _coded(maps: dict[str, list[NDArray[np.int32]]], side: str, chunk: int, values: NDArray[Any]) -> NDArray[Any]:
    """Map a chunk's codes to the vocabulary's codes; return direct codes unchanged."""
    return maps[side][chunk][values] if side in maps else values


def _sorted_buckets(directory: Path, names: list[str], starts: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Yield the buckets in order, sorted and without duplicates; ``dropped`` is the number of duplicates."""
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
    """Return the stable order by query and time."""
    if times is None:
        return np.argsort(queries, kind="stable")
    low, span = int(times.min()), int(times.max()) - int(times.min()) + 1
    first = int(queries.min())
    if (int(queries.max()) - first + 1) * span < 2**62:  # one combined key sorts faster than two
        return np.argsort((queries - first).astype(np.int64) * span + (times - low), kind="stable")
    return np.lexsort((times, queries))


def _duplicates(
    queries: NDArray[np.int32], items: NDArray[np.int32], times: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Find the rows that repeat an earlier (query, item, time); none without times, because each row then is later."""
    if times is None or len(queries) < 2:
        return np.zeros(0, dtype=np.int64)
    same = (queries[1:] == queries[:-1]) & (times[1:] == times[:-1])
    if not same.any():
        return np.zeros(0, dtype=np.int64)
    tie = np.concatenate([[0], np.cumsum(~same)])  # rows with the same query and time share a number
    tied = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
    order = np.lexsort((items[tied], tie[tied]))
    tied = tied[order]
    repeats = (tie[tied][1:] == tie[tied][:-1]) & (items[tied][1:] == items[tied][:-1])
    return np.sort(tied[1:][repeats])
