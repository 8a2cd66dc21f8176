"""Co-occurrence counts of items: the sparse product behind the neighbourhood baselines."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Interactions

_BLOCK_PAIRS = 1 << 24


def distinct_rows(
    offsets: NDArray[np.int64], items: NDArray[np.integer], num_items: int
) -> tuple[NDArray[np.int64], ...]:
    """Remove repeats from compressed rows; items are ascending within a row.

    Args:
        offsets: [B+1] compressed rows.
        items: item codes.
        num_items: N.

    Returns:
        offsets [B+1] and items, both int64.
    """
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    keys = np.unique(rows * num_items + items)
    rows, distinct = np.divmod(keys, num_items)
    starts = np.zeros(len(offsets), dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=len(offsets) - 1), out=starts[1:])
    return starts, distinct


def pair_count(train: Interactions) -> int:
    """Count the item pairs that share a query, sum over queries of (row length)^2: the cost of `cooccurrences`."""
    lengths = np.diff(train.offsets).astype(np.float64)
    return int((lengths**2).sum())


def cooccurrences(train: Interactions) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Compute C = X^T X for the binary [Q, N] matrix X of training pairs, a block of rows at a time.

    Blocks are cut so that each costs about 16 million pairs, for any catalog size.

    Args:
        train: the training interactions; repeats count once.

    Yields:
        first: the item code of the block's first row.
        starts: [I+1] compressed rows of the block.
        columns: the other item's code.
        counts: float32, in how many queries both appear (the diagonal included).
    """
    num_items = train.num_items
    offsets, items = distinct_rows(train.offsets, train.item_codes, num_items)
    lengths = np.diff(offsets)
    queries = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    by_item = np.argsort(items, kind="stable")
    item_starts = np.zeros(num_items + 1, dtype=np.int64)
    np.cumsum(np.bincount(items, minlength=num_items), out=item_starts[1:])
    item_queries = queries[by_item]
    # The pairs of item i: the summed lengths of the rows that contain it. Blocks are cut at equal sums of them.
    work = np.concatenate([[0], np.cumsum(lengths[item_queries])])[item_starts]
    cuts = np.searchsorted(work, np.arange(_BLOCK_PAIRS, work[-1], _BLOCK_PAIRS))
    edges = np.unique(np.concatenate([[0], cuts, [num_items]]))
    whole = _csr(offsets, items, num_items)
    for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        starts = item_starts[first : stop + 1]
        block = _csr(starts - starts[0], item_queries[starts[0] : starts[-1]], len(lengths))
        product = torch.sparse.mm(block, whole)
        yield first, product.crow_indices(), product.col_indices(), product.values()


def gram(train: Interactions) -> Tensor:
    """Compute the dense [N, N] float32 matrix C = X^T X."""
    dense = torch.zeros(train.num_items, train.num_items)
    for first, starts, columns, counts in cooccurrences(train):
        rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff()) + first
        dense[rows, columns] = counts
    return dense


def _csr(offsets: NDArray[np.int64], columns: NDArray[np.int64], width: int) -> Tensor:
    with warnings.catch_warnings():
        # torch warns once that sparse CSR tensors are in beta; the tests of this package check the product.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            torch.from_numpy(offsets),
            torch.from_numpy(columns),
            torch.ones(len(columns)),
            size=(len(offsets) - 1, width),
            check_invariants=False,
        )
