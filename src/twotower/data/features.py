"""Feature tables of items and queries, joined to a vocabulary by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from twotower.data.account import Account
from twotower.data.reading import ROW, FrameSource, Source, open_source
from twotower.errors import InputError
from twotower.schema import USUAL_NAMES, Vocabulary, ids_of, listed, plain_name, usual_column

TableLike = str | Path | Any


class FeatureTable:
    """A table with one row for each id, checked but not yet joined.

    Args:
        table: path of a Parquet, CSV or TSV file, or a data frame.
        role: "item" or "query".
        id_column: what the interactions call their id; looked for first, then the usual names.

    Raises:
        InputError: unreadable, no id column, null or repeated ids.
    """

    def __init__(self, table: TableLike, role: str, id_column: str) -> None:
        self.role = role
        source = open_source(Path(table)) if isinstance(table, str | Path) else FrameSource(table, f"{role} table")
        self.where = source.name
        frame = pl.concat(source.chunks(source.columns))
        self.id_column = self._find_id(source, id_column)
        raw = frame[self.id_column]
        if raw.null_count():
            row = frame[ROW][int(raw.is_null().arg_true()[0])]
            raise InputError(f"{self.where}: column {self.id_column!r}, row {row}: empty {role} id.")
        ids = ids_of(raw, f"{self.where}: column {self.id_column!r}")
        repeated = ids.is_first_distinct().not_()
        if repeated.any():
            at = int(repeated.arg_true()[0])
            raise InputError(
                f"{self.where}: column {self.id_column!r}, row {frame[ROW][at]}: {role} {ids[at]!r} stands there "
                "before; expected one row for each id."
            )
        frame = frame.drop(ROW)
        if source.text:
            frame = frame.with_columns(typed(frame[name]) for name in frame.columns if name != self.id_column)
        self.ids, self.frame = ids, frame

    def _find_id(self, source: Source, id_column: str) -> str:
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
        """The ids in a vocabulary's type; null where they cannot be."""
        return self.ids if self.ids.dtype == dtype else self.ids.cast(dtype, strict=False)

    def joined(self, vocabulary: Vocabulary, account: Account) -> pl.DataFrame:
        """The table in the order of the vocabulary, row i = code i; nulls where it has no row for an id.

        Raises:
            InputError: not one id in common.
        """
        ids = self.ids_as(vocabulary.ids.dtype).alias(self.id_column)
        wanted = pl.DataFrame({self.id_column: vocabulary.ids})
        known = int(wanted[self.id_column].is_in(ids.drop_nulls().implode()).sum())
        if not known:
            raise InputError(
                f"{self.where}: not one of its {len(ids):,} {self.role} ids occurs in the interactions; "
                f"it begins with {ids_of(self.ids, '')[0]!r}, they with {vocabulary.ids[0]!r}."
            )
        if known < len(vocabulary):
            account.add(f"{self.role} ids without features", len(vocabulary) - known, "their features are null")
        if known < len(ids):
            account.add(
                f"{self.role} table rows unused", len(ids) - known, "they occur in no interaction"
                + ("; catalog='table' keeps them" if self.role == "item" else ""),
            )  # fmt: skip
        return wanted.join(self.frame.with_columns(ids), on=self.id_column, how="left", maintain_order="left")


def typed(column: pl.Series) -> pl.Series:
    """A text column as integers or floats when all of it parses."""
    for dtype in (pl.Int64(), pl.Float64()):
        numbers = column.cast(dtype, strict=False)
        if numbers.null_count() == column.null_count() and len(column) > column.null_count():
            # Leading zeros (zip codes) are names, not numbers.
            padded = column.drop_nulls().str.contains(r"^[+-]?0\d")
            return column if padded.any() else numbers
    return column
