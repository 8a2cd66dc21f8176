"""Head, mid and tail: the catalog cut into three parts of equal training interactions."""

import numpy as np
from numpy.typing import NDArray

SLICES = ("head", "mid", "tail")
"""Names by slice number."""


def popularity_thirds(item_counts: NDArray[np.integer]) -> NDArray[np.int8]:
    """Which third of the training interactions each item belongs to.

    Items are sorted by training count, descending, ties by code. With c_1 >= c_2 >= ... the counts in that order, n
    their sum, the item in place p is

        head  if  c_1 + ... + c_{p-1} <  n / 3
        mid   if  n / 3 <= c_1 + ... + c_{p-1} < 2 n / 3
        tail  otherwise (items never seen in training among them).

    So the head is the fewest items that together make up a third of the interactions: each third has about as many
    interactions, and very different numbers of items.

    Args:
        item_counts: [N] training interactions of each item.

    Returns:
        [N] int8: 0 head, 1 mid, 2 tail.
    """
    counts = np.asarray(item_counts, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    total = int(counts.sum())
    thirds = np.empty(len(counts), dtype=np.int8)
    thirds[order] = (3 * before >= total).astype(np.int8) + (3 * before >= 2 * total)
    return thirds
