"""Histories and known positives of many queries at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data.interactions import Interactions

Integers = NDArray[np.integer[Any]]
PAD = -1  # no item has this code, so padding cannot be mistaken for an item


def gather_histories(
    offsets: Integers, item_codes: Integers, rows_query: Integers, rows_end: Integers, length: int
) -> NDArray[np.int64]:
    """Gather the `length` items before row `rows_end` of each query, newest last, padded on the left with -1.

    Args:
        offsets: [Q+1]; the rows of query q are ``offsets[q]:offsets[q+1]``.
        item_codes: [n], the item of each row, oldest first within a query.
        rows_query: [B], the query code of each history.
        rows_end: [B], one past the last row of each history.
        length: L, 0 or more.

    Returns:
        The histories, int64 [B, L].

    Example:
        >>> import numpy as np
        >>> import twotower as tt
        >>> tt.data.gather_histories(np.array([0, 3]), np.array([7, 8, 9]), np.array([0]), np.array([2]), 3)
        array([[-1,  7,  8]])
    """
    ends = np.asarray(rows_end, dtype=np.int64)[:, None]
    starts = np.asarray(offsets)[rows_query][:, None]
    at = ends - length + np.arange(length)
    if not len(item_codes):
        return np.full(at.shape, PAD, dtype=np.int64)
    # Positions before row 0 are clipped to 0, then padded like all positions before the query's first row.
    history = np.asarray(item_codes).take(at, mode="clip").astype(np.int64)
    np.copyto(history, PAD, where=at < starts)
    return history


def ragged_histories(offsets: Integers, items: Integers, rows: Integers, length: int) -> NDArray[np.int64]:
    """Gather the newest `length` items of ragged rows, newest last, padded on the left with -1; int64 [B, L].

    Args:
        offsets: [E+1], for example `Holdout.history_offsets`.
        items: the items of all rows, oldest first, for example `Holdout.history_items`.
        rows: [B], numbers of the ragged rows to gather.
        length: L.
    """
    rows = np.asarray(rows)
    return gather_histories(offsets, items, rows, np.asarray(offsets)[rows + 1], length)


def take_ranges(starts: Integers, ends: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Concatenate the ranges ``starts[i]:ends[i]``; return the numbers in them, and the offsets of the ranges [E+1]."""
    sizes = np.asarray(ends, dtype=np.int64) - np.asarray(starts, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    numbers = np.arange(offsets[-1], dtype=np.int64)
    numbers += np.repeat(np.asarray(starts, dtype=np.int64) - offsets[:-1], sizes)
    return numbers, offsets


def first_at(times: NDArray[Any], first: Integers, last: Integers, wanted: Integers) -> NDArray[np.int64]:
    """Find the position of the first time >= `wanted` in each ascending run times[first:last]; otherwise `last`."""
    low, high = first.astype(np.int64).copy(), last.astype(np.int64).copy()
    while True:
        open_ = low < high
        if not open_.any():
            return low
        middle = (low + high) // 2
        later = np.zeros(len(low), dtype=np.bool_)
        later[open_] = np.asarray(times[middle[open_]]) >= wanted[open_]
        low, high = np.where(open_ & ~later, middle + 1, low), np.where(open_ & later, middle, high)


class KnownPositives:
    """Lookup of all training items of the queries in a batch, as (row, item) pairs, without a loop over rows.

    Args:
        interactions: the training interactions.
    """

    def __init__(self, interactions: Interactions) -> None:
        self.offsets, self.item_codes = interactions.offsets, interactions.item_codes

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the known positives of each row's query.

        Args:
            queries: codes, int64 [B]; -1 for a query without known positives.

        Returns:
            (row [P], item [P]), int64, on the device of `queries`.
        """
        codes = queries.cpu().numpy()
        known = codes >= 0
        starts = np.where(known, self.offsets[codes], 0)
        ends = np.where(known, self.offsets[codes + 1], 0)
        place, offsets = take_ranges(starts, ends)
        row = np.repeat(np.arange(len(codes)), np.diff(offsets))
        items = np.asarray(self.item_codes)[place].astype(np.int64)
        return torch.from_numpy(row).to(queries.device), torch.from_numpy(items).to(queries.device)
