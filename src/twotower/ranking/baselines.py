"""Baselines that a model must beat: popularity (over all or only the newest rows), item-kNN and EASE.

All of them are rankers. `cooccurrences` is the sparse product behind item-kNN and EASE.
"""

import copy
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Holdout, Interactions
from twotower.errors import InputError
from twotower.index import Exclusion, pack_keys, tie_order, top_k

_BLOCK_PAIRS = 1 << 24


def distinct_rows(
    offsets: NDArray[np.int64], items: NDArray[np.integer], num_items: int
) -> tuple[NDArray[np.int64], ...]:
    """Remove repeats from compressed rows; items are ascending within a row.

    Args:
        offsets: [B+1] compressed rows.
        items: item codes.
        num_items: N, number of items in the catalog.

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
    """Count the ordered item pairs that share a query, the cost of `cooccurrences`: the sum of squared row lengths."""
    lengths = np.diff(train.offsets).astype(np.float64)
    return int((lengths**2).sum())


def cooccurrences(train: Interactions) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Compute C = X^T X for the binary [Q, N] matrix X of training pairs, one block of rows at a time.

    A block has about 16 million pairs, for any catalog size.

    Args:
        train: the training interactions; repeats count once.

    Yields:
        first: the item code of the block's first row.
        starts: [I+1] compressed rows of the block.
        columns: code of the other item of each pair; the diagonal is included.
        counts: number of queries that contain both items, float32.
    """
    num_items = train.num_items
    offsets, items = distinct_rows(train.offsets, train.item_codes, num_items)
    lengths = np.diff(offsets)
    queries = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    by_item = np.argsort(items, kind="stable")
    item_starts = np.zeros(num_items + 1, dtype=np.int64)
    np.cumsum(np.bincount(items, minlength=num_items), out=item_starts[1:])
    item_queries = queries[by_item]
    # The number of pairs of item i is the total length of the rows that contain it; blocks have about equal numbers.
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


def ease_weights(products: Tensor, l2: float) -> Tensor:
    """Compute the item-item matrix W of EASE, float32 [N, N], from X^T X (`gram`), which is modified; see `EASE`."""
    products.diagonal().add_(l2)
    weights = torch.cholesky_inverse(torch.linalg.cholesky(products))
    weights /= -weights.diagonal().clone()
    weights.fill_diagonal_(0.0)
    return weights


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


_TILE_ELEMENTS = 1 << 22
_MAX_DENSE_ITEMS = 20_000
_MAX_PAIRS = 4_000_000_000


class Popularity:
    """The non-personalized baseline: every query gets the items with the most training interactions.

    Args:
        train: the training interactions.
        share: count only this share of the rows, the newest by timestamp, and the rows with the same timestamp as the
            oldest of these.

    Raises:
        InputError: `share` is out of range, or below 1 and the rows have no timestamps.
    """

    is_exact = True

    def __init__(self, train: Interactions, share: float = 1.0) -> None:
        if not 0 < share <= 1:
            raise InputError(f"share must be above 0 and at most 1, got {share}")
        self._order = tie_order(train.num_items)
        # Score by rank among the distinct counts, because float32 counts are not exact above 2^24.
        counts = train.item_counts() if share == 1 else _newest_counts(train, share)
        places = np.unique(counts, return_inverse=True)[1]
        self._places = torch.from_numpy(places.astype(np.float32))[self._order]

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> Tensor:
        """Return the k most popular items, [E, k] int64; see `Ranker`."""

        def score_tile(rows: slice, columns: slice) -> Tensor:
            return self._places[columns].expand(rows.stop - rows.start, -1).clone()

        return top_k(
            score_tile,
            len(holdout.queries),
            self._order,
            k,
            _seen(holdout, exclude_seen),
            eligible=holdout.eligible,
        )[1]


class ItemKNN:
    """Item neighbourhoods: a query's score for an item is its summed similarity to the query's history.

        sim(i, j)  = c_ij / (sqrt(c_i c_j) + shrink),     i != j
        score(q,j) = sum_{i in history(q), j among the `neighbours` most similar to i} sim(i, j)

    with c_ij the number of training queries that contain both items, c_i the number that contain i (cosine similarity
    of binary columns; Sarwar et al. 2001; Deshpande & Karypis 2004). Repeats in a history count once.

    Args:
        train: the training interactions.
        neighbours: number of most similar items per history item; None for all (small catalogs only).
        shrink: added to the divisor, to shrink similarities with little support towards zero.

    Of nine settings, the defaults have the best mean Recall@20 on the test targets of five data sets (MovieLens 100K
    and 1M, Online Retail, Amazon Beauty and Sports). Choosing on test targets can only favour the baseline. The
    textbook setting, all neighbours and no shrinkage, was worse in every measurement.

    Raises:
        InputError: the data is too large (see `refusal`), or a setting is out of range.
    """

    is_exact = True

    def __init__(self, train: Interactions, neighbours: int | None = 10, shrink: float = 30.0) -> None:
        if neighbours is not None and neighbours < 1:
            raise InputError(f"neighbours must be at least 1 or None, got {neighbours}")
        if shrink < 0:
            raise InputError(f"shrink must not be negative, got {shrink}")
        if reason := self.refusal(train):
            raise InputError(reason)
        if neighbours is None:
            _check_dense(train, "item-kNN with all neighbours")
        self._order = tie_order(train.num_items)
        width = max(train.num_items - 1, 1)
        self._columns, self._similarities = _neighbours(train, self._order, min(neighbours or width, width), shrink)

    def with_neighbours(self, neighbours: int) -> "ItemKNN":
        """Return the same baseline, reduced to the `neighbours` most similar items of each item."""
        fewer = copy.copy(self)
        # Neighbours are stored from most to least similar.
        fewer._columns = self._columns[:, :neighbours]
        fewer._similarities = self._similarities[:, :neighbours]
        return fewer

    @staticmethod
    def refusal(train: Interactions) -> str | None:
        """Explain why item-kNN would take too long on this data, or return None."""
        pairs = pair_count(train)
        if pairs <= _MAX_PAIRS:
            return None
        return f"item-kNN would count {pairs:.1e} item pairs, more than its limit of {_MAX_PAIRS:.0e}"

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> Tensor:
        """Return the k highest-scoring items, [E, k] int64; see `Ranker`. Items of score 0 rank below all others."""
        num_items = len(self._order)
        offsets, items = distinct_rows(holdout.history_offsets, holdout.history_items, num_items)

        def score_tile(rows: slice, columns: slice) -> Tensor:
            starts = offsets[rows.start : rows.stop + 1]
            history = items[starts[0] : starts[-1]]
            row = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            cells = (row[:, None] * num_items + self._columns[history]).ravel()
            # bincount adds in float64 and in order, so scores are the same for every block size and machine.
            sums = np.bincount(cells, self._similarities[history].ravel(), minlength=(len(starts) - 1) * num_items)
            return torch.from_numpy(sums.astype(np.float32)).view(len(starts) - 1, num_items)[:, columns]

        longest = int(np.diff(offsets).max(initial=1))
        row_block = max(1, _TILE_ELEMENTS // max(num_items, longest * self._columns.shape[1]))
        return top_k(
            score_tile,
            len(holdout.queries),
            self._order,
            k,
            _seen(holdout, exclude_seen),
            eligible=holdout.eligible,
            row_block=row_block,
            column_tile=max(num_items, 1),
        )[1]


class EASE:
    """Embarrassingly shallow autoencoder: a linear item-item model in closed form (Steck 2019, eq. 8).

        P = (X^T X + l2 I)^{-1},   W_ij = -P_ij / P_jj,  W_jj = 0,   score(q, j) = sum_{i in history(q)} W_ij

    EASE is a strong reference for small catalogs. It solves a dense N x N system: N^3 multiplications, 16 N^2 bytes.

    Args:
        train: the training interactions, at most 20,000 items.
        l2: the ridge penalty; a few hundred suits most data sets.

    Raises:
        InputError: the catalog is too large, or `l2` is not positive.
    """

    is_exact = True

    def __init__(self, train: Interactions, l2: float = 500.0) -> None:
        if l2 <= 0:
            raise InputError(f"l2 must be positive, got {l2}")
        _check_dense(train, "EASE")
        self._solve(gram(train), l2)

    @classmethod
    def of_products(cls, products: Tensor, l2: float) -> "EASE":
        """Solve for a given X^T X, float32 [N, N], as returned by `gram`; the matrix is not modified."""
        solved = cls.__new__(cls)
        solved._solve(products.clone(), l2)
        return solved

    @classmethod
    def of_weights(cls, weights: Tensor) -> "EASE":
        """Rank by a given item-item matrix, float32 [N, N], as returned by `ease_weights`."""
        solved = cls.__new__(cls)
        solved._set(weights)
        return solved

    def _solve(self, products: Tensor, l2: float) -> None:
        self._set(ease_weights(products, l2))

    def _set(self, weights: Tensor) -> None:
        self._order = tie_order(len(weights))
        self._weights = weights[:, self._order]

    @staticmethod
    def refusal(train: Interactions, memory: int | None = None) -> str | None:
        """Explain why the catalog is too large for EASE, or return None.

        Args:
            train: the training interactions.
            memory: available bytes; None if unknown.
        """
        items = train.num_items
        if items > _MAX_DENSE_ITEMS:
            return f"EASE needs a dense {items:,} x {items:,} matrix: at most {_MAX_DENSE_ITEMS:,} items"
        if reason := ItemKNN.refusal(train):
            return reason.replace("item-kNN", "EASE")
        needed = 4 * 4 * items**2  # the products, their sum with the penalty, its factor and its inverse
        if memory is not None and needed > memory:
            available = f"only {memory / 2**30:.1f} GiB are available"
            return f"EASE needs {needed / 2**30:.1f} GiB for this catalog, but {available}"
        return None

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> Tensor:
        """Return the k highest-scoring items, [E, k] int64; see `Ranker`."""
        num_items = len(self._order)
        offsets, items = distinct_rows(holdout.history_offsets, holdout.history_items, num_items)

        def score_tile(rows: slice, columns: slice) -> Tensor:
            starts = offsets[rows.start : rows.stop + 1]
            history = _csr(starts - starts[0], items[starts[0] : starts[-1]], num_items)
            return history @ self._weights[:, columns]

        return top_k(
            score_tile,
            len(holdout.queries),
            self._order,
            k,
            _seen(holdout, exclude_seen),
            eligible=holdout.eligible,
            column_tile=max(num_items, 1),
        )[1]


def _seen(holdout: Holdout, exclude_seen: bool) -> Exclusion | None:
    return (holdout.history_offsets, holdout.history_items) if exclude_seen else None


def _newest_counts(train: Interactions, share: float) -> NDArray[np.int64]:
    """Count each item's rows among the newest share of all rows, [N]."""
    if train.timestamps is None:
        raise InputError("popularity over the newest rows needs timestamps")
    times = np.asarray(train.timestamps)
    oldest = max(len(times) - max(round(share * len(times)), 1), 0)
    rows = times >= np.partition(times, oldest)[oldest]
    return np.bincount(np.asarray(train.item_codes)[rows], minlength=train.num_items)


def _check_dense(train: Interactions, what: str) -> None:
    if train.num_items > _MAX_DENSE_ITEMS:
        raise InputError(
            f"{what} needs a dense {train.num_items:,} x {train.num_items:,} matrix: at most {_MAX_DENSE_ITEMS:,} items"
        )


def _neighbours(
    train: Interactions, order: Tensor, neighbours: int, shrink: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return [N, neighbours] columns (positions in tie order) and similarities, 0 if an item has fewer neighbours."""
    num_items = len(order)
    column_of = torch.empty_like(order)
    column_of[order] = torch.arange(num_items)
    pairs = distinct_rows(train.offsets, train.item_codes, num_items)[1]
    norm = torch.from_numpy(np.sqrt(np.bincount(pairs, minlength=num_items))).to(torch.float32)
    columns = np.zeros((num_items, neighbours), dtype=np.int64)
    similarities = np.zeros((num_items, neighbours), dtype=np.float32)
    for first, starts, partners, counts in cooccurrences(train):
        row = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        distinct_pair = partners != row + first
        row, others = row[distinct_pair], partners[distinct_pair]
        similarity = counts[distinct_pair] / (norm[row + first] * norm[others] + shrink)
        # Sort by key, descending, then by row with a stable sort: each row goes from most to least similar.
        by_key = pack_keys(similarity, column_of[others]).argsort(descending=True)
        chosen = by_key[row[by_key].argsort(stable=True)]
        row = row[chosen]
        count = torch.bincount(row, minlength=len(starts) - 1)
        place = torch.arange(len(row)) - (torch.cumsum(count, 0) - count)[row]
        kept = place < neighbours
        cell = ((row[kept] + first).numpy(), place[kept].numpy())
        columns[cell] = column_of[others[chosen[kept]]].numpy()
        similarities[cell] = similarity[chosen[kept]].numpy()
    return columns, similarities
