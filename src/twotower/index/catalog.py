"""Exact search that can be narrowed to some items, and whose items come and go."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.index.exact import ExactIndex
from twotower.index.ties import tie_order
from twotower.index.topk import Exclusion

Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Index(Protocol):
    """What answers queries by inner product: `ExactCatalog` and `ApproximateIndex`; `vectors` are what is searched."""

    vectors: Vectors

    @property
    def kind(self) -> str:
        """One of exact, hnsw, ivfpq and pgvector."""

    @property
    def is_exact(self) -> bool:
        """Whether the K items returned are always the K best; evaluation refuses an index that says no."""

    @property
    def num_items(self) -> int:
        """N: codes run from 0 to N - 1, removed ones among them."""

    def search(
        self, queries: Tensor, k: int, exclude: Exclusion | None = None, *, allowed: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """The K items of highest inner product.

        Args:
            queries: [B, D].
            k: K.
            exclude: compressed rows `(offsets int64 [B+1], items)` of codes to leave out, or None.
            allowed: bool [N], the only items that may come back, in every row; None for all.

        Returns:
            scores: [B, K] float32, descending, -inf where no item was left.
            items: [B, K] int64 item codes, -1 where no item was left.
        """

    def add(self, vectors: Tensor) -> Codes:
        """Items [n, D] join the catalog; their new codes."""

    def update(self, codes: Codes, vectors: Tensor) -> None:
        """Items get new embeddings [n, D]."""

    def remove(self, codes: Codes) -> None:
        """Items never come back from a search; their codes are not used again."""


class Vectors:
    """The embeddings of a catalog, row = code, and which of them are still in it.

    float32 embeddings on the CPU are shared with the caller, who may have them mapped from a file, until items come or
    change. A last coordinate can be kept apart from them: a vector is then `[items, last]`, and nothing is copied to
    make the embeddings one wider.

    Args:
        items: float [N, D].
        alive: bool [N]; None where all are.
        last: float [N], one more coordinate of each item, or None.

    Raises:
        ValueError: a wrong shape, or NaN.
    """

    def __init__(self, items: Tensor, alive: Mask | None = None, *, last: Tensor | None = None) -> None:
        if items.ndim != 2:
            raise ValueError(f"items must have shape [N, D], got {list(items.shape)}")
        if last is not None and last.shape != items.shape[:1]:
            raise ValueError(f"last must have shape [{len(items)}], got {list(last.shape)}")
        for part in (items, last):
            if part is not None and bool(part.isnan().any()):
                raise ValueError("an item embedding is NaN: the model has diverged")
        self.items = items.detach().to("cpu", torch.float32).contiguous()
        self.last = None if last is None else last.detach().to("cpu", torch.float32).contiguous()
        self.alive = np.ones(len(items), dtype=np.bool_) if alive is None else alive.copy()

    @property
    def num_items(self) -> int:
        """N, removed items among them."""
        return len(self.items)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return int(self.items.shape[1]) + (self.last is not None)

    def rows(self, codes: Tensor) -> Tensor:
        """Vectors of codes of any shape, [..., width]."""
        if self.last is None:
            return self.items[codes]
        return torch.cat([self.items[codes], self.last[codes][..., None]], -1)

    def scores(self, query: Tensor) -> Tensor:
        """Inner products of every item with one query [width], [N]."""
        if self.last is None:
            return self.items @ query
        return torch.addmv(self.last * query[-1], self.items, query[:-1])

    def add(self, vectors: Tensor) -> Codes:
        """New rows at the end; their codes."""
        checked = self._checked(vectors)
        self.items = torch.cat([self.items, checked[:, : self.items.shape[1]]])
        if self.last is not None:
            self.last = torch.cat([self.last, checked[:, -1]])
        self.alive = np.concatenate([self.alive, np.ones(len(vectors), dtype=np.bool_)])
        return np.arange(len(self.items) - len(vectors), len(self.items), dtype=np.int64)

    def update(self, codes: Codes, vectors: Tensor) -> None:
        """Other values in some rows, which are alive again if they were removed."""
        if len(codes) != len(vectors):
            raise ValueError(f"vectors must have shape [{len(codes)}, {self.dim}], got {list(vectors.shape)}")
        checked, rows = self._checked(vectors), torch.from_numpy(self._rows(codes))
        # Copies: the caller's tensors stay as they were.
        self.items = self.items.index_copy(0, rows, checked[:, : self.items.shape[1]])
        if self.last is not None:
            self.last = self.last.index_copy(0, rows, checked[:, -1])
        self.alive[codes] = True

    def remove(self, codes: Codes) -> None:
        """Rows that are no longer in the catalog."""
        self.alive[self._rows(codes)] = False

    def allowed(self, wanted: Mask | None) -> Mask | None:
        """Rows in the catalog and wanted; None where that is all of them."""
        if wanted is not None and wanted.shape != (self.num_items,):
            raise ValueError(f"allowed must have shape [{self.num_items}], got {list(wanted.shape)}")
        mask = self.alive if wanted is None else self.alive & wanted
        return None if mask.all() else mask

    def checked_queries(self, queries: Tensor) -> Tensor:
        """Queries [B, D] as float32 on the CPU."""
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must have shape [B, {self.dim}], got {list(queries.shape)}")
        return queries.detach().to("cpu", torch.float32).contiguous()

    def _checked(self, vectors: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"vectors must have shape [n, {self.dim}], got {list(vectors.shape)}")
        if bool(vectors.isnan().any()):
            raise ValueError("an item embedding is NaN: the model has diverged")
        return vectors.detach().to("cpu", torch.float32)

    def _rows(self, codes: Codes) -> Codes:
        rows = np.asarray(codes, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_items:
            raise ValueError(f"codes must be in 0 .. {self.num_items - 1}")
        return rows


class ExactCatalog:
    """`ExactIndex` over the items of a catalog that are allowed and not removed.

    A narrowed search lays the allowed items out in an index of their own, kept for the next search with the same mask:
    its cost is that of a smaller catalog. A few forbidden items among many are left out row by row instead.

    Args:
        items: float [N, D], or the `Vectors` of another catalog, which are then shared.
        alive: bool [N], False for removed items; None where all are there.
        bias: float [N], added to the items' scores, or None. A catalog with a bias takes no new items.

    Raises:
        ValueError: a wrong shape, or NaN.
    """

    kind = "exact"
    is_exact = True

    def __init__(self, items: Tensor | Vectors, *, alive: Mask | None = None, bias: Tensor | None = None) -> None:
        self.vectors = items if isinstance(items, Vectors) else Vectors(items, alive)
        self._bias = bias
        self._whole: ExactIndex | None = None
        self._narrow: tuple[bytes, ExactIndex, Codes] | None = None

    def with_bias(self, bias: Tensor) -> ExactCatalog:
        """The same items with `bias` [N] added to their scores; embeddings and their layout are shared, not copied.

        It is for searching only, and as the catalog is now: changes are made to this one, and another asked for.
        """
        other = ExactCatalog(self.vectors, bias=bias)
        other._whole = self._all().with_bias(bias)
        return other

    @property
    def num_items(self) -> int:
        """N, removed items among them."""
        return self.vectors.num_items

    def search(
        self, queries: Tensor, k: int, exclude: Exclusion | None = None, *, allowed: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """The K allowed items of highest inner product; see `Index.search`.

        Raises:
            ValueError: a shape is wrong, a score is NaN, or an exclusion is out of range.
        """
        queries = self.vectors.checked_queries(queries)
        mask = self.vectors.allowed(allowed)
        if mask is None:
            return self._all().search(queries, k, exclude)
        if not mask.any():
            return torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), -1)
        out = np.flatnonzero(~mask)
        if len(out) * max(len(queries), 1) <= self.num_items // 4:
            return self._all().search(queries, k, joined(exclude, out, len(queries)))
        index, codes = self._subset(mask)
        scores, found = index.search(queries, k, _within(exclude, mask, codes))
        return scores, torch.where(found >= 0, torch.from_numpy(codes)[found.clamp(min=0)], -1)

    def add(self, vectors: Tensor) -> Codes:
        """Items [n, D] join; their new codes. The next search lays the catalog out anew."""
        self._refuse_bias()
        codes = self.vectors.add(vectors)
        self._whole = self._narrow = None
        return codes

    def update(self, codes: Codes, vectors: Tensor) -> None:
        """Items get new embeddings [n, D]."""
        self._refuse_bias()
        self.vectors.update(codes, vectors)
        self._whole = self._narrow = None

    def remove(self, codes: Codes) -> None:
        """Items never come back; nothing is laid out anew for a few."""
        self.vectors.remove(codes)

    def _refuse_bias(self) -> None:
        if self._bias is not None:
            raise ValueError("a catalog with a bias is for searching; change the one it was made from")

    def _all(self) -> ExactIndex:
        if self._whole is None:
            whole = self.vectors
            items = whole.items if whole.last is None else whole.rows(torch.arange(self.num_items))
            self._whole = ExactIndex(items, self._bias)
        return self._whole

    def _subset(self, mask: Mask) -> tuple[ExactIndex, Codes]:
        """An index over the items of a mask, and the code of each of its rows."""
        key = np.packbits(mask).tobytes()
        if self._narrow is not None and self._narrow[0] == key:
            return self._narrow[1], self._narrow[2]
        order = tie_order(self.num_items).numpy()
        kept = order[mask[order]]
        # The subset breaks ties by the hash of its own rows; the item that wins all ties is put into the row that
        # does, so that equal scores come in the order that the whole catalog gives them.
        codes = np.empty_like(kept)
        codes[tie_order(len(kept)).numpy()] = kept
        chosen = torch.from_numpy(codes)
        index = ExactIndex(self.vectors.rows(chosen), None if self._bias is None else self._bias[chosen])
        self._narrow = (key, index, codes)
        return index, codes


def joined(exclude: Exclusion | None, everywhere: Codes, rows: int) -> Exclusion:
    """Exclusions with some more items in each row."""
    more = np.tile(everywhere, rows)
    sizes = np.full(rows, len(everywhere))
    if exclude is None:
        return np.arange(rows + 1, dtype=np.int64) * len(everywhere), more
    offsets, items = plain(exclude)
    owner = np.concatenate([np.repeat(np.arange(rows), np.diff(offsets)), np.repeat(np.arange(rows), sizes)])
    both = np.concatenate([items, more])[np.argsort(owner, kind="stable")]
    return offsets + np.arange(rows + 1, dtype=np.int64) * len(everywhere), both


def plain(exclude: Exclusion) -> tuple[Codes, Codes]:
    """An exclusion as two int64 arrays."""
    offsets, items = exclude
    return np.asarray(offsets, dtype=np.int64), np.asarray(items, dtype=np.int64)


def _within(exclude: Exclusion | None, mask: Mask, codes: Codes) -> Exclusion | None:
    """Exclusions in the rows of a subset; what is not in it is left out already."""
    if exclude is None:
        return None
    offsets, items = plain(exclude)
    if len(items) and not 0 <= items.min() <= items.max() < len(mask):
        raise ValueError(f"exclude: items must be codes in 0 .. {len(mask) - 1}")
    row_of = np.full(len(mask), -1, dtype=np.int64)
    row_of[codes] = np.arange(len(codes))
    inside = mask[items]
    kept = np.concatenate([[0], np.cumsum(inside)])[offsets].astype(np.int64)
    return kept, row_of[items[inside]]
