"""Standard slices of an evaluation: head, mid and tail, popularity deciles, cold and warm."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLICES = ("head", "mid", "tail")
"""Popularity thirds, by index."""

DECILES = tuple(f"decile {number}" for number in range(1, 11))
"""Popularity deciles, by index: "decile 1" is the fewest items with together a tenth of the training interactions."""

COLD = ("cold items", "warm items", "cold queries", "warm queries")
"""Items and queries not seen in training, or seen."""


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

    and items never seen in training belong to the last part. So the first part is the fewest items with together
    1 / parts of the interactions: parts have about equal interactions but very different numbers of items. A part is
    empty if a single item has more than its share.

    Args:
        item_counts: [N] training interactions of each item.
        parts: number of parts, at least 1.

    Returns:
        [N] int64 in 0 .. parts - 1, 0 the most popular.

    Raises:
        ValueError: fewer than 1 part.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
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
        Groups in order, and slices of a group in order.
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


def flat(groups: Mapping[str, Mapping[str, Slice]]) -> dict[str, Slice]:
    """Merge the slices of all groups into one mapping by name."""
    return {name: part for group in groups.values() for name, part in group.items()}


def _numbered(names: tuple[str, ...], part: NDArray[np.int64]) -> dict[str, Slice]:
    return {name: Slice(part == number) for number, name in enumerate(names)}
