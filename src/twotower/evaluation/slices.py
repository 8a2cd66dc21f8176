"""Slices of an evaluation: head, mid and tail, popularity deciles, cold and warm, and columns that the user names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data import Holdout, Interactions
from twotower.data.io.feature_tables import require_column
from twotower.data.schema.vocabulary import texts_of
from twotower.errors import InputError

SLICES = ("head", "mid", "tail")
"""Popularity thirds, by index."""

DECILES = tuple(f"decile {number}" for number in range(1, 11))
"""Popularity deciles, by index: "decile 1" is the smallest set of items with a tenth of the training interactions."""

COLD = ("cold items", "warm items", "cold queries", "warm queries")
"""Items and queries without (cold) and with (warm) training interactions."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A subset of the items, which slices the targets, or a subset of the queries.

    Attributes:
        items: bool [N], items of the slice; None for all items.
        queries: bool [E], queries of the slice; None for all queries.
    """

    items: NDArray[np.bool_] | None = None
    queries: NDArray[np.bool_] | None = None


def popularity_parts(item_counts: NDArray[np.integer], parts: int) -> NDArray[np.int64]:
    """Split the catalog into parts with about equally many training interactions.

    Items are sorted by training count, descending, ties by code. With c_1 >= c_2 >= ... the counts in that order and n
    their sum, the item at position p belongs to

        part  min( floor( parts (c_1 + ... + c_{p-1}) / n ), parts - 1 )

    and items never seen in training belong to the last part. Parts have about equally many interactions but very
    different numbers of items; the first part has the fewest. A part may be empty if a single item has more
    than one part's share.

    Args:
        item_counts: [N] training interactions of each item.
        parts: number of parts, at least 1.

    Returns:
        [N] int64 in 0 .. parts - 1, 0 the most popular.

    Raises:
        InputError: `parts` is less than 1.
    """
    if parts < 1:
        raise InputError(f"parts must be at least 1, got {parts}")
    counts = np.asarray(item_counts, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    total = int(counts.sum())
    part = np.full(len(counts), parts - 1, dtype=np.int64)
    if total:
        part[order] = np.minimum(parts * before // total, parts - 1)
    return part


def popularity_thirds(item_counts: NDArray[np.integer]) -> NDArray[np.int8]:
    """Assign each item to a third of the training interactions: `popularity_parts` with three parts.

    Args:
        item_counts: [N] training interactions of each item.

    Returns:
        [N] int8: 0 head, 1 mid, 2 tail (including items never seen in training).
    """
    return popularity_parts(item_counts, len(SLICES)).astype(np.int8)


def standard_slices(
    item_counts: NDArray[np.int64], query_counts: NDArray[np.int64], queries: NDArray[np.int64]
) -> dict[str, dict[str, Slice]]:
    """Build the slices of every evaluation, by group ("thirds", "deciles", "cold") and name.

    Args:
        item_counts: [N] training interactions of each item.
        query_counts: [Q] training interactions of each query.
        queries: [E] query codes of the holdout; -1 for a query outside the vocabulary.

    Returns:
        The groups and the slices of each group, in display order.
    """
    warm_items = item_counts > 0
    warm_queries = np.zeros(len(queries), dtype=bool)
    known = (queries >= 0) & (queries < len(query_counts))
    warm_queries[known] = query_counts[queries[known]] > 0
    cold = (Slice(~warm_items), Slice(warm_items), Slice(queries=~warm_queries), Slice(queries=warm_queries))
    return {
        "thirds": _numbered(SLICES, popularity_parts(item_counts, len(SLICES))),
        "deciles": _numbered(DECILES, popularity_parts(item_counts, len(DECILES))),
        "cold": dict(zip(COLD, cold, strict=True)),
    }


def event_slices(holdout: Holdout) -> dict[str, dict[str, Slice]]:
    """Slice the queries by their event type; return no group if the rows have no event types."""
    if holdout.event is None or holdout.context is None:
        return {}
    types = holdout.context[holdout.event]
    names = types.unique().sort().to_list()
    return {"events": {f"{holdout.event}={name}": Slice(queries=(types == name).to_numpy()) for name in names}}


def flat(groups: Mapping[str, Mapping[str, Slice]]) -> dict[str, Slice]:
    """Merge the slices of all groups into one mapping by name."""
    return {name: part for group in groups.values() for name, part in group.items()}


def _numbered(names: tuple[str, ...], part: NDArray[np.int64]) -> dict[str, Slice]:
    return {name: Slice(part == number) for number, name in enumerate(names)}


#: Largest number of values of a column that get their own slices.
MOST_VALUES = 20
MISSING = "missing"
OTHER = "other"
#: Number of slices of a numeric column.
_PARTS = 4


def check_slices(train: Interactions, slices: Sequence[str]) -> None:
    """Reject slices that the data does not support, before any work is done.

    Args:
        train: interactions with their tables.
        slices: such as `"items.genres"` or `"queries.age"`.

    Raises:
        InputError: a name has the wrong form, the table does not exist or has no such column, or its values have no
            text form.
    """
    for name in slices:
        _parts(_column(train, name))


def column_slices(
    train: Interactions, queries: NDArray[np.int64], slices: Sequence[str]
) -> dict[str, dict[str, Slice]]:
    """Build slices by columns: a column of `items` slices the targets, a column of `queries` slices the queries.

    - Text and other values: one slice for each of the 20 most frequent values of the table (ties by value), and "other"
      for the rest.
    - Lists: a row belongs to the slice of each of its values.
    - Numbers, dates and times with more than 4 distinct values: quarters of the table's rows, cut at the 1/4, 1/2 and
      3/4 quantiles. Equal values stay together, so a quarter may be larger or missing. The name shows the smallest and
      largest value.
    - Nulls, NaN, empty lists, and queries without a row: "missing".

    Args:
        train: interactions with their tables.
        queries: [E] query codes, -1 for a query outside the vocabulary.
        slices: such as `"items.genres"` or `"queries.age"`.

    Returns:
        For each column, its slices by name, such as `"items.genres=Comedy"`; most frequent first, numbers ascending.

    Raises:
        InputError: as in `check_slices`.
    """
    groups: dict[str, dict[str, Slice]] = {}
    for name in slices:
        values = _column(train, name)
        if name.startswith("items."):
            groups[name] = {f"{name}={value}": Slice(items=rows) for value, rows in _parts(values).items()}
            continue
        unknown = queries < 0
        of_queries = {value: rows[queries] & ~unknown for value, rows in _parts(values).items()}
        if unknown.any():
            of_queries[MISSING] = of_queries.get(MISSING, np.zeros(len(queries), dtype=bool)) | unknown
        groups[name] = {f"{name}={value}": Slice(queries=rows) for value, rows in of_queries.items()}
    return groups


def _column(train: Interactions, name: str) -> pl.Series:
    side, _, column = name.partition(".")
    tables = {"items": train.item_table, "queries": train.query_table}
    if side not in tables or not column:
        raise InputError(f"evaluation.slices: {name!r}: expected items.COLUMN or queries.COLUMN, as in items.genres")
    return require_column(tables[side], side, column, f"evaluation.slices: {name!r}")


def _parts(values: pl.Series) -> dict[str, NDArray[np.bool_]]:
    """Group the rows of a table by value; return the name of each value and which rows have it, bool [rows]."""
    if isinstance(values.dtype, pl.List | pl.Array):
        if isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        rows = pl.Series(np.arange(len(values))).repeat_by(values.list.len().fill_null(0)).explode().drop_nulls()
        return _by_value(values.filter(values.list.len() > 0).explode(), rows.to_numpy(), len(values))
    if values.dtype.is_float():
        values = values.fill_nan(None)
    if (values.dtype.is_numeric() or values.dtype.is_temporal()) and values.drop_nulls().n_unique() > _PARTS:
        return _quarters(values)
    return _by_value(values, np.arange(len(values)), len(values))


def _by_value(values: pl.Series, rows: NDArray[np.int64], count: int) -> dict[str, NDArray[np.bool_]]:
    """Group rows by value; row `rows[i]` of the table has the value `values[i]`."""
    frame = pl.DataFrame({"value": texts_of(values, "evaluation.slices"), "row": rows}).drop_nulls().unique()
    order = frame.group_by("value").len().sort(["len", "value"], descending=[True, False])["value"].to_list()
    parts: dict[str, NDArray[np.bool_]] = {}
    for value in order[:MOST_VALUES]:
        parts[value] = _marked(frame.filter(pl.col("value") == value), count)
    if rest := order[MOST_VALUES:]:
        others = _marked(frame.filter(pl.col("value").is_in(rest)), count)
        parts[OTHER] = others | parts.pop(OTHER, np.zeros(count, dtype=bool))
    return _with_missing(parts, ~_marked(frame, count))


def _quarters(values: pl.Series) -> dict[str, NDArray[np.bool_]]:
    place = values.to_physical().cast(pl.Float64)
    known = place.drop_nulls().to_numpy()
    edges = np.quantile(known, np.arange(1, _PARTS) / _PARTS)
    quarter = np.searchsorted(edges, place.fill_null(np.inf).to_numpy(), side="left")
    missing = values.is_null().to_numpy()
    parts: dict[str, NDArray[np.bool_]] = {}
    for number in range(_PARTS):
        rows = (quarter == number) & ~missing
        if rows.any():
            inside = values.filter(pl.Series(rows))
            low, high = inside.min(), inside.max()
            parts[_text(low) if low == high else f"{_text(low)} to {_text(high)}"] = rows
    return _with_missing(parts, missing)


def _with_missing(parts: dict[str, NDArray[np.bool_]], missing: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    if missing.any():
        parts[MISSING] = parts.pop(MISSING, np.zeros_like(missing)) | missing
    return parts


def _marked(frame: pl.DataFrame, count: int) -> NDArray[np.bool_]:
    marked = np.zeros(count, dtype=bool)
    marked[frame["row"].to_numpy()] = True
    return marked


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
