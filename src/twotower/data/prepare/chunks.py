"""Encoded chunks: rows on disk, with ids as positions among the chunk's distinct ids, hashed, or unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.io.timestamps import TimeUnits
from twotower.data.io.validation import CleanRows
from twotower.data.schema.account import Account
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import (
    MOST_ROWS,
    CodedIds,
    Hashed,
    HashedIds,
    IdKind,
    Vocabulary,
    expected_shared,
    hash_ids,
    hash_rows,
)
from twotower.errors import InputError
from twotower.system.parquet import read_parquet

#: Maximum number of distinct hashes stored to measure collisions; 8 bytes each.
SAMPLE = 4_000_000

#: If the largest code is at least SMALL, and at least SPARSE times the number of rows, the codes are taken to be ids.
SPARSE, SMALL = 1000, 10_000_000

_ONE = np.uint64(1)


class CodeColumn:
    """A column whose integers are codes; the size of the vocabulary is the largest code plus one."""

    def __init__(self) -> None:
        self._largest, self._rows = -1, 0

    def take(self, ids: pl.Series, where: str, column: str) -> NDArray[np.int32]:
        """Validate the codes of a chunk and return them as int32.

        Raises:
            InputError: the ids are text, or integers out of range.
        """
        if ids.dtype != pl.Int64:
            raise InputError(f"{where}: column {column!r}: text such as {ids[0]!r}; codes are integers from 0 upwards.")
        codes = ids.to_numpy()
        wrong = np.flatnonzero((codes < 0) | (codes >= MOST_ROWS))
        if wrong.size:
            raise InputError(
                f"{where}: column {column!r}: {codes[wrong[0]]}; codes are integers from 0 to {MOST_ROWS - 1:,}. "
                "Use a vocabulary or hashing for ids that are not codes."
            )
        self._largest, self._rows = max(self._largest, int(codes.max())), self._rows + len(codes)
        return codes.astype(np.int32)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the state for `join`."""
        return {"largest": np.array(self._largest), "rows": np.array(self._rows)}

    def join(self, state: dict[str, NDArray[Any]]) -> None:
        """Add the state of another object, which read a different part of the column."""
        self._largest = max(self._largest, int(state["largest"]))
        self._rows += int(state["rows"])

    def vocabulary(self, where: str, column: str) -> Vocabulary:
        """Return the vocabulary of the codes.

        Raises:
            InputError: there are far more codes than rows.
        """
        if self._largest >= max(SMALL, SPARSE * self._rows):
            raise InputError(
                f"{where}: column {column!r}: largest code {self._largest} in {self._rows:,} rows; codes must be "
                "dense, and these look like ids. Use a vocabulary."
            )
        return CodedIds(self._largest + 1)

    def report(self, account: Account, side: str, seen: int) -> None:
        """Add a line about the number of codes that occur."""
        unseen = self._largest + 1 - seen
        account.add(f"{side} ids are codes", seen, f"{unseen:,} of the codes 0 to {self._largest:,} occur in no row")


class HashColumn:
    """A column hashed to rows, with a measurement of collisions.

    The ids are not stored. Collisions are counted on a sample: the rows whose number is a multiple of 2^s, with s as
    small as memory allows. All ids of a sampled row are known, and a collision concerns only one row, so the count is
    exact on the sample and an unbiased estimate for all rows.

    Args:
        kind: the id kind, with the number of rows.
    """

    def __init__(self, kind: Hashed) -> None:
        self._rows, self._halvings = kind.rows, 0
        self._hashes = np.zeros(0, dtype=np.uint64)

    def take(self, ids: pl.Series, where: str, column: str) -> NDArray[np.int32]:
        """Hash the ids of a chunk to rows."""
        del where, column
        hashes = hash_ids(ids)
        self._keep(np.unique(hashes))
        return hash_rows(hashes, self._rows).astype(np.int32)

    def _keep(self, hashes: NDArray[np.uint64]) -> None:
        self._hashes = np.union1d(self._hashes, self._sampled(hashes))
        while len(self._hashes) > SAMPLE:
            self._halvings += 1
            self._hashes = self._sampled(self._hashes)

    def _sampled(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        row = hashes % np.uint64(self._rows)
        kept: NDArray[np.uint64] = hashes[row & ((_ONE << np.uint64(self._halvings)) - _ONE) == 0]
        return kept

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the state for `join`."""
        return {"hashes": self._hashes, "halvings": np.array(self._halvings)}

    def join(self, state: dict[str, NDArray[Any]]) -> None:
        """Add the state of another object, which read a different part of the column."""
        self._halvings = max(self._halvings, int(state["halvings"]))
        self._hashes = self._sampled(self._hashes)
        self._keep(state["hashes"])

    def vocabulary(self, where: str, column: str) -> Vocabulary:
        """Return the vocabulary of the rows."""
        del where, column
        return HashedIds(Hashed(self._rows))

    def collisions(self) -> tuple[int, float]:
        """Estimate the number of distinct ids, and the fraction of ids that share their row with another id."""
        _, counts = np.unique(hash_rows(self._hashes, self._rows), return_counts=True)
        ids = int(counts.sum())
        return ids << self._halvings, float(counts[counts > 1].sum() / max(ids, 1))

    def report(self, account: Account, side: str, seen: int) -> None:
        """Add a line with the measured and the expected collision rate."""
        ids, shared = self.collisions()
        part = f", measured on one row in {1 << self._halvings}" if self._halvings else ""
        account.add(
            f"{side} ids hashed",
            ids,
            f"to {self._rows:,} rows, of which {seen:,} are used; {shared:.2%} of the ids share a row with another id "
            f"({expected_shared(ids, self._rows):.2%} expected){part}",
        )


def direct_column(kind: IdKind) -> CodeColumn | HashColumn | None:
    """Return the column reader for this kind of ids; None if the ids need a vocabulary."""
    if isinstance(kind, Hashed):
        return HashColumn(kind)
    return CodeColumn() if kind == "codes" else None


SIDES = ("queries", "items", "groups")
ROLES = {"queries": "query", "items": "item", "groups": "group"}


def local_codes(ids: pl.Series) -> tuple[pl.Series, NDArray[np.int32]]:
    """Return the distinct ids in ascending order, and each row's position among them."""
    if ids.dtype == pl.Int64:
        values = ids.to_numpy()
        low, high = int(values.min()), int(values.max())
        if high - low < 4 * len(values) + 1024:  # nearly dense ids: a lookup table is faster than sorting
            seen = np.zeros(high - low + 1, dtype=bool)
            seen[values - low] = True
            table = np.cumsum(seen, dtype=np.int32) - np.int32(1)
            return pl.Series("id", np.flatnonzero(seen) + low, dtype=pl.Int64), table[values - low]
    distinct = ids.unique().sort().alias("id")
    return distinct, Vocabulary(distinct).encode(ids).astype(np.int32)


@dataclass
class EncodedChunks:
    """The result of the first pass: the codes of each chunk on disk and the distinct ids in memory.

    Args:
        directory: folder of the temporary files.
        direct: by side, the columns whose ids become codes without a vocabulary.
    """

    directory: Path
    direct: dict[str, CodeColumn | HashColumn] = field(default_factory=dict)
    chunk_rows: list[int] = field(default_factory=list)
    distinct: dict[str, list[pl.Series]] = field(default_factory=lambda: {side: [] for side in SIDES})
    origin: dict[str, list[tuple[str, bool]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    columns: set[str] = field(default_factory=set)
    calendar: bool | None = None
    units: TimeUnits = field(default_factory=TimeUnits)
    empty_lists: int = 0
    unusable: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    where: str = ""
    adopted: dict[int, tuple[Path, int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows added so far."""
        return sum(self.chunk_rows)

    def add(self, rows: CleanRows, where: str, text: bool, columns: ColumnRoles) -> None:
        """Add the rows of one chunk.

        Raises:
            InputError: timestamps are dates in one file and numbers in another.
        """
        self.empty_lists += rows.empty_lists
        self.unusable = {**rows.unusable, **self.unusable}
        if not len(rows.queries):
            return
        self.where = self.where or where
        chunk, before = len(self.chunk_rows), self.rows
        self.chunk_rows.append(len(rows.queries))
        for side in SIDES:
            ids: pl.Series | None = getattr(rows, side)
            if ids is None:
                continue
            if side in self.direct:
                self._save(chunk, side, self.direct[side].take(ids, where, getattr(columns, ROLES[side]) or side))
            else:
                distinct, codes = local_codes(ids)
                self.distinct[side].append(distinct)
                self.origin[side].append((where, text))
                self._save(chunk, side, codes)
        if rows.times is not None:
            self.same_calendar(where, rows.calendar)
            if not rows.calendar:
                self.units.add(rows.times)
            self._save(chunk, "times", rows.times)
        for name in ("weights", "labels"):
            values = getattr(rows, name)
            if values is not None:
                self._save(chunk, name, values)
        if rows.context is not None:  # the context is not sorted; a sorted row finds it by its input position
            self._save(chunk, "arrival", np.arange(before, before + len(rows.queries)))
            rows.context.write_parquet(self.directory / f"{chunk}.context.parquet")

    def take_notes(self, notes: Mapping[str, int]) -> None:
        """Add the notes of one file."""
        for label, count in notes.items():
            self.notes[label] = self.notes.get(label, 0) + count

    def same_calendar(self, where: str, calendar: bool) -> None:
        """Check that the timestamps are all dates or all numbers.

        Raises:
            InputError: dates follow numbers, or numbers follow dates.
        """
        if self.calendar not in (None, calendar):
            raise InputError(
                f"{where}: timestamps are {'dates' if calendar else 'numbers'}, but in earlier files "
                f"{'numbers' if calendar else 'dates'}; write all in one format."
            )
        self.calendar = calendar

    def place(self, chunk: int, name: str) -> Path:
        """Return the file of a chunk's column, here or in the folder of an adopted chunk (`shards.adopt`)."""
        folder, number = self.adopted.get(chunk, (self.directory, chunk))
        return folder / f"{number}.{name}"

    def context(self) -> pl.DataFrame:
        """Read the context columns of all chunks, in input order.

        Raises:
            InputError: a column has a different type in a later file.
        """
        parts = [read_parquet(self.place(chunk, "context.parquet")) for chunk in range(len(self.chunk_rows))]
        try:
            return pl.concat(parts, how="vertical_relaxed", rechunk=True)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"context: a column has a different type in a later file ({reason}).") from None

    def _save(self, chunk: int, name: str, values: NDArray[Any]) -> None:
        self.columns.add(name)
        np.save(self.directory / f"{chunk}.{name}.npy", values, allow_pickle=False)

    def load(self, chunk: int, name: str) -> NDArray[Any]:
        """Load a chunk's column, and delete the temporary file unless the chunk was adopted."""
        path = self.place(chunk, f"{name}.npy")
        values: NDArray[Any] = np.load(path, allow_pickle=False)
        if chunk not in self.adopted:
            path.unlink()
        elif name == "arrival":  # the shard counts from its own first row
            values = values + (sum(self.chunk_rows[:chunk]) - int(values[0]))
        return values

    def vocabulary(self, side: str, column: str, extra: pl.Series | None = None) -> Vocabulary:
        """Build the vocabulary of one side in ascending order, with `extra` ids from a feature table.

        Raises:
            InputError: ids are integers in one file and text in another, and these are not both text files.
        """
        if side in self.direct:
            return self.direct[side].vocabulary(self.where, column)
        parts = self.distinct[side]
        if len({part.dtype for part in parts}) > 1:
            first = self.origin[side][0]
            other = next(o for o, part in zip(self.origin[side], parts, strict=True) if part.dtype != parts[0].dtype)
            if not (first[1] and other[1]):
                raise InputError(
                    f"{other[0]}: column {column!r} has mixed types: the ids in this file and in {first[0]} are "
                    "neither all integers nor all text; write them as one type."
                )
            # Text files: integers are in canonical form, so converting them back to text loses nothing.
            parts = self.distinct[side] = [part.cast(pl.String) for part in parts]
        if extra is not None:
            parts = [*parts, extra.cast(parts[0].dtype).alias("id")]
        return Vocabulary(pl.concat(parts).unique().sort())
