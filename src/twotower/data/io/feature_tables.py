"""Feature tables of items and queries, joined to a vocabulary by id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.io.readers import ROW, FileSource, FrameSource, open_source
from twotower.data.schema.account import Account
from twotower.data.schema.columns import USUAL_NAMES, plain_name, usual_column
from twotower.data.schema.vocabulary import Vocabulary, ids_of, listed
from twotower.errors import InputError

TableLike = str | Path | Any
#: Role of a table -> roles that a caller can assign to its columns.
TABLE_ROLES = {"item": ("item", "title"), "query": ("query",)}


def table_columns(given: Mapping[str, str] | None, role: str) -> dict[str, str]:
    """Return the columns that a caller names for a feature table, by role.

    Raises:
        InputError: a role is unknown.
    """
    found = {name: str(column) for name, column in (given or {}).items() if column is not None}
    for name in found:
        if name not in TABLE_ROLES[role]:
            raise InputError(f"{role}_columns: {name!r} is not a role; the roles are {listed(TABLE_ROLES[role])}.")
    return found


class FeatureTable:
    """A feature table with one row per id, validated but not yet joined.

    Args:
        table: path of a Parquet, CSV or TSV file, or a data frame.
        role: "item" or "query".
        id_column: name of the id column in the interactions, tried before the usual names.
        columns: role (`TABLE_ROLES`) -> column; the columns of other roles are found by name. The title becomes the
            column "title".

    Raises:
        InputError: the table is unreadable or has no id column, or an id is null or repeated.
    """

    def __init__(self, table: TableLike, role: str, id_column: str, columns: Mapping[str, str] | None = None) -> None:
        self.role = role
        columns = table_columns(columns, role)
        source = open_source(Path(table)) if isinstance(table, str | Path) else FrameSource(table, f"{role} table")
        self.where = source.name
        frame = pl.concat(source.chunks(source.columns))
        for column in columns.values():
            if column not in frame.columns:
                raise InputError(
                    f"{source.name}: no column {column!r}, named in {role}_columns. Columns found: "
                    f"{listed(source.columns)}."
                )
        self.id_column = columns.get(role) or self._find_id(source, id_column)
        raw = frame[self.id_column]
        if raw.null_count():
            row = frame[ROW][int(raw.is_null().arg_true()[0])]
            raise InputError(f"{self.where}: column {self.id_column!r}, row {row}: empty {role} id.")
        ids = ids_of(raw, f"{self.where}: column {self.id_column!r}")
        if source.text:
            ids = ids.str.strip_chars()
            frame = frame.with_columns(ids.alias(self.id_column))
        self.copies = 0
        repeated = ids.is_first_distinct().not_()
        if repeated.any():  # exact copies of a row are harmless
            distinct = frame.unique(source.columns, keep="first", maintain_order=True)
            self.copies = len(frame) - len(distinct)
            frame, ids = distinct, ids.filter(frame[ROW].is_in(distinct[ROW].implode()))
            repeated = ids.is_first_distinct().not_()
        if repeated.any():
            at = int(repeated.arg_true()[0])
            raise InputError(
                f"{self.where}: column {self.id_column!r}, row {frame[ROW][at]}: {role} {ids[at]!r} occurs in an "
                "earlier row; expected one row per id."
            )
        frame = frame.drop(ROW)
        if (title := columns.get("title", "title")) != "title":
            if "title" in frame.columns:
                raise InputError(
                    f"{self.where}: {title!r} is named as the title, but a column 'title' exists too; rename one."
                )
            frame = frame.rename({title: "title"})
        if source.text:
            frame = frame.with_columns(typed(frame[name]) for name in frame.columns if name != self.id_column)
        self.ids, self.frame = ids, frame

    def _find_id(self, source: FileSource, id_column: str) -> str:
        same = [name for name in source.columns if plain_name(name) == plain_name(id_column)]
        if len(same) == 1:
            return same[0]
        found = usual_column(source.columns, USUAL_NAMES[self.role], self.role, source.name)
        if found is None:
            raise InputError(
                f"{source.name}: no {self.role} id column; expected {id_column!r}. "
                f"Columns found: {listed(source.columns)}."
            )
        return found

    def ids_as(self, dtype: Any) -> pl.Series:
        """Convert the ids to the type of a vocabulary; ids that cannot be converted become null."""
        return self.ids if self.ids.dtype == dtype else self.ids.cast(dtype, strict=False)

    def join_to(self, vocabulary: Vocabulary, account: Account) -> pl.DataFrame:
        """Join the table to a vocabulary: row i describes code i, with nulls for an id without a row.

        Raises:
            InputError: the table and the vocabulary have no id in common.
        """
        ids = self.ids_as(vocabulary.ids.dtype).alias(self.id_column)
        wanted = pl.DataFrame({self.id_column: vocabulary.ids})
        known = int(wanted[self.id_column].is_in(ids.drop_nulls().implode()).sum())
        if not known:
            raise InputError(
                f"{self.where}: none of its {len(ids):,} {self.role} ids occurs in the interactions; the first id of "
                f"the table is {ids_of(self.ids, '')[0]!r}, the first id of the interactions {vocabulary.ids[0]!r}."
            )
        if self.copies:
            account.add(f"{self.role} table rows repeated", self.copies, "exact copies of earlier rows, left out")
        if known < len(vocabulary):
            account.add(f"{self.role} ids without features", len(vocabulary) - known, "their features are null")
        if known < len(ids):
            account.add(
                f"{self.role} table rows unused", len(ids) - known, "their ids occur in no interaction"
                + ("; data.catalog=table keeps them" if self.role == "item" else ""),
            )  # fmt: skip
        return wanted.join(self.frame.with_columns(ids), on=self.id_column, how="left", maintain_order="left")


def described(table: pl.DataFrame | None, count: int) -> NDArray[np.bool_]:
    """Return which rows of a joined table have a value other than the id, bool [count]; all False for None."""
    if table is None or table.width < 2:
        return np.zeros(count, dtype=np.bool_)
    own = table.columns[0]
    return table.select(pl.any_horizontal(pl.exclude(own).is_not_null())).to_series().to_numpy()


def require_column(table: pl.DataFrame | None, side: str, column: str, setting: str) -> pl.Series:
    """Return a column of a joined table: row i belongs to code i, with nulls for ids without a row.

    Args:
        table: the item or query table of `Interactions`.
        side: "items" or "queries".
        column: name of the column.
        setting: the setting that names the column; messages begin with it.

    Raises:
        InputError: the data has no such table, or the table has no such column.
    """
    if table is None:
        raise InputError(f"{setting}: the data has no table of {side}; set data.{side}")
    if column not in table.columns:
        raise InputError(f"{setting}: no column {column!r}; the table of {side} has {listed(table.columns)}")
    return table[column]


def typed(column: pl.Series) -> pl.Series:
    """Convert a text column to integers or floats if every value parses; blanks around a number are ignored."""
    if column.dtype != pl.String:
        return column
    present = column.drop_nulls()
    text = column.str.strip_chars() if len(present) and present[0] != present[0].strip() else column
    for dtype in (pl.Int64(), pl.Float64()):
        numbers = text.cast(dtype, strict=False)
        if numbers.null_count() == column.null_count() and len(column) > column.null_count():
            # Values with leading zeros, such as zip codes, are not numbers.
            padded = text.drop_nulls().str.contains(r"^[+-]?0\d")
            return column if padded.any() else numbers
    return column
