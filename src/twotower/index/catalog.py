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
    """What answers queries by inner product: `ExactCatalog` and `ApproximateIndex`."""

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

    Args:
        items: float [N, D].
        alive: bool [N]; None where all are.

    Raises:
        ValueError: a wrong shape, or NaN.
    """

    def __init__(self, items: Tensor, alive: Mask | None = None) -> None:
        if items.ndim != 2:
            raise ValueError(f"items must have shape [N, D], got {list(items.shape)}")
        if bool(items.isnan().any()):
            raise ValueError("an item embedding is NaN: the model has diverged")
        self.items = items.detach().to("cpu", torch.float32).contiguous()
        self.alive = np.ones(len(items), dtype=np.bool_) if alive is None else alive.copy()

    @property
    def num_items(self) -> int:
        """N, removed items among them."""
        return len(self.items)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.items.shape[1])

    def add(self, vectors: Tensor) -> Codes:
        """New rows at the end; their codes."""
        self.items = torch.cat([self.items, self._checked(vectors)])
        self.alive = np.concatenate([self.alive, np.ones(len(vectors), dtype=np.bool_)])
        return np.arange(len(self.items) - len(vectors), len(self.items), dtype=np.int64)

    def update(self, codes: Codes, vectors: Tensor) -> None:
        """Other values in some rows, which are alive again if they were removed."""
        if len(codes) != len(vectors):
            raise ValueError(f"vectors must have shape [{len(codes)}, {self.dim}], got {list(vectors.shape)}")
        checked, rows = self._checked(vectors), torch.from_numpy(self._rows(codes))
        self.items = self.items.index_copy(0, rows, checked)  # a copy: the caller's tensor stays as it was
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
        items: float [N, D].
        index: an `ExactIndex` over the same items, where there is one already.
        alive: bool [N], False for removed items; None where all are there.

    Raises:
        ValueError: a wrong shape, or NaN.
    """

    kind = "exact"
    is_exact = True

    def __init__(self, items: Tensor, *, index: ExactIndex | None = None, alive: Mask | None = None) -> None:
        self.vectors = Vectors(items, alive)
        self._whole = index
        self._narrow: tuple[bytes, ExactIndex, Codes] | None = None

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
        codes = self.vectors.add(vectors)
        self._whole = self._narrow = None
        return codes

    def update(self, codes: Codes, vectors: Tensor) -> None:
        """Items get new embeddings [n, D]."""
        self.vectors.update(codes, vectors)
        self._whole = self._narrow = None

    def remove(self, codes: Codes) -> None:
        """Items never come back; nothing is laid out anew for a few."""
        self.vectors.remove(codes)

    def _all(self) -> ExactIndex:
        if self._whole is None:
            self._whole = ExactIndex(self.vectors.items)
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
        index = ExactIndex(self.vectors.items[torch.from_numpy(codes)])
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
