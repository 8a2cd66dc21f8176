"""Merging of vocabularies and feature tables of past and new data."""

from __future__ import annotations

import polars as pl

from twotower.data.io.feature_tables import described
from twotower.data.schema.vocabulary import Codes, Vocabulary
from twotower.errors import InputError


def union(first: pl.Series, second: pl.Series, side: str) -> Vocabulary:
    """Merge two lists of ids in ascending order, so that a code does not reveal whether an id is new.

    Raises:
        InputError: one vocabulary has integers, the other has text.
    """
    if first.dtype != second.dtype:
        raise InputError(
            f"{side} ids are {first.dtype} in the model and {second.dtype} in the new data; use the same type in both"
        )
    return Vocabulary(pl.concat([first.alias("id"), second.alias("id")]).unique().sort())


def item_map(old: Vocabulary, new: Vocabulary) -> Codes:
    """Map each old code to its new code, int64 [old ids]; -1 for an id that is not in the new vocabulary."""
    return new.encode(old.ids)


def joined_table(
    old: pl.DataFrame | None,
    old_ids: Vocabulary,
    new: pl.DataFrame | None,
    new_ids: Vocabulary,
    ids: Vocabulary,
) -> pl.DataFrame | None:
    """Merge two tables in the order of `ids`; an id in both tables gets the row of the new table.

    Args:
        old: table in the order of `old_ids`, with the id column first; or None.
        old_ids: vocabulary of the old table.
        new: table in the order of `new_ids`, with the id column first; or None.
        new_ids: vocabulary of the new table.
        ids: vocabulary of the result.

    Returns:
        All columns of both tables, null where there is no value; None if both tables are None.

    Raises:
        InputError: a column has a different type in the new table.
    """
    parts = []
    for table, vocabulary in ((new, new_ids), (old, old_ids)):
        if table is not None:
            own = table.columns[0]
            has_values = pl.Series(described(table, len(table)))
            parts.append(table.with_columns(vocabulary.ids.alias(own)).filter(has_values))
    if not parts:
        return None
    name = parts[0].columns[0]
    if len(parts) == 2:
        fresh, kept = parts[0], parts[1].rename({parts[1].columns[0]: name})
        kept = kept.filter(~kept[name].is_in(fresh[name].implode()))
        for column in kept.columns:
            if column in fresh.columns and not _can_be_merged(kept.schema[column], fresh.schema[column]):
                raise InputError(
                    f"item table: column {column!r} is {fresh.schema[column]} in the new table and "
                    f"{kept.schema[column]} in the model's; use the same type in both"
                )
        parts = [fresh, kept]
    merged = pl.concat(parts, how="diagonal_relaxed")
    return pl.DataFrame({name: ids.ids}).join(merged, on=name, how="left", maintain_order="left")


def _can_be_merged(first: pl.DataType, second: pl.DataType) -> bool:
    return first == second or pl.Null in (first, second) or (first.is_numeric() and second.is_numeric())
