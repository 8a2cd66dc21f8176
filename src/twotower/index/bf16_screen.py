"""Exact search that estimates all scores in bfloat16 and computes the best ones in float32.

Processors with bfloat16 matrix units multiply bfloat16 several times faster than float32. A bfloat16 product is only an
estimate, but its error is bounded, and the bound is small compared with the distance from a typical score to the K-th
best. So every score is estimated, items that cannot be among the K best according to the bound are dropped, and the few
remaining items are scored in float32. No item of the exact result is lost.

With q = q' + a and x = x' + c, where q' and x' are the embeddings rounded to bfloat16,

    |<q, x> - <q', x'>| = |<a, x> + <q', c>| <= |a| |x| + |q'| |c|,

plus the rounding of float32 sums: at most D 2^-24 |q||x| for the score and twice that for the estimate (matrix units
may also round each product). The final rounding of the estimate to bfloat16 needs no bound. It is monotone, so an
estimate above a limit is still not below that limit rounded down.
"""

from functools import cache

import torch
from torch import Tensor

from twotower.index.topk import (
    BestKeys,
    ExcludedColumns,
    Exclusion,
    Progress,
    ProgressReport,
    TopKResults,
    above,
    blocks,
    chunk_maxima,
    kth_largest,
)

#: With fewer queries in a search, or fewer items in the catalog, a plain product is as fast.
LEAST_QUERIES, LEAST_ITEMS = 64, 1 << 16
_ROWS, _COLUMNS = 2048, 8192
# Norms and limits are computed in float32; this factor covers their rounding.
_SLACK = 1.0 + 2.0**-10
# Matrix units flush numbers below float32's smallest normal number, 2^-126, to zero.
_UNDERFLOW = 2.0**-100


class Bf16Screen:
    """The items of a catalog in bfloat16, in addition to float32.

    Args:
        items: [N, D] float32 on the CPU, laid out in tie order, all finite.
        order: [N] int64, the item of each row of `items`.
    """

    def __init__(self, items: Tensor, order: Tensor) -> None:
        self._items, self._order = items, order
        self._low = items.to(torch.bfloat16)
        self._norm = self._low_norm = self._residual = 0.0
        for part in blocks(len(items), 1 << 16):
            low = self._low[part].float()
            self._norm = max(self._norm, _longest(items[part]))
            self._low_norm = max(self._low_norm, _longest(low))
            self._residual = max(self._residual, _longest(items[part] - low))

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Exclusion | None = None,
        *,
        row_block: int | None = None,
        column_tile: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Search like `ExactIndex.search`; return None if the screen is not applicable.

        It is applicable only if at least K items of the first tile have a positive score for every query, because
        positive bfloat16 numbers are ordered like the integers with the same bits, which are compared faster. It is not
        applicable if products may exceed the range of float32.
        """
        columns = min(column_tile or _COLUMNS, len(self._items))
        if k > columns or not bool(queries.isfinite().all()) or not self._in_range(queries):
            return None
        rows = row_block or _ROWS
        excluded = None if exclude is None else ExcludedColumns.of(exclude, len(queries), self._order)
        counter = ProgressReport(progress, len(queries), rows, len(self._items), columns)
        results = TopKResults(len(queries), k, self._order)
        room = torch.empty(min(rows, len(queries)) * columns, dtype=torch.bfloat16)
        for block in blocks(len(queries), rows):
            keys = self._block(queries, block, k, excluded=excluded, columns=columns, room=room, counter=counter)
            if keys is None:
                return None
            results.put(block, keys)
        return results.scores, results.items

    def _block(
        self,
        queries: Tensor,
        block: slice,
        k: int,
        *,
        excluded: ExcludedColumns | None,
        columns: int,
        room: Tensor,
        counter: ProgressReport,
    ) -> Tensor | None:
        queries = queries[block]
        low, margin = queries.to(torch.bfloat16), self.margin(queries)
        best = BestKeys(len(queries), k, queries.device, rescore=lambda row, column: self.score(queries, row, column))
        entries = None if excluded is None else excluded.block(block.start, block.stop, columns)
        limit: Tensor | None = None
        for index, part in enumerate(blocks(len(self._items), columns)):
            estimate = room[: len(queries) * (part.stop - part.start)].view(len(queries), -1)
            torch.mm(low, self._low[part].T, out=estimate)
            if entries is not None:
                estimate[entries.tile(index, part.start)] = -torch.inf
            tile = estimate.view(torch.int16)
            maxima = chunk_maxima(tile)
            if limit is None:
                least = kth_largest(tile, maxima, k)
                if least is None:
                    return None
                value = least.view(torch.bfloat16).float()
                # K estimates are at least this large; before rounding to nearest they were at most 2^-8 smaller.
                best.bound(value * (1.0 - 2.0**-8 * _SLACK) - margin)
                limit = _limit(best.threshold, margin)
                if limit is None:
                    return None
            row, column, _ = above(tile, maxima, limit)
            if best.offer(row, column + part.start, None):
                limit = _limit(best.threshold, margin)
                assert limit is not None  # thresholds only rise
            counter.tile()
        return best.sorted()

    def score(self, queries: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Compute the scores of query `row` [P] and item position `column` [P], float32, independent of P."""
        products = queries.index_select(0, row) * self._items.index_select(0, column)
        return products.sum(1)

    def margin(self, queries: Tensor) -> Tensor:
        """Bound the difference between a score and its estimate before rounding, [B, 1]."""
        low = queries.to(torch.bfloat16).float()
        norm, low_norm = queries.norm(dim=1, keepdim=True), low.norm(dim=1, keepdim=True)
        residual = (queries - low).norm(dim=1, keepdim=True)
        sums = (queries.shape[1] + 2) * 2.0**-24 * (norm * self._norm + 2.0 * low_norm * self._low_norm)
        bound: Tensor = _SLACK * (residual * self._norm + low_norm * self._residual + sums)
        bound += _UNDERFLOW * (1.0 + norm + self._norm)
        return bound

    def _in_range(self, queries: Tensor) -> bool:
        return max(_longest(queries), 1.0) * max(self._norm, 1.0) < 2.0**100


def _longest(vectors: Tensor) -> float:
    return float(vectors.norm(dim=1).max()) if len(vectors) else 0.0


def _limit(threshold: Tensor, margin: Tensor) -> Tensor | None:
    """Return the bits that an estimate exceeds if its score exceeds `threshold`, int16 [B, 1]; None if not positive."""
    least = threshold - margin * _SLACK - threshold.abs() * 2.0**-22
    # Dropping the lower half of the bits of a positive float32 rounds it down to bfloat16.
    bits = (least.view(torch.int32) >> 16).to(torch.int16)
    return None if bool((bits < 1).any()) else bits - 1


@cache
def serves() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported())  # type: ignore[no-untyped-call]
