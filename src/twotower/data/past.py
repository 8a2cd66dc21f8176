"""The data that a model was trained on, and the split of newer data that continues it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.splits import Split
from twotower.schema import Vocabulary

Codes = NDArray[np.int64]

#: Row columns that are kept if both the past and the new data have them.
CARRIED = ("timestamps", "weights", "groups")


@dataclass(frozen=True, eq=False)
class Past:
    """The data that a model was trained on, as stored in its folder.

    Attributes:
        queries, items: its vocabularies.
        offsets, item_codes: its rows, including held-out ones: int64 [Q+1], int32 [n], oldest first within a query.
        learnt: int64 [Q], the number of rows of each query, from the first, that it was trained on.
        columns: `timestamps`, `weights`, `groups` of the rows, if known.
        group_names: the group vocabulary, or None.
        item_table: one row per item code, or None.
        fingerprint: fingerprint of its data.
        last: timestamp of its newest row, microseconds since 1970; None without timestamps.
        context: context of each row, or None.
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
    """A split of the new data, with the past under the same vocabularies.

    `train` contains everything that training may use: the past, including the parent's held-out rows, and the training
    rows of the new data. `data` also contains the held-out rows of the new data.

    Attributes:
        learnt: bool [rows of train], the rows that the parent was trained on.
        query_map, item_map: new code of each code of the parent, int64; -1 for a withdrawn item.
        parent: fingerprint of the parent's data.
        new_item_table: item features from the new data only, in code order; `data.item_table` also has those of the
            parent.
        dates: first and last timestamp of the new rows, microseconds, or None.
    """

    learnt: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    query_map: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    item_map: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parent: str = ""
    dates: tuple[int, int] | None = None
    new_item_table: pl.DataFrame | None = None

    def rows_to_learn(self, replay: float, seed: int, *, whole: bool = False) -> Codes:
        """Choose the rows of `train` for a training run: all new rows, and a sample of the parent's rows.

        The sample is drawn once, without replacement, so that the frequency of items in the batches can be counted.

        Args:
            replay: parent rows per new row; fewer if the parent has fewer.
            seed: seed of the draw.
            whole: choose whole queries, for towers that learn from whole sequences: first all queries with a new row,
                whose old rows count as replayed, then others until there are enough.
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
