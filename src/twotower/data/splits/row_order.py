"""Detection of rows without timestamps whose order cannot be a time order, and a shuffle of such rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.data.interactions import COUNT_ROWS, ROW_FIELDS, Interactions
from twotower.data.prepare.request_context import joined_context
from twotower.data.schema.account import Account

#: Rows count as sorted by item id if at least this share of the steps within queries ascends ...
_ASCENDING = 0.98
#: ... and there are at least this many steps, each of which ascends with probability 1/2 in a random order.
_STEPS = 30


def sorted_by_item(data: Interactions) -> bool:
    """Return whether rows without timestamps are sorted by item id within the queries.

    The steps from one row of a query to the next are examined if the items differ. In a random order half of them
    ascend, and in real time orders the share stays well below 98 %, even where new items have larger ids. In a file
    sorted by item, or by query and item, all ascend. Returns False for data with timestamps or fewer than 30 steps.
    """
    if data.timestamps is not None or len(data) < 2:
        return False
    last = np.zeros(len(data), dtype=bool)  # the last row of each query
    last[data.offsets[1:][np.diff(data.offsets) > 0] - 1] = True
    steps = up = 0
    for start in range(0, len(data) - 1, COUNT_ROWS):
        codes = np.asarray(data.item_codes[start : start + COUNT_ROWS + 1])
        change = np.sign(np.diff(codes))[~last[start : start + len(codes) - 1]]
        steps += int(np.count_nonzero(change))
        up += int(np.count_nonzero(change > 0))
    return steps >= _STEPS and up >= _ASCENDING * steps


def in_order(data: Interactions, order: NDArray[np.int64]) -> Interactions:
    """Reorder rows within their queries: row i of the result is row `order[i]`."""
    columns: dict[str, Any] = {
        n: np.asarray(getattr(data, n))[order] for n in ROW_FIELDS if getattr(data, n) is not None
    }
    context = joined_context([data.context], order)
    return replace(data, context=context, known_fingerprint=None, **columns)


def without_item_order(data: Interactions, account: Account, part: NDArray[np.int8] | None = None) -> Interactions:
    """Shuffle the rows of each query if they are sorted by item id, and add a line to the account.

    Otherwise a model would learn that the next id is larger. The shuffle is deterministic, and the fingerprint of the
    rows as read is kept.

    Args:
        data: the interactions.
        account: receives a line if the rows are shuffled.
        part: the part of each row; within a query, rows remain ordered by part.
    """
    if not sorted_by_item(data if part is None else data.select(part == 0)):  # item ids start over in the next part
        return data
    account.add(
        "sorted by item id",
        len(data),
        "so the rows of a query are not in time order; they are shuffled, and their order is not used",
    )
    draw = np.random.default_rng(0).random(len(data))
    keys = (draw, data.query_codes()) if part is None else (draw, part, data.query_codes())
    return replace(in_order(data, np.lexsort(keys)), known_fingerprint=data.fingerprint)
