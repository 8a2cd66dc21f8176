"""Exact search over a changing catalog, optionally restricted to some items."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.errors import InputError
from twotower.index.exact import ExactIndex
from twotower.index.ties import tie_order
from twotower.index.topk import Exclusion, RowFilter

#: Number of embedding rows checked at a time.
BLOCK = 1 << 20

IntArray = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Index(Protocol):
    """An index over item vectors, searched by inner product: `ExactCatalog` or `ApproximateIndex`."""

    vectors: Vectors

    @property
    def kind(self) -> str:
        """Kind of the index: exact, hnsw, ivfpq, int8, binary or pgvector."""

    @property
    def is_exact(self) -> bool:
        """Whether the K items returned are always the K best; evaluation rejects other indexes by default."""

    @property
    def num_items(self) -> int:
        """N; codes run from 0 to N - 1, including removed items."""

    def search(
        self, queries: Tensor, k: int, exclude: Exclusion | None = None, *, allowed: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the K items with the highest inner products.

        Args:
            queries: query vectors, [B, D].
            k: K, number of items per query.
            exclude: compressed rows `(offsets int64 [B+1], items)` of codes to leave out, or None.
            allowed: bool [N], the only items that may be returned, in every row; None for all.

        Returns:
            scores: [B, K] float32, descending, -inf where no item was left.
            items: [B, K] int64 item codes, -1 where no item was left.
        """

    def add(self, vectors: Tensor) -> IntArray:
        """Add items [n, D] to the catalog; return their new codes."""

    def update(self, codes: IntArray, vectors: Tensor) -> None:
        """Replace the embeddings of items, [n, D]."""

    def remove(self, codes: IntArray) -> None:
        """Remove items from all future results; their codes are not assigned to other items."""


class Vectors:
    """The embeddings of a catalog (row = code) and a mask of the items that are still in it.

    float32 and bfloat16 embeddings on the CPU are shared with the caller (they may be memory-mapped) until items are
    added or updated; rows are returned in float32. The last coordinate can be stored separately: a vector is then
    `[items, last]`, so that a coordinate can be added without copying the embeddings.

    Args:
        items: item embeddings, float [N, D].
        alive: bool [N], False for removed items; None if no item was removed.
        last: float [N], one more coordinate of each item, or None.

    Raises:
        InputError: a shape is wrong, or an embedding is NaN.
    """

    def __init__(self, items: Tensor, alive: Mask | None = None, *, last: Tensor | None = None) -> None:
        if items.ndim != 2:
            raise InputError(f"items must have shape [N, D], got {list(items.shape)}")
        if last is not None and last.shape != items.shape[:1]:
            raise InputError(f"last must have shape [{len(items)}], got {list(last.shape)}")
        for part in (items, last):
            if part is not None and any(bool(rows.isnan().any()) for rows in torch.split(part, BLOCK)):
                raise InputError("an item embedding is NaN: the model has diverged")
        kept = items.dtype if items.dtype == torch.bfloat16 else torch.float32
        self.items = items.detach().to("cpu", kept).contiguous()
        self.last = None if last is None else last.detach().to("cpu", torch.float32).contiguous()
        self.alive = np.ones(len(items), dtype=np.bool_) if alive is None else alive.copy()

    @property
    def num_items(self) -> int:
        """N, including removed items."""
        return len(self.items)

    @property
    def dim(self) -> int:
        """Width of a vector, including `last`."""
        return int(self.items.shape[1]) + (self.last is not None)

    def rows(self, codes: Tensor | slice) -> Tensor:
        """Return the vectors of codes of any shape, or of a slice of codes, float32 [..., width]."""
        if self.last is None:
            return self.items[codes].float()
        return torch.cat([self.items[codes].float(), self.last[codes][..., None]], -1)

    def scores(self, query: Tensor) -> Tensor:
        """Compute the inner product of each item with one query [width]; return [N]."""
        items = self.items.float()
        if self.last is None:
            return items @ query
        return torch.addmv(self.last * query[-1], items, query[:-1])

    def add(self, vectors: Tensor) -> IntArray:
        """Append rows; return their codes."""
        checked = self._checked(vectors)
        self.items = torch.cat([self.items.float(), checked[:, : self.items.shape[1]]])
        if self.last is not None:
            self.last = torch.cat([self.last, checked[:, -1]])
        self.alive = np.concatenate([self.alive, np.ones(len(vectors), dtype=np.bool_)])
        return np.arange(len(self.items) - len(vectors), len(self.items), dtype=np.int64)

    def update(self, codes: IntArray, vectors: Tensor) -> None:
        """Replace some rows; removed items return to the catalog."""
        if len(codes) != len(vectors):
            raise InputError(f"vectors must have shape [{len(codes)}, {self.dim}], got {list(vectors.shape)}")
        checked, rows = self._checked(vectors), torch.from_numpy(self._rows(codes))
        # index_copy copies: the caller's tensors are not modified.
        self.items = self.items.float().index_copy(0, rows, checked[:, : self.items.shape[1]])
        if self.last is not None:
            self.last = self.last.index_copy(0, rows, checked[:, -1])
        self.alive[codes] = True

    def remove(self, codes: IntArray) -> None:
        """Mark rows as removed from the catalog."""
        self.alive[self._rows(codes)] = False

    def allowed(self, requested: Mask | None) -> Mask | None:
        """Combine a mask of requested rows with the rows that are in the catalog; None for all rows."""
        if requested is not None and requested.shape != (self.num_items,):
            raise InputError(f"allowed must have shape [{self.num_items}], got {list(requested.shape)}")
        mask = self.alive if requested is None else self.alive & requested
        return None if mask.all() else mask

    def checked_queries(self, queries: Tensor) -> Tensor:
        """Check the shape of queries [B, D] and convert them to float32 on the CPU."""
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries must have shape [B, {self.dim}], got {list(queries.shape)}")
        return queries.detach().to("cpu", torch.float32).contiguous()

    def _checked(self, vectors: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"vectors must have shape [n, {self.dim}], got {list(vectors.shape)}")
        if bool(vectors.isnan().any()):
            raise InputError("an item embedding is NaN: the model has diverged")
        return vectors.detach().to("cpu", torch.float32)

    def _rows(self, codes: IntArray) -> IntArray:
        rows = np.asarray(codes, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_items:
            raise InputError(f"codes must be in 0 .. {self.num_items - 1}")
        return rows


class ExactCatalog:
    """`ExactIndex` over the items of a catalog that are allowed and not removed.

    A restricted search builds an exact index of the allowed items alone, and keeps it for the next search with the same
    mask. If only a few items are not allowed, they are excluded in every row instead.

    Args:
        items: item embeddings, float [N, D], or the `Vectors` of another catalog, which are then shared.
        alive: bool [N], False for removed items; None if no item was removed.
        bias: float [N], added to the items' scores, or None. A catalog with a bias cannot be changed.

    Raises:
        InputError: a shape is wrong, or an embedding is NaN.
    """

    kind = "exact"
    is_exact = True

    def __init__(self, items: Tensor | Vectors, *, alive: Mask | None = None, bias: Tensor | None = None) -> None:
        self.vectors = items if isinstance(items, Vectors) else Vectors(items, alive)
        self._bias = bias
        self._whole: ExactIndex | None = None
        self._narrow: tuple[bytes, ExactIndex, IntArray] | None = None

    def with_bias(self, bias: Tensor) -> ExactCatalog:
        """Return a catalog with `bias` [N] added to the scores; embeddings and layout are shared, not copied.

        The result is a read-only snapshot. After changes to this catalog, create a new one.
        """
        other = ExactCatalog(self.vectors, bias=bias)
        other._whole = self._all().with_bias(bias)
        return other

    @property
    def num_items(self) -> int:
        """N, including removed items."""
        return self.vectors.num_items

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Exclusion | None = None,
        *,
        allowed: Mask | None = None,
        eligible: RowFilter | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find the K allowed items with the highest inner products; see `Index.search`.

        `eligible` can allow different items in each row; it refers to the codes of the whole catalog.

        Raises:
            InputError: a shape is wrong, a score is NaN, or an exclusion is out of range.
        """
        queries = self.vectors.checked_queries(queries)
        mask = self.vectors.allowed(allowed)
        if mask is None:
            return self._all().search(queries, k, exclude, eligible=eligible)
        if not mask.any():
            return torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), -1)
        out = np.flatnonzero(~mask)
        if len(out) * max(len(queries), 1) <= self.num_items // 4:
            return self._all().search(queries, k, merge_exclusions(exclude, out, len(queries)), eligible=eligible)
        index, codes = self._subset(mask)
        inside = None if eligible is None else eligible.select(torch.from_numpy(codes))
        scores, rows = index.search(queries, k, _within(exclude, mask, codes), eligible=inside)
        return scores, torch.where(rows >= 0, torch.from_numpy(codes)[rows.clamp(min=0)], -1)

    def add(self, vectors: Tensor) -> IntArray:
        """Add items [n, D]; return their new codes. The next search rebuilds the layout."""
        self._refuse_bias()
        codes = self.vectors.add(vectors)
        self._whole = self._narrow = None
        return codes

    def update(self, codes: IntArray, vectors: Tensor) -> None:
        """Replace the embeddings of items, [n, D]. The next search rebuilds the layout."""
        self._refuse_bias()
        self.vectors.update(codes, vectors)
        self._whole = self._narrow = None

    def remove(self, codes: IntArray) -> None:
        """Remove items from all future results, without a rebuild."""
        self.vectors.remove(codes)

    def _refuse_bias(self) -> None:
        if self._bias is not None:
            raise InputError("a catalog with a bias is read-only; change the catalog that it was made from")

    def _all(self) -> ExactIndex:
        if self._whole is None:
            vectors = self.vectors
            items = vectors.items if vectors.last is None else vectors.rows(torch.arange(self.num_items))
            self._whole = ExactIndex(items, self._bias)
        return self._whole

    def _subset(self, mask: Mask) -> tuple[ExactIndex, IntArray]:
        """Return an index over the items of a mask, and the code of each of its rows."""
        key = np.packbits(mask).tobytes()
        if self._narrow is not None and self._narrow[0] == key:
            return self._narrow[1], self._narrow[2]
        order = tie_order(self.num_items).numpy()
        kept = order[mask[order]]
        # The index of the subset breaks ties by a hash of its row numbers. Items are assigned to rows in tie order, so
        # that equal scores are ordered as in the whole catalog.
        codes = np.empty_like(kept)
        codes[tie_order(len(kept)).numpy()] = kept
        chosen = torch.from_numpy(codes)
        index = ExactIndex(self.vectors.rows(chosen), None if self._bias is None else self._bias[chosen])
        self._narrow = (key, index, codes)
        return index, codes


def merge_exclusions(exclude: Exclusion | None, everywhere: IntArray, rows: int) -> Exclusion:
    """Add items to the exclusions of every row."""
    more = np.tile(everywhere, rows)
    sizes = np.full(rows, len(everywhere))
    if exclude is None:
        return np.arange(rows + 1, dtype=np.int64) * len(everywhere), more
    offsets, items = plain(exclude)
    owner = np.concatenate([np.repeat(np.arange(rows), np.diff(offsets)), np.repeat(np.arange(rows), sizes)])
    both = np.concatenate([items, more])[np.argsort(owner, kind="stable")]
    return offsets + np.arange(rows + 1, dtype=np.int64) * len(everywhere), both


def plain(exclude: Exclusion) -> tuple[IntArray, IntArray]:
    """Convert an exclusion to two int64 arrays."""
    offsets, items = exclude
    return np.asarray(offsets, dtype=np.int64), np.asarray(items, dtype=np.int64)


def _within(exclude: Exclusion | None, mask: Mask, codes: IntArray) -> Exclusion | None:
    """Map exclusions to the rows of a subset; items outside the subset are dropped."""
    if exclude is None:
        return None
    offsets, items = plain(exclude)
    if len(items) and not 0 <= items.min() <= items.max() < len(mask):
        raise InputError(f"exclude: items must be codes in 0 .. {len(mask) - 1}")
    row_of = np.full(len(mask), -1, dtype=np.int64)
    row_of[codes] = np.arange(len(codes))
    inside = mask[items]
    kept = np.concatenate([[0], np.cumsum(inside)])[offsets].astype(np.int64)
    return kept, row_of[items[inside]]
