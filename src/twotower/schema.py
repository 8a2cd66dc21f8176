"""Column roles, and the vocabularies that map ids of any type to dense codes and back."""

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

# Usual column names, in tiers: the first tier with a match decides; two matches in one tier are ambiguous. Names are
# compared without case, spaces, dashes, underscores and the ":token" of typed headers.
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
    """Normalise a column name for comparison: lower case, no spaces, dashes, underscores or ``:type``."""
    return re.sub(r"[\s_\-]+", "", column.split(":", maxsplit=1)[0]).lower()


def listed(columns: Sequence[str]) -> str:
    """Format column names for a message, at most 20 of them."""
    shown = ", ".join(repr(c) for c in columns[:20])
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "") if columns else "none"


def usual_column(columns: Sequence[str], tiers: Sequence[Sequence[str]], role: str, where: str) -> str | None:
    """Find the one column with a usual name, or None.

    Raises:
        InputError: two columns match equally well.
    """
    for tier in tiers:
        found = [c for c in columns if plain_name(c) in tier]
        if len(found) > 1:
            raise InputError(
                f"{where}: columns {listed(found)} could each be the {role}; choose one: data.columns.{role}="
                f"{found[0]} (in Python columns={{{role!r}: {found[0]!r}}}). Columns found: {listed(columns)}."
            )
        if found:
            return found[0]
    return None


@dataclass(frozen=True)
class Columns:
    """The column of each role; a role left None is found by the usual column names.

    Attributes:
        query: id of the user, customer, session or query. Required in the file.
        item: id of the item, or a list of items in order. Required in the file.
        timestamp: time of the interaction: dates, ISO text, or unix seconds, milliseconds or microseconds.
        weight: weight of a row in the loss, finite and not negative.
        label: a rating or score; see ``positive_label`` of `Interactions.read`.
        group: market, or another partition of the rows.
    """

    query: str | None = None
    item: str | None = None
    timestamp: str | None = None
    weight: str | None = None
    label: str | None = None
    group: str | None = None

    @classmethod
    def of(cls, given: Columns | Mapping[str, str | None] | None) -> Columns:
        """Convert the caller's argument: a `Columns`, a mapping from role to column, or None.

        Raises:
            InputError: the mapping names a role that does not exist, or one column has two roles.
        """
        if given is None:
            return cls()
        if not isinstance(given, Columns):
            known = [f.name for f in fields(cls)]
            for role in given:
                if role not in known:
                    raise InputError(f"columns: {role!r} is not a role; the roles are {listed(known)}.")
            given = cls(**given)
        named = [name for name in asdict(given).values() if name is not None]
        for name in named:
            if named.count(name) > 1:
                raise InputError(f"columns: {name!r} has two roles; a column can have only one.")
        return given

    def resolve(self, columns: Sequence[str], where: str) -> Columns:
        """Fill in the roles for a file with these columns.

        Args:
            columns: names of the file's columns.
            where: name of the file, for messages.

        Raises:
            InputError: a named column does not exist, a required one is missing, or two match equally well.
        """
        found: dict[str, str | None] = {}
        taken = {name for name in asdict(self).values() if name is not None}
        for role, tiers in USUAL_NAMES.items():
            named: str | None = getattr(self, role)
            if named is not None:
                match = named if named in columns else named.split(":")[0]
                if match not in columns:
                    raise InputError(
                        f"{where}: column {named!r}, given as the {role}, does not exist. "
                        f"Columns found: {listed(columns)}."
                    )
                found[role] = match
                continue
            found[role] = usual_column([c for c in columns if c not in taken], tiers, role, where)
            if found[role] is None and role in ("query", "item"):
                usual = "user_id, customer_id, query_id" if role == "query" else "item_id, product_id, movie_id"
                raise InputError(
                    f"{where}: no {role} column found (usual names: {usual}); name it: data.columns.{role}=NAME "
                    f"(in Python columns={{{role!r}: NAME}}). Columns found: {listed(columns)}."
                )
        return Columns(**found)

    def roles(self) -> dict[str, str]:
        """Map each role that has a column to that column."""
        return {role: name for role, name in asdict(self).items() if name is not None}


def title_column(table: pl.DataFrame) -> str | None:
    """Find the human-readable column of an item table (title, name or description), or None."""
    for tier in TITLE_NAMES:
        for column in table.columns:
            if plain_name(column) in tier and table.schema[column] == pl.String:
                return column
    return None


def ids_of(values: IdValues, where: str) -> pl.Series:
    """Convert ids to a Series of Int64 or String, the two id types.

    Raises:
        InputError: floats, booleans, dates or mixed types, or an integer above 2^63 - 1.
    """
    try:
        series = values if isinstance(values, pl.Series) else pl.Series("id", values)
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
    if dtype == pl.Object:
        raise InputError(f"{where}: ids of mixed types; ids must be all integers or all text. Convert them first.")
    raise InputError(
        f"{where}: ids of type {dtype}; ids must be integers or text"
        + (" (floats lose ids above 2^53)." if dtype.is_float() else ".")
        + " Convert the column first."
    )


class Vocabulary:
    """The ids of the queries, items or groups; the code of an id is its position.

    Args:
        ids: distinct ids, integers or text, no nulls.

    Raises:
        InputError: nulls, repeats, or ids that are neither integers nor text.
    """

    def __init__(self, ids: IdValues) -> None:
        series = ids_of(ids, "vocabulary").alias("id")
        if series.null_count():
            raise InputError("vocabulary: null ids; every id needs a value.")
        self._ids = series.rechunk()
        # Ascending integers, the usual case, are looked up by binary search; anything else by a hash join.
        self._ascending: NDArray[np.int64] | None = None
        if series.dtype == pl.Int64:
            values = self._ids.to_numpy()
            if len(values) < 2 or bool(np.all(values[1:] > values[:-1])):
                self._ascending = values
        # Ascending ids cannot repeat. For other ids the check costs a tenth of a second per million.
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

        An integer vocabulary accepts text if all of it parses (a command line passes ``"1"``); a text vocabulary
        accepts integers.

        Raises:
            InputError: ids of a wrong type or of mixed types.
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
        """Look up the ids of codes, a Series of the vocabulary's type; null where the code is -1.

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
        """Write to a Parquet file with one column, ``id``; atomic."""
        with whole_file(Path(path)) as partial:
            pl.DataFrame({"id": self._ids}).write_parquet(partial, compression="lz4")

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read a file written by `write`.

        Raises:
            InputError: the file is missing, damaged, or not a vocabulary.
        """
        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{path}: not a readable vocabulary ({str(error).splitlines()[0]}).") from None
        if table.columns != ["id"]:
            raise InputError(f"{path}: expected one column 'id', found {listed(table.columns)}.")
        return cls(table["id"])
