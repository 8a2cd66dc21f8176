"""Item filters: allow and deny lists of ids, and conditions on the item table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.schema.vocabulary import Vocabulary, listed
from twotower.errors import InputError

#: Longest accepted condition, in characters; the parser recurses, and no one writes a longer one by hand.
LONGEST = 4000

#: Characters of a condition that an error message shows.
SHOWN = 80

#: A subquery could read files of this machine as tables. Also refused inside quotes: only the parser knows its quoting.
SUBQUERY = re.compile(r"\b(select|values)\b", re.IGNORECASE)

Mask = NDArray[np.bool_]


def allowed_items(
    items: Vocabulary,
    table: pl.DataFrame | None,
    *,
    condition: str | None = None,
    allow: Sequence[Any] | None = None,
    deny: Sequence[Any] | None = None,
) -> Mask | None:
    """Return the items that pass a condition, an allow list and a deny list.

    Args:
        items: the item vocabulary.
        table: one row for each item code, or None.
        condition: SQL on the columns of the table, such as `country = 'FR' and price < 20`; an item for which it is
            unknown (NULL) does not pass.
        allow: the only ids that may be returned; ids that are not in the catalog are ignored.
        deny: ids that must not be returned; unknown ids are ignored.

    Returns:
        bool [N], or None if every item passes.

    Raises:
        InputError: the condition cannot be parsed, names an unknown column, compares incompatible types, or there is no
            item table; a list is not a list of ids; no id of the allow list is in the catalog.
    """
    mask: Mask | None = None
    if condition is not None:
        mask = condition_mask(condition, table, len(items))
    if allow is not None:
        codes = _known(items, allow, "allow")
        if not len(codes):
            raise InputError("allow: none of its ids is in the catalog; expected at least one known item id")
        listed_items = np.zeros(len(items), dtype=np.bool_)
        listed_items[codes] = True
        mask = listed_items if mask is None else mask & listed_items
    if deny is not None and len(codes := _known(items, deny, "deny")):
        mask = np.ones(len(items), dtype=np.bool_) if mask is None else mask.copy()
        mask[codes] = False
    return mask


def condition_mask(condition: str, table: pl.DataFrame | None, num_items: int) -> Mask:
    """Return the items for which a condition is true, bool [N].

    The condition is parsed and evaluated by polars' SQL engine: comparisons, `and`, `or`, `not`, `in`, `between`,
    `like`, `is null`, arithmetic and the SQL functions of one row. It can read the item table only.

    Raises:
        InputError: see `allowed_items`.
    """
    if table is None:
        raise InputError("filter: the model has no item table; train with --items FILE to filter by its columns")
    if not condition.strip() or len(condition) > LONGEST:
        raise InputError(f"filter: expected a condition of 1 to {LONGEST:,} characters, found {len(condition):,}")
    if SUBQUERY.search(condition):
        raise InputError("filter: expected a condition on the columns of one item, found the word SELECT or VALUES")
    shown = condition if len(condition) <= SHOWN else condition[:SHOWN] + "..."
    try:
        expression = pl.sql_expr(condition)
        columns = expression.meta.root_names()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"filter {shown!r}: {_first_line(error)}; expected SQL such as price < 20") from None
    for column in columns:
        if column not in table.columns:
            raise InputError(
                f"filter {shown!r}: no column {column!r} in the item table; found {listed(table.columns)}"
                + ("" if column.isidentifier() else " (put text in single quotes)")
            )
    try:
        # `implode` keeps the number of values: broadcasting would hide a condition that aggregates the whole table.
        result = table.select(pl.len().alias("n"), expression.implode().alias("passes"))
        passes = result["passes"][0]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"filter {shown!r}: {_first_line(error)} ({_types(table, columns)})") from None
    if not isinstance(passes, pl.Series) or passes.dtype != pl.Boolean or len(passes) != num_items:
        found = passes.dtype if isinstance(passes, pl.Series) else type(passes).__name__
        raise InputError(
            f"filter {shown!r}: expected a condition that is true or false for each item, found {found} "
            f"({_types(table, columns)})"
        )
    return passes.fill_null(value=False).to_numpy()


def _known(items: Vocabulary, ids: Sequence[Any], name: str) -> NDArray[np.int64]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InputError(f"{name}: expected a list of item ids, found {ids!r}")
    if not len(ids):
        return np.empty(0, dtype=np.int64)
    try:
        codes = items.encode(list(ids))
    except InputError:  # an id of another type must not fail the others
        codes = np.concatenate([_one(items, item) for item in ids])
    return codes[codes >= 0]


def _one(items: Vocabulary, item: Any) -> NDArray[np.int64]:
    try:
        return items.encode([item])
    except InputError:
        return np.full(1, -1, dtype=np.int64)


def _types(table: pl.DataFrame, columns: Sequence[str]) -> str:
    return ", ".join(f"{column} is {table.schema[column]}" for column in dict.fromkeys(columns)) or "no column named"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__
    return text if len(text) <= 2 * SHOWN else text[: 2 * SHOWN] + "..."
