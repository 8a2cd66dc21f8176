"""Approximate search with reliable filters: over-fetch, re-score exactly, fall back to exact search."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.errors import InputError
from twotower.index.catalog import ExactCatalog, IntArray, Mask, Vectors, plain
from twotower.index.ties import best_of
from twotower.index.topk import Exclusion

#: Number of queries per block; bounds the memory of gathered candidates.
BLOCK = 256

#: Number of candidates scored at a time; bounds the memory of their embeddings.
GATHERED = 1 << 18

#: If at most 1/NARROW_SHARE of the catalog or NARROW_ITEMS items are allowed, they are searched exactly. That is faster
#: than searching a graph in which most nodes are not allowed, and loses no result.
NARROW_SHARE = 20
NARROW_ITEMS = 2000


class Engine(Protocol):
    """A backend that proposes candidates: HNSW, IVF-PQ, or a database. It ranks by inner product, never by L2.

    Attributes:
        kind: name of the engine.
        effort: search effort: a higher value finds more and takes longer.
        max_effort: maximum of `effort`.
    """

    kind: str
    effort: int
    max_effort: int

    @property
    def oversample(self) -> float:
        """Candidates to fetch per result; above 1 for engines with coarse scores."""

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return the codes of about the k best items of each query, int64 [B, k], -1 where fewer were found.

        Args:
            queries: query vectors, float32 [B, D].
            k: number of candidates.
            allowed: bool [N], the only items that may be returned; removed items never are.
            depth: factor by which the search must go deeper than usual, because items ranked higher are excluded or
                not allowed; at least 1. The effort is increased accordingly.
        """

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items under new codes."""

    def remove(self, codes: IntArray) -> None:
        """Remove items; their codes may be added again."""

    def count(self) -> int:
        """Return the number of items, without removed ones."""

    def settings(self) -> dict[str, Any]:
        """Return the settings of the engine, including its current effort, as JSON values."""

    def size(self) -> int:
        """Return the size of the engine in bytes, without the embeddings."""

    def save(self, folder: Path) -> None:
        """Write the files that the `load` method of the same class reads."""


class ApproximateIndex:
    """An approximate index: an engine proposes candidates, which are re-scored with the exact embeddings.

    A search fetches at least K candidates, drops excluded ones, and fetches twice as many for the rows with fewer than
    K left. Rows for which the engine has no more candidates are searched exactly. So K items are returned whenever K
    are left, as from an exact index. The choice of items is approximate; their scores are exact inner products in
    float32. Ties are broken by `tie_order`, as in the whole library.

    Args:
        items: float [N, D], the embeddings that the engine was built on, or their `Vectors`. They are shared, not
            copied; see `Vectors`.
        engine: the engine that proposes candidates.
        alive: bool [N], False for removed items; None if no item was removed.
        last: float [N], the last coordinate of the vectors if it is stored separately from `items`, or None.

    Raises:
        InputError: a shape is wrong, or an embedding is NaN.
    """

    is_exact = False

    def __init__(
        self,
        items: Tensor | Vectors,
        engine: Engine,
        *,
        alive: Mask | None = None,
        last: Tensor | None = None,
    ) -> None:
        self.vectors = items if isinstance(items, Vectors) else Vectors(items, alive, last=last)
        self.engine = engine
        self._exact: ExactCatalog | None = None

    @property
    def kind(self) -> str:
        """The engine's name."""
        return self.engine.kind

    @property
    def num_items(self) -> int:
        """N, including removed items."""
        return self.vectors.num_items

    def search(
        self, queries: Tensor, k: int, exclude: Exclusion | None = None, *, allowed: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the K allowed items with the highest inner products, approximately; see `Index.search`.

        Raises:
            InputError: a shape is wrong, or K < 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        queries = self.vectors.checked_queries(queries)
        mask = self.vectors.allowed(allowed)
        if mask is not None and mask.sum() <= max(NARROW_ITEMS, self.num_items // NARROW_SHARE):
            return self._narrow(queries, k, exclude, mask)
        scores = torch.full((len(queries), k), -torch.inf)
        items = torch.full((len(queries), k), -1, dtype=torch.int64)
        offsets, excluded = (np.zeros(len(queries) + 1, dtype=np.int64), np.empty(0, dtype=np.int64))
        if exclude is not None:
            offsets, excluded = plain(exclude)
            _check(offsets, excluded, len(queries), self.num_items)
        for start in range(0, len(queries), BLOCK):
            stop = min(start + BLOCK, len(queries))
            block = offsets[start : stop + 1]
            part = _pairs(block - block[0], excluded[block[0] : block[-1]], self.num_items)
            scores[start:stop], items[start:stop] = self._block(queries[start:stop], k, np.unique(part), mask)
        return scores, items

    def add(self, vectors: Tensor) -> IntArray:
        """Add items [n, D] without a rebuild; return their new codes."""
        codes = self.vectors.add(vectors)
        self._exact = None
        self.engine.add(codes, vectors.detach().float().cpu().numpy())
        return codes

    def update(self, codes: IntArray, vectors: Tensor) -> None:
        """Replace the embeddings of items, [n, D], without a rebuild."""
        self.engine.remove(codes[self.vectors.alive[codes]])
        self.vectors.update(codes, vectors)
        self._exact = None
        self.engine.add(codes, vectors.detach().float().cpu().numpy())

    def remove(self, codes: IntArray) -> None:
        """Remove items from all future results."""
        self.engine.remove(codes[self.vectors.alive[codes]])
        self.vectors.remove(codes)

    def _block(self, queries: Tensor, k: int, excluded: IntArray, mask: Mask | None) -> tuple[Tensor, Tensor]:
        """Search one block of rows; `excluded` are row * N + item, ascending."""
        count = self.num_items if mask is None else int(mask.sum())
        scores = torch.full((len(queries), k), -torch.inf)
        items = torch.full((len(queries), k), -1, dtype=torch.int64)
        rows = np.arange(len(queries))
        # The block's average number of exclusions is usually enough of a margin; rows that need more are searched
        # again.
        oversample = self.engine.oversample
        fetch = min(count, int(np.ceil((k + len(excluded) / max(len(queries), 1)) * oversample)))
        while len(rows) and fetch:
            depth = max(1.0, fetch / (k * oversample) * (self.num_items / count))
            candidates = self.engine.candidates(queries[rows].numpy(), fetch, mask, depth)
            # A database may contain items that were added after this index was loaded.
            candidates = np.where(candidates < self.num_items, candidates, -1)
            kept = (candidates >= 0) & ~_is_in(rows[:, None] * self.num_items + candidates, excluded)
            # An empty slot means that the engine has no more candidates for the row; other short rows are searched
            # again.
            short = kept.sum(1) < min(k, count)
            ended = short & ((candidates < 0).any(1) | (fetch >= count))
            done = ~short
            chosen = torch.from_numpy(rows[done])
            scores[chosen], items[chosen] = self._best(queries[chosen], candidates[done], kept[done], k)
            for row in rows[ended]:
                scores[row], items[row] = self._every_item(queries[row], k, int(row), excluded, mask)
            rows = rows[short & ~ended]
            fetch = min(count, 2 * fetch)
        return scores, items

    def _best(self, queries: Tensor, candidates: IntArray, kept: Mask, k: int) -> tuple[Tensor, Tensor]:
        """Select the K best candidates by exact scores."""
        codes = torch.from_numpy(np.where(kept, candidates, 0))
        scores = torch.empty(codes.shape)
        step = max(1, GATHERED // codes.shape[1])
        for start in range(0, len(codes), step):
            rows = slice(start, start + step)
            scores[rows] = torch.bmm(self.vectors.rows(codes[rows]), queries[rows, :, None])[:, :, 0]
        return self._sorted(scores, codes, torch.from_numpy(kept), k)

    def _every_item(
        self, query: Tensor, k: int, row: int, excluded: IntArray, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        kept = self.vectors.alive.copy() if mask is None else mask.copy()
        own = excluded[np.searchsorted(excluded, row * self.num_items) :]
        kept[own[: np.searchsorted(own, (row + 1) * self.num_items)] - row * self.num_items] = False
        codes = torch.from_numpy(np.flatnonzero(kept))
        scores = self.vectors.scores(query)[codes]
        best, items = self._sorted(scores[None], codes[None], torch.ones(1, len(codes), dtype=torch.bool), k)
        return best[0], items[0]

    def _sorted(self, scores: Tensor, codes: Tensor, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Select the K best of [B, m] scores, ties by `tie_order`; -inf and -1 where fewer are kept."""
        found = best_of(torch.where(kept, scores, -torch.inf), torch.where(kept, codes, -1), k)
        out_scores, out_items = torch.full((len(scores), k), -torch.inf), torch.full((len(scores), k), -1)
        for out, best in zip((out_scores, out_items), found, strict=True):
            out[:, : best.shape[1]] = best
        return out_scores, out_items

    def _narrow(self, queries: Tensor, k: int, exclude: Exclusion | None, mask: Mask) -> tuple[Tensor, Tensor]:
        if self._exact is None:
            self._exact = ExactCatalog(self.vectors)
        return self._exact.search(queries, k, exclude, allowed=mask)


def _pairs(offsets: IntArray, items: IntArray, num_items: int) -> IntArray:
    """Encode the (row, item) pairs of compressed rows as single integers, row * N + item."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets)) * num_items + items


def _is_in(values: IntArray, ascending: IntArray) -> Mask:
    if not len(ascending):
        return np.zeros(values.shape, dtype=np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[at] == values)


def _check(offsets: IntArray, items: IntArray, rows: int, num_items: int) -> None:
    if offsets.shape != (rows + 1,) or offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise InputError(f"exclude: offsets must have shape [{rows + 1}] and ascend from 0 to {len(items)}")
    if len(items) and not 0 <= items.min() <= items.max() < num_items:
        raise InputError(f"exclude: items must be codes in 0 .. {num_items - 1}")
