"""A model's past, and the split of new days that stand after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.splits import Split
from twotower.schema import Vocabulary

Codes = NDArray[np.int64]

#: Columns of rows that are carried on where both the past and the new days have them.
CARRIED = ("timestamps", "weights", "groups")


@dataclass(frozen=True, eq=False)
class Past:
    """What a model was trained on, as its folder keeps it.

    Attributes:
        queries, items: its vocabularies.
        offsets, item_codes: its rows, those held out among them: int64 [Q+1], int32 [n], oldest first within a query.
        learnt: int64 [Q], how many rows of each query, from the first, it was trained on.
        columns: `timestamps`, `weights`, `groups` of the rows, where they are known.
        group_names: the groups' ids.
        item_table: one row for each item code, or None.
        fingerprint: of its data.
        last: the moment of its newest row, microseconds since 1970; None where rows have no time.
        context: of each row, or None.
    """

    queries: Vocabulary
    items: Vocabulary
    offsets: Codes
    item_codes: NDArray[np.int32]
    learnt: Codes
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    group_names: Vocabulary | None = None
    item_table: pl.DataFrame | None = None
    fingerprint: str = ""
    last: int | None = None
    context: pl.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class ContinuedSplit(Split):
    """A split of new days, with the past under the same vocabularies.

    `train` holds all that training may know: the past, what the parent held out of it, and the new days' training rows.
    `data` holds the new days' held-out rows as well.

    Attributes:
        learnt: bool [rows of train], those that the parent was trained on.
        query_map, item_map: new code of each of the parent's codes, int64; -1 for an item that was withdrawn.
        parent: fingerprint of the parent's data.
        new_item_table: what the new data says of items, in the order of their codes; `data.item_table` says besides
            what the parent knew.
        dates: first and last moment of the new rows, microseconds, or None.
    """

    learnt: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    query_map: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    item_map: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parent: str = ""
    dates: tuple[int, int] | None = None
    new_item_table: pl.DataFrame | None = None

    def rows_to_learn(self, replay: float, seed: int, *, whole: bool = False) -> Codes:
        """Row numbers of `train` that a training goes through: all that are new, and a sample of the parent's.

        Drawn once, without replacement, so that the frequency of items in the batches can be counted.

        Args:
            replay: rows of the parent for each new one; fewer where it has not so many.
            seed: of the draw.
            whole: take whole queries: all rows of those with a new one, which count as replayed, and then of others
                until there are enough. For towers that learn from whole sequences.
        """
        known, new = np.flatnonzero(self.learnt), np.flatnonzero(~self.learnt)
        size = min(round(replay * len(new)), len(known))
        draw = np.random.default_rng(seed)
        if not whole:
            drawn = draw.choice(known, size=size, replace=False) if size else known[:0]
            return np.sort(np.concatenate([new, drawn])).astype(np.int64)
        owner = self.train.query_codes()
        taken = np.zeros(self.train.num_queries, dtype=np.bool_)
        taken[owner[new]] = True
        sizes = np.diff(self.train.offsets)
        missing = size - int(taken[owner[known]].sum())
        if missing > 0:
            others = draw.permutation(np.flatnonzero(~taken & (sizes > 0)))
            taken[others[: int(np.searchsorted(np.cumsum(sizes[others]), missing)) + 1]] = True
        return np.flatnonzero(taken[owner]).astype(np.int64)
