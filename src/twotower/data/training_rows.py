"""The training side of a split: rows before the held-out ones, observed negatives, and the validation queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.account import Account
from twotower.data.interactions import Interactions
from twotower.errors import InputError
from twotower.schema import listed

ValidationQueries = int | float | str | Sequence[Any] | pl.Series | NDArray[Any] | None


def rows_before(data: Interactions, cut: int) -> NDArray[np.int64]:
    """Count the rows of each query before a timestamp, int64 [Q]."""
    assert data.timestamps is not None
    earlier = np.flatnonzero(np.asarray(data.timestamps) < cut)
    return np.diff(np.searchsorted(earlier, data.offsets)).astype(np.int64)


def training_rows(data: Interactions, ends: NDArray[np.int64], account: Account) -> Interactions:
    """Select the rows of each query before `ends` [Q].

    Raises:
        InputError: no rows are left.
    """
    steps = np.zeros(len(data) + 1, dtype=np.int8)  # +1 where a query's training rows begin, -1 after their end
    np.add.at(steps, data.offsets[:-1], 1)
    np.add.at(steps, ends, -1)
    mask = np.cumsum(steps[:-1], dtype=np.int8).astype(bool)
    del steps
    if not mask.any():
        raise InputError("split: training is empty; hold out less.")
    train = data.select(mask)
    account.add("training rows", len(train), f"of {int((np.diff(train.offsets) > 0).sum()):,} queries")
    return train


def training_negatives(
    data: Interactions, account: Account, *, before: int | None = None, train_end: NDArray[np.int64] | None = None
) -> Interactions | None:
    """Select the observed negatives for training: none later than the held-out rows."""
    below = data.negatives
    if below is None:
        return None
    if before is not None and below.timestamps is not None:
        mask = np.asarray(below.timestamps) < before
    else:
        assert train_end is not None
        complete = train_end == data.offsets[1:]
        mask = complete[below.query_codes()]
        if data.timestamps is not None and below.timestamps is not None:
            # A query with held-out rows keeps the negatives before the first of them, if it has training rows.
            partly = ~complete & (train_end > data.offsets[:-1])
            cut = np.full(data.num_queries, np.iinfo(np.int64).min)
            cut[partly] = np.asarray(data.timestamps[train_end[partly]])
            mask |= np.asarray(below.timestamps) < cut[below.query_codes()]
    kept = below.select(mask)
    account.add("training negatives", len(kept), f"{len(below) - len(kept):,} dropped, held out or later")
    return kept if len(kept) else None


def validation_queries_of(
    data: Interactions, told: ValidationQueries, eligible: NDArray[np.bool_], seed: int
) -> NDArray[np.bool_]:
    """Choose the queries whose second last item is validation, bool [Q].

    Raises:
        InputError: the setting does not fit the data.
    """
    if told is None:
        return eligible.copy()
    chosen = np.zeros(data.num_queries, dtype=bool)
    if isinstance(told, str):
        table = data.query_table
        if table is None or told not in table.columns or table.schema[told] != pl.Boolean:
            found = listed([c for c in table.columns if table.schema[c] == pl.Boolean]) if table is not None else "none"
            raise InputError(
                f"split: validation_queries={told!r} is no boolean column of the query table; its boolean columns: "
                f"{found}."
            )
        chosen[table[told].fill_null(False).to_numpy()] = True
    elif isinstance(told, int | float):
        able = np.flatnonzero(eligible)
        count = round(told * len(able)) if isinstance(told, float) and told < 1 else int(told)
        if not 0 <= count <= len(able):
            raise InputError(f"split: validation_queries={told}; {len(able):,} queries have 3 interactions or more.")
        chosen[np.random.default_rng(seed).choice(able, size=count, replace=False)] = True
    else:
        codes = data.queries.encode(told)
        if (codes < 0).any():
            unknown = pl.Series("id", told)[int(np.flatnonzero(codes < 0)[0])]
            raise InputError(f"split: validation_queries: query {unknown!r} is not in the data.")
        chosen[codes] = True
    return chosen & eligible
