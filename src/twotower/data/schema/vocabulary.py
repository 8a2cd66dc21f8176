"""Vocabularies, which map ids to codes: by position in a list of ids, by hashing, or unchanged if ids are codes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.hashing import GOLDEN, mix64
from twotower.system.filesystem import whole_file
from twotower.system.parquet import read_parquet, scan_parquet

#: Maximum length of a name in a message; the first line of a file that is not a table may be very long.
LONGEST_SHOWN = 200
IdValues = pl.Series | NDArray[Any] | Sequence[Any]


def listed(columns: Sequence[str]) -> str:
    """Format names for a message: at most 20 of them, and at most `LONGEST_SHOWN` characters of each."""
    shown = ", ".join(
        text if len(text := repr(c)) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…" for c in columns[:20]
    )
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "") if columns else "none"


def ids_of(values: IdValues, where: str) -> pl.Series:
    """Convert ids to a Series of Int64 or String, the two id types.

    Raises:
        InputError: the ids are floats, booleans, dates, of mixed types or not valid Unicode, or an integer exceeds
            2^63 - 1.
    """
    try:
        series = values if isinstance(values, pl.Series) else pl.Series("id", values)
    except UnicodeEncodeError:
        raise InputError(f"{where}: an id that is not valid Unicode; write the ids as UTF-8.") from None
    except (TypeError, pl.exceptions.PolarsError, OverflowError):
        raise InputError(
            f"{where}: ids of mixed types; ids must be all integers or all text. Convert them first."
        ) from None
    dtype = series.dtype
    if dtype in (pl.Int64, pl.String):
        return series
    if dtype == pl.Null:
        return series.cast(pl.String)
    if dtype.is_integer():
        try:
            return series.cast(pl.Int64)
        except pl.exceptions.InvalidOperationError:
            raise InputError(f"{where}: an integer id above 2^63 - 1; convert the ids to text.") from None
    if dtype in (pl.Categorical, pl.Enum):
        return series.cast(pl.String)
    if isinstance(dtype, pl.Decimal) and dtype.scale == 0:  # many databases store integers this way
        try:
            return series.cast(pl.Int64)
        except pl.exceptions.InvalidOperationError:
            raise InputError(f"{where}: an integer id above 2^63 - 1; convert the ids to text.") from None
    if dtype == pl.Binary:  # some programs write text without declaring it as text
        try:
            return series.cast(pl.String)
        except pl.exceptions.PolarsError:
            raise InputError(f"{where}: binary ids that are not UTF-8 text; convert the column to text.") from None
    if dtype == pl.Object:
        raise InputError(f"{where}: ids of mixed types; ids must be all integers or all text. Convert them first.")
    raise InputError(
        f"{where}: ids of type {dtype}; ids must be integers or text"
        + (" (floats cannot represent every integer above 2^53)." if dtype.is_float() else ".")
        + " Convert the column first."
    )


def texts_of(values: pl.Series, where: str) -> pl.Series:
    """Convert a column to text.

    Raises:
        InputError: the column has lists, durations or bytes that are not UTF-8.
    """
    try:
        return values.cast(pl.String)
    except pl.exceptions.PolarsError:
        found = "bytes that are not UTF-8" if values.dtype == pl.Binary else f"values of type {values.dtype}"
        raise InputError(f"{where}: column {values.name!r} has {found}; expected text.") from None


class Vocabulary:
    """The ids of the queries, items or groups; the position of an id is its code.

    Args:
        ids: distinct integers or texts, without nulls.

    Raises:
        InputError: an id is null, repeated, or neither an integer nor text.
    """

    def __init__(self, ids: IdValues) -> None:
        series = ids_of(ids, "vocabulary").alias("id")
        if series.null_count():
            raise InputError("vocabulary: null ids; every id needs a value.")
        self._ids = series.rechunk()
        # Ascending integers, the usual case, are looked up by binary search; other ids by a hash join.
        self._ascending: NDArray[np.int64] | None = None
        if series.dtype == pl.Int64:
            values = self._ids.to_numpy()
            if len(values) < 2 or bool(np.all(values[1:] > values[:-1])):
                self._ascending = values
        # Ascending ids cannot repeat. Checking other ids takes a tenth of a second per million.
        if self._ascending is None and series.n_unique() != len(series):
            raise InputError("vocabulary: repeated ids; each id must occur once.")

    @property
    def ids(self) -> pl.Series:
        """The ids in code order, Int64 or String."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._ids.equals(other._ids, check_dtypes=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} ids, {self._ids.dtype})"

    def encode(self, ids: IdValues) -> NDArray[np.int64]:
        """Look up the codes of ids, int64 [len(ids)]; -1 where unknown or null.

        An integer vocabulary accepts text if every value is an integer (a command line passes ``"1"``); a text
        vocabulary accepts integers.

        Raises:
            InputError: the ids have a wrong type or mixed types.
        """
        wanted = ids_of(ids, "ids")
        if not len(wanted) or not len(self):
            return np.full(len(wanted), -1, dtype=np.int64)
        if wanted.dtype != self._ids.dtype:
            if self._ids.dtype == pl.Int64:
                parsed = wanted.cast(pl.Int64, strict=False)
                if parsed.null_count() > wanted.null_count():
                    wrong = wanted.filter(parsed.is_null() & wanted.is_not_null())[0]
                    raise InputError(f"ids: {wrong!r} is not an integer, but this vocabulary has integer ids.")
                wanted = parsed
            else:
                wanted = wanted.cast(pl.String)
        if self._ascending is not None and not wanted.null_count():
            values = wanted.to_numpy()
            at = np.minimum(np.searchsorted(self._ascending, values), len(self) - 1)
            return np.where(self._ascending[at] == values, at, -1).astype(np.int64)
        table = pl.DataFrame({"id": self._ids}).with_row_index("code")
        joined = pl.DataFrame({"id": wanted}).join(table, on="id", how="left", maintain_order="left")
        return joined["code"].cast(pl.Int64).fill_null(-1).to_numpy()

    def decode(self, codes: Sequence[int] | NDArray[np.integer[Any]]) -> pl.Series:
        """Look up the ids of codes, a Series of the vocabulary's type; null where the code is -1.

        Raises:
            IndexError: a code is outside ``-1 .. len - 1``.
        """
        at = np.asarray(codes, dtype=np.int64).reshape(-1)
        if at.size and (at.min() < -1 or at.max() >= len(self)):
            raise IndexError(f"codes must be in -1..{len(self) - 1}, found {at.min()}..{at.max()}")
        known = at >= 0
        if known.all():
            return self._ids.gather(at)
        positions = pl.Series("position", np.where(known, at, 0)).set(pl.Series(~known), None)
        return self._ids.gather(positions) if len(self) else pl.Series("id", [None] * len(at), dtype=self._ids.dtype)

    def write(self, path: str | Path) -> None:
        """Write atomically to a Parquet file with the single column ``id``."""
        with whole_file(Path(path)) as partial:
            pl.DataFrame({"id": self._ids}).write_parquet(partial, compression="lz4")

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read a file written by `write`.

        Raises:
            InputError: the file is missing, damaged or not a vocabulary.
        """
        try:
            table = read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{path}: not a readable vocabulary ({str(error).splitlines()[0]}).") from None
        if table.columns != ["id"]:
            raise InputError(f"{path}: expected one column 'id', found {listed(table.columns)}.")
        return cls(table["id"])


Codes = NDArray[np.int64]

#: Maximum number of rows, because codes are int32 in prepared data.
MOST_ROWS = 2**31 - 1
_CODES, _HASHED = "codes", "hashed_rows"


@dataclass(frozen=True)
class Hashed:
    """The id kind "hashed to R rows"; the model does not distinguish ids that share a row.

    Attributes:
        rows: R, 2 to 2^31 - 1.

    Raises:
        InputError: R is out of range.
    """

    rows: int

    def __post_init__(self) -> None:
        if not 2 <= self.rows <= MOST_ROWS:
            raise InputError(f"hashed: rows={self.rows}; expected 2 to {MOST_ROWS:,}")


#: How ids become codes: by a vocabulary, unchanged (the ids are the codes), or by hashing.
IdKind = Literal["vocabulary", "codes"] | Hashed


def hash_ids(ids: IdValues) -> NDArray[np.uint64]:
    """Hash each id to 64 bits, uint64 [n]; the result is the same in all processes and versions, on all machines.

    Integers go through the finaliser of splitmix64 (Steele, Lea and Flood 2014), text through BLAKE2b. Text that is the
    canonical form of an integer ("7", not "007") is hashed as that integer, because a command line passes only text.

    Raises:
        InputError: an id is null, or neither an integer nor text.
    """
    series = ids_of(ids, "ids")
    if series.null_count():
        raise InputError("ids: null ids cannot be hashed; every id needs a value")
    if series.dtype == pl.Int64:
        return _hashed(series.to_numpy())
    distinct = Vocabulary(series.unique().sort())
    numbers = distinct.ids.cast(pl.Int64, strict=False)
    plain = (numbers.cast(pl.String) == distinct.ids).fill_null(value=False).to_numpy()
    hashes = _hashed(numbers.fill_null(0).to_numpy())
    for place in np.flatnonzero(~plain):
        text = hashlib.blake2b(distinct.ids[int(place)].encode(), digest_size=8)
        hashes[place] = int.from_bytes(text.digest(), "little")
    return hashes[distinct.encode(series)]


def expected_shared(ids: int, rows: int) -> float:
    """Compute the expected fraction of ids that share their row with another id: 1 - (1 - 1/R)^(n - 1).

    Args:
        ids: n, the number of distinct ids, hashed uniformly to the rows.
        rows: R.
    """
    return float(-np.expm1(max(ids - 1, 0) * np.log1p(-1.0 / rows)))


class CodedIds(Vocabulary):
    """The ids 0 to size - 1, which are also the codes, so no list is stored.

    Args:
        size: the number of ids.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def ids(self) -> pl.Series:
        """The ids 0, 1, 2, ..., created on each access."""
        return pl.int_range(self._size, eager=True, dtype=pl.Int64).alias("id")

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        return type(other) is CodedIds and self._size == other._size

    __hash__ = None

    def __repr__(self) -> str:
        return f"CodedIds({self._size:,})"

    def encode(self, ids: IdValues) -> Codes:
        """See `Vocabulary.encode`."""
        wanted = ids_of(ids, "ids")
        if wanted.dtype != pl.Int64:
            numbers = wanted.cast(pl.Int64, strict=False)
            if numbers.null_count() > wanted.null_count():
                wrong = wanted.filter(numbers.is_null() & wanted.is_not_null())[0]
                raise InputError(f"ids: {wrong!r} is not an integer; the ids of this model are integer codes.")
            wanted = numbers
        codes = wanted.fill_null(-1).to_numpy()
        return np.where((codes >= 0) & (codes < self._size), codes, -1)

    def decode(self, codes: Sequence[int] | NDArray[np.integer[Any]]) -> pl.Series:
        """See `Vocabulary.decode`."""
        at = np.asarray(codes, dtype=np.int64).reshape(-1)
        if at.size and (at.min() < -1 or at.max() >= self._size):
            raise IndexError(f"codes must be in -1..{self._size - 1}, found {at.min()}..{at.max()}")
        found = pl.Series("id", at)
        return found if (at >= 0).all() else found.set(pl.Series(at < 0), None)

    def write(self, path: str | Path) -> None:
        """Write the size atomically to a Parquet file."""
        with whole_file(Path(path)) as partial:
            pl.DataFrame({_CODES: [self._size]}, schema={_CODES: pl.Int64}).write_parquet(partial)


class HashedIds(CodedIds):
    """Ids that are hashed to rows; every id has a row, even if training never saw the id.

    Decoding returns the row number, because the ids of a row are not stored.

    Args:
        kind: the id kind, with the number of rows.
    """

    def __init__(self, kind: Hashed) -> None:
        super().__init__(kind.rows)

    @property
    def ids(self) -> pl.Series:
        """Not available, because hashed ids are not stored.

        Raises:
            InputError: always.
        """
        raise InputError(
            "hashed ids: this needs the list of ids, and hashed ids are not stored; train with "
            "data.query_ids=vocabulary, or encode the ids yourself and use data.query_ids=codes"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashedIds) and self._size == other._size

    __hash__ = None

    def __repr__(self) -> str:
        return f"HashedIds({self._size:,} rows)"

    def encode(self, ids: IdValues) -> Codes:
        """Hash each id to its row; -1 where null."""
        wanted = ids_of(ids, "ids")
        present = wanted.is_not_null()
        codes = np.full(len(wanted), -1, dtype=np.int64)
        codes[present.to_numpy()] = hash_rows(hash_ids(wanted.filter(present)), self._size)
        return codes

    def write(self, path: str | Path) -> None:
        """Write the size atomically to a Parquet file."""
        with whole_file(Path(path)) as partial:
            pl.DataFrame({_HASHED: [self._size]}, schema={_HASHED: pl.Int64}).write_parquet(partial)


def hash_rows(hashes: NDArray[np.uint64], rows: int) -> Codes:
    """Reduce each hash to a row number, the hash modulo `rows`."""
    return (hashes % np.uint64(rows)).astype(np.int64)


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read a vocabulary of any kind from the file written by `write`.

    Raises:
        InputError: the file is missing, damaged or not a vocabulary.
    """
    try:
        columns = scan_parquet(path).collect_schema()
        kind = next((name for name in (_CODES, _HASHED) if list(columns) == [name]), None)
        if kind is None:
            return Vocabulary.read(path)
        size = int(read_parquet(path)[kind][0])
    except (OSError, pl.exceptions.PolarsError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not a readable vocabulary ({(str(error) or 'empty').splitlines()[0]}).") from None
    return CodedIds(size) if kind == _CODES else HashedIds(Hashed(size))


def _hashed(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    return mix64(values.astype(np.uint64) + GOLDEN)
