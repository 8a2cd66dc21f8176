"""Output of the first pass: the rows of each chunk on disk, coded against the chunk's own distinct ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.cleaning import Rows
from twotower.data.direct_ids import CodeColumn, HashColumn
from twotower.errors import InputError
from twotower.schema import Columns, Vocabulary

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
class Collected:
    """The result of the first pass: codes of each chunk on disk, its distinct ids in memory.

    Args:
        directory: folder of the temporary files.
        direct: the sides whose ids become codes without a vocabulary.
    """

    directory: Path
    direct: dict[str, CodeColumn | HashColumn] = field(default_factory=dict)
    chunk_rows: list[int] = field(default_factory=list)
    distinct: dict[str, list[pl.Series]] = field(default_factory=lambda: {side: [] for side in SIDES})
    origin: dict[str, list[tuple[str, bool]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    columns: set[str] = field(default_factory=set)
    calendar: bool | None = None
    largest_time: float = 0.0
    empty_lists: int = 0
    where: str = ""
    adopted: dict[int, tuple[Path, int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows so far."""
        return sum(self.chunk_rows)

    def add(self, rows: Rows, where: str, text: bool, columns: Columns) -> None:
        """Add the rows of one chunk.

        Raises:
            InputError: dates in one file and numbers in another.
        """
        self.empty_lists += rows.empty_lists
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
            self.largest_time = max(self.largest_time, float(np.abs(rows.times.astype(np.float64)).max()))
            self._save(chunk, "times", rows.times)
        for name in ("weights", "labels"):
            values = getattr(rows, name)
            if values is not None:
                self._save(chunk, name, values)
        if rows.context is not None:  # only codes are sorted; the input position leads back to a row's context
            self._save(chunk, "arrival", np.arange(before, before + len(rows.queries)))
            rows.context.write_parquet(self.directory / f"{chunk}.context.parquet")

    def same_calendar(self, where: str, calendar: bool) -> None:
        """Check that all timestamps are dates, or all are numbers.

        Raises:
            InputError: dates after numbers, or numbers after dates.
        """
        if self.calendar not in (None, calendar):
            raise InputError(
                f"{where}: timestamps are {'dates' if calendar else 'numbers'}, but in earlier files "
                f"{'numbers' if calendar else 'dates'}; write all in one format."
            )
        self.calendar = calendar

    def place(self, chunk: int, name: str) -> Path:
        """Return the file of a chunk's column: here, or in the folder it was adopted from (`shards.adopt`)."""
        folder, number = self.adopted.get(chunk, (self.directory, chunk))
        return folder / f"{number}.{name}"

    def context(self) -> pl.DataFrame:
        """Read the context columns of all chunks, in input order.

        Raises:
            InputError: a column has another type in a later file.
        """
        parts = [pl.read_parquet(self.place(chunk, "context.parquet")) for chunk in range(len(self.chunk_rows))]
        try:
            return pl.concat(parts, how="vertical_relaxed", rechunk=True)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"context: a column has another type in a later file ({reason}).") from None

    def _save(self, chunk: int, name: str, values: NDArray[Any]) -> None:
        self.columns.add(name)
        np.save(self.directory / f"{chunk}.{name}.npy", values, allow_pickle=False)

    def load(self, chunk: int, name: str) -> NDArray[Any]:
        """Load a chunk's column, and delete its temporary file unless it was adopted."""
        path = self.place(chunk, f"{name}.npy")
        values: NDArray[Any] = np.load(path, allow_pickle=False)
        if chunk not in self.adopted:
            path.unlink()
        elif name == "arrival":  # the shard counted from its own first row
            values = values + (sum(self.chunk_rows[:chunk]) - int(values[0]))
        return values

    def vocabulary(self, side: str, column: str, extra: pl.Series | None = None) -> Vocabulary:
        """Build the vocabulary of one side, ascending, with `extra` ids from a feature table.

        Raises:
            InputError: integers in one file and text in another, in formats with types.
        """
        if side in self.direct:
            return self.direct[side].vocabulary(self.where, column)
        parts = self.distinct[side]
        if len({part.dtype for part in parts}) > 1:
            first = self.origin[side][0]
            other = next(o for o, part in zip(self.origin[side], parts, strict=True) if part.dtype != parts[0].dtype)
            if not (first[1] and other[1]):
                raise InputError(
                    f"{other[0]}: column {column!r} has mixed types: integers here and text in {first[0]}, or the "
                    "reverse; write the ids as one type."
                )
            # Text files: integers are in canonical form, so converting them back to text loses nothing.
            parts = self.distinct[side] = [part.cast(pl.String) for part in parts]
        if extra is not None:
            parts = [*parts, extra.cast(parts[0].dtype).alias("id")]
        return Vocabulary(pl.concat(parts).unique().sort())
