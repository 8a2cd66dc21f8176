"""Which column is what, and the vocabularies that turn ids of any type into dense codes and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.files import whole_file

# Usual names, in tiers: the first tier that occurs decides, two names of one tier are ambiguous. Compared without
# case, spaces, dashes, underscores and the ":token" of typed headers.
USUAL_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "query": (
        ("userid", "user", "customerid", "customer", "householdid", "visitorid", "visitor", "memberid", "clientid"),
        ("queryid", "query", "sessionid", "session", "accountid", "profileid"),
    ),
    "item": (
        (
            *("itemid", "item", "movieid", "productid", "stockcode", "articleid", "sku", "asin", "bookid", "trackid"),
            *("songid", "videoid", "newsid", "businessid", "venueid", "documentid", "adid", "gameid", "recipeid"),
        ),
        ("items", "itemids", "sequence", "itemsequence", "product", "movie", "article"),
    ),
    "timestamp": (
        ("timestamp", "timestamps", "ts", "datetime", "eventtime", "transactiontimestamp", "invoicedate", "unixtime"),
        ("time", "date", "createdat", "orderdate", "tdat", "eventdate", "day"),
    ),
    "weight": (("weight", "sampleweight", "weights"),),
    "label": (("rating", "label", "score", "ratings", "stars"),),
    "group": (("group", "market"),),
}
TITLE_NAMES = (("title", "movietitle", "itemtitle", "producttitle"), ("name", "itemname", "productname", "prodname"),
               ("description",))  # fmt: skip

IdValues = pl.Series | NDArray[Any] | Sequence[Any]


def plain_name(column: str) -> str:
    """The column's name as it is compared: lower case, no spaces, dashes, underscores or ``:type``."""
    return re.sub(r"[\s_\-]+", "", column.split(":", maxsplit=1)[0]).lower()


def listed(columns: Sequence[str]) -> str:
    """The columns of a file as one readable list for a message, at most 20 of them."""
    shown = ", ".join(repr(c) for c in columns[:20])
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "") if columns else "none"


def usual_column(columns: Sequence[str], tiers: Sequence[Sequence[str]], role: str, where: str) -> str | None:
    """The one column that goes by a usual name, or None.

    Raises:
        InputError: two columns are equally good.
    """
    for tier in tiers:
        found = [c for c in columns if plain_name(c) in tier]
        if len(found) > 1:
            raise InputError(
                f"{where}: columns {listed(found)} could each be the {role}; say which: data.columns.{role}="
                f"{found[0]} (in Python columns={{{role!r}: {found[0]!r}}}). Columns found: {listed(columns)}."
            )
        if found:
            return found[0]
    return None


@dataclass(frozen=True)
class Columns:
    """Names of the columns that matter; a field left None is looked for by its usual names.

    Attributes:
        query: id of the user, customer, session or query. Required in the file.
        item: id of the item, or a list of items in order. Required in the file.
        timestamp: when it happened: dates, ISO text, or unix seconds, milliseconds or microseconds.
        weight: importance of a row in the loss, finite and not negative.
        label: a rating or score; see ``positive_label`` of `Interactions.read`.
        group: market or other partition of the rows.
    """

    query: str | None = None
    item: str | None = None
    timestamp: str | None = None
    weight: str | None = None
    label: str | None = None
    group: str | None = None

    @classmethod
    def of(cls, given: Columns | Mapping[str, str | None] | None) -> Columns:
        """A `Columns` from what a caller gave: one, a mapping, or nothing.

        Raises:
            InputError: the mapping names a role that does not exist, or one column has two roles.
        """
        if given is None:
            return cls()
        if not isinstance(given, Columns):
            known = [f.name for f in fields(cls)]
            for role in given:
                if role not in known:
                    raise InputError(f"columns: {role!r} is not a role; expected some of {listed(known)}.")
            given = cls(**given)
        named = [name for name in asdict(given).values() if name is not None]
        for name in named:
            if named.count(name) > 1:
                raise InputError(f"columns: {name!r} is given two roles; a column has one.")
        return given

    def resolve(self, columns: Sequence[str], where: str) -> Columns:
        """The roles filled in for a file that has `columns`.

        Args:
            columns: names of the file's columns.
            where: name of the file, for messages.

        Raises:
            InputError: a given column is not there, a required one is missing, or two are equally good.
        """
        found: dict[str, str | None] = {}
        taken = {name for name in asdict(self).values() if name is not None}
        for role, tiers in USUAL_NAMES.items():
            told: str | None = getattr(self, role)
            if told is not None:
                match = told if told in columns else told.split(":")[0]
                if match not in columns:
                    raise InputError(
                        f"{where}: column {told!r}, given as the {role}, is not there. "
                        f"Columns found: {listed(columns)}."
                    )
                found[role] = match
                continue
            found[role] = usual_column([c for c in columns if c not in taken], tiers, role, where)
            if found[role] is None and role in ("query", "item"):
                usual = "user_id, customer_id, query_id" if role == "query" else "item_id, product_id, movie_id"
                raise InputError(
                    f"{where}: no {role} column (usual names: {usual}); say which it is: data.columns.{role}=NAME "
                    f"(in Python columns={{{role!r}: NAME}}). Columns found: {listed(columns)}."
                )
        return Columns(**found)

    def roles(self) -> dict[str, str]:
        """Role -> column, of the roles that are filled."""
        return {role: name for role, name in asdict(self).items() if name is not None}


def title_column(table: pl.DataFrame) -> str | None:
    """The column of an item table that a person would read: title, name or description; None without one."""
    for tier in TITLE_NAMES:
        for column in table.columns:
            if plain_name(column) in tier and table.schema[column] == pl.String:
                return column
    return None


def ids_of(values: IdValues, where: str) -> pl.Series:
    """`values` as a Series of Int64 or String, the two types that ids have.

    Raises:
        InputError: floats, booleans, dates or mixed types, or an integer above 2^63 - 1.
    """
    try:
        series = values if isinstance(values, pl.Series) else pl.Series("id", values)
    except (TypeError, pl.exceptions.PolarsError, OverflowError):
        raise InputError(
            f"{where}: ids of mixed types; ids are all integers or all text, convert them first."
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
    if dtype == pl.Object:
        raise InputError(f"{where}: ids of mixed types; ids are all integers or all text, convert them first.")
    raise InputError(
        f"{where}: ids of type {dtype}; ids are integers or text"
        + (" (floats lose ids above 2^53)." if dtype.is_float() else ".")
        + " Convert the column first."
    )


class Vocabulary:
    """The ids of one side; the code of an id is its position.

    Args:
        ids: distinct ids, integers or text, no nulls.

    Raises:
        InputError: nulls, repeats, or ids that are neither integers nor text.
    """

    def __init__(self, ids: IdValues) -> None:
        series = ids_of(ids, "vocabulary").alias("id")
        if series.null_count():
            raise InputError("vocabulary: null ids; every id must be there.")
        self._ids = series.rechunk()
        # Ascending integers, the usual case, are looked up by bisection; anything else by a hash join.
        self._ascending: NDArray[np.int64] | None = None
        if series.dtype == pl.Int64:
            values = self._ids.to_numpy()
            if len(values) < 2 or bool(np.all(values[1:] > values[:-1])):
                self._ascending = values
        # Ascending ids cannot repeat; for a million of others the check costs a tenth of a second.
        if self._ascending is None and series.n_unique() != len(series):
            raise InputError("vocabulary: repeated ids; each id stands once.")

    @property
    def ids(self) -> pl.Series:
        """The ids, position = code: Int64 or String."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._ids.equals(other._ids, check_dtypes=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} ids, {self._ids.dtype})"

    def encode(self, ids: IdValues) -> NDArray[np.int64]:
        """Codes of `ids`, int64 [len(ids)]; -1 where unknown or null.

        Text is accepted for an integer vocabulary when all of it parses (a command line passes ``"1"``), and
        integers for a text vocabulary.

        Raises:
            InputError: ids of another or of mixed types.
        """
        wanted = ids_of(ids, "ids")
        if not len(wanted) or not len(self):
            return np.full(len(wanted), -1, dtype=np.int64)
        if wanted.dtype != self._ids.dtype:
            if self._ids.dtype == pl.Int64:
                parsed = wanted.cast(pl.Int64, strict=False)
                if parsed.null_count() > wanted.null_count():
                    wrong = wanted.filter(parsed.is_null() & wanted.is_not_null())[0]
                    raise InputError(f"ids: {wrong!r} is not an integer, and this vocabulary has integer ids.")
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
        """Ids of `codes`, a Series of the vocabulary's type; null where the code is -1.

        Raises:
            IndexError: a code outside ``-1 .. len - 1``.
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
        """Write to a Parquet file (one column, ``id``), complete or not at all."""
        with whole_file(Path(path)) as partial:
            pl.DataFrame({"id": self._ids}).write_parquet(partial, compression="lz4")

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read what `write` wrote.

        Raises:
            InputError: the file is missing, damaged or something else.
        """
        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{path}: not a readable vocabulary ({str(error).splitlines()[0]}).") from None
        if table.columns != ["id"]:
            raise InputError(f"{path}: expected one column 'id', found {listed(table.columns)}.")
        return cls(table["id"])
