"""Column roles, and the usual column names of each role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import polars as pl

from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError

#: Stands for no column where a column name is expected, even if a column has a usual name of the role.
NO_COLUMN = "none"

# Usual column names, in tiers: the first tier with a match decides; two matches in one tier are ambiguous. Comparisons
# ignore case, spaces, dashes, underscores and the ":token" of typed headers.
USUAL_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "query": (
        ("userid", "user", "customerid", "customer", "householdid", "visitorid", "visitor", "memberid", "clientid"),
        ("queryid", "query", "sessionid", "session", "accountid", "profileid"),
    ),
    "item": (
        (
            *("itemid", "item", "movieid", "productid", "stockcode", "articleid", "sku", "asin", "bookid", "trackid"),
            *(
                "songid",
                "videoid",
                "newsid",
                "businessid",
                "venueid",
                "documentid",
                "docid",
                "adid",
                "gameid",
                "recipeid",
            ),
        ),
        ("items", "itemids", "sequence", "itemsequence", "product", "movie", "article"),
    ),
    "timestamp": (
        ("timestamp", "timestamps", "ts", "datetime", "eventtime", "transactiontimestamp", "invoicedate", "unixtime"),
        ("time", "date", "createdat", "orderdate", "tdat", "eventdate", "day"),
        ("dt", "ds"),  # folders of days, as in Hive and Airflow
    ),
    "weight": (("weight", "sampleweight", "weights"),),
    "label": (("rating", "label", "score", "ratings", "stars"),),
    "group": (("group", "market"),),
}
TITLE_NAMES = (("title", "movietitle", "itemtitle", "producttitle"), ("name", "itemname", "productname", "prodname"),
               ("description",))  # fmt: skip


def plain_name(column: str) -> str:
    """Normalise a column name for comparison: lower case, no spaces, dashes, underscores or ``:type``."""
    return re.sub(r"[\s_\-]+", "", column.split(":", maxsplit=1)[0]).lower()


def is_usual(name: str) -> bool:
    """Return whether a name is a usual column name of any role."""
    return any(plain_name(name) in tier for tiers in USUAL_NAMES.values() for tier in tiers)


_DATA_LIKE = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?|\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([ T].*)?")


def header_hint(names: Sequence[str]) -> str:
    """Return a sentence for an error message if the column names look like data; otherwise an empty string."""
    if any(_DATA_LIKE.fullmatch(name) for name in names):
        return " The first line looks like data: add a header line such as user_id,item_id,timestamp."
    return ""


def usual_column(columns: Sequence[str], tiers: Sequence[Sequence[str]], role: str, where: str) -> str | None:
    """Find the one column with a usual name; return None if there is none.

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
class ColumnRoles:
    """The column of each role: None to search for a usual column name, "none" (`NO_COLUMN`) for no column.

    Attributes:
        query: id of the user, customer, session or query; every file must have it.
        item: id of the item, or a list of items in order; every file must have it.
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
    def of(cls, given: ColumnRoles | Mapping[str, str | int | None] | None) -> ColumnRoles:
        """Convert the caller's argument to `ColumnRoles`.

        Args:
            given: a `ColumnRoles`, or a mapping from role to column, in which None means that the role has no column.
                A frame may have integers as column names. With None, all columns are found by their usual names.

        Raises:
            InputError: the mapping contains an unknown role, query or item has no column, or a column has two roles.
        """
        if given is None:
            return cls()
        if not isinstance(given, ColumnRoles):
            known = [f.name for f in fields(cls)]
            for role in given:
                if role not in known:
                    raise InputError(f"columns: {role!r} is not a role; the roles are {listed(known)}.")
            given = cls(**{role: NO_COLUMN if name is None else str(name) for role, name in given.items()})
        for role in ("query", "item"):
            if getattr(given, role) == NO_COLUMN:
                raise InputError(f"columns: {role}=none; the {role} needs a column.")
        named = [name for name in asdict(given).values() if name not in (None, NO_COLUMN)]
        for name in named:
            if named.count(name) > 1:
                raise InputError(f"columns: {name!r} has two roles; a column can have only one.")
        return given

    def resolve(self, columns: Sequence[str], where: str) -> ColumnRoles:
        """Fill in the roles for a file with these columns.

        Args:
            columns: names of the file's columns.
            where: name of the file, for messages.

        Raises:
            InputError: a named column does not exist, a required column is missing, or two columns match equally well.
        """
        found: dict[str, str | None] = {}
        taken = {name for name in asdict(self).values() if name is not None}
        for role, tiers in USUAL_NAMES.items():
            named: str | None = getattr(self, role)
            if named == NO_COLUMN:
                found[role] = None
                continue
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
                    f"(in Python columns={{{role!r}: NAME}}). Columns found: {listed(columns)}." + header_hint(columns)
                )
        return ColumnRoles(**found)

    def roles(self) -> dict[str, str]:
        """Map each role with a column to the name of that column."""
        return {role: name for role, name in asdict(self).items() if name is not None}


def title_column(table: pl.DataFrame) -> str | None:
    """Find the column with the titles, names or descriptions of an item table; return None if there is none."""
    for tier in TITLE_NAMES:
        for column in table.columns:
            if plain_name(column) in tier and table.schema[column] == pl.String:
                return column
    return None
