"""Exact search whose products are taken in bfloat16 and whose answers are scored in float32.

Processors with bfloat16 matrix units multiply several times faster in it than in float32. A product in bfloat16 is only
an estimate, but one whose error is bounded, and the bound is small beside the distance from a typical score to the
K-th best. So: every score is estimated; what by the bound cannot be among the best is dropped; the few that are left
are scored in float32. No item of the exact answer is lost.

With q = q' + a and x = x' + c, where q' and x' are the embeddings rounded to bfloat16,

    |<q, x> - <q', x'>| = |<a, x> + <q', c>| <= |a| |x| + |q'| |c|,

to which the rounding of float32 sums is added: at most D 2^-24 |q||x| for the score, twice that for the estimate
(matrix units may round each product, too). The estimate's own rounding to bfloat16 needs no bound: it keeps the order,
so an estimate above a limit is still not below that limit rounded down.
"""

from functools import cache

import torch
from torch import Tensor

from twotower.index.best import Best, above, chunk_maxima, kth_largest
from twotower.index.exclusions import Excluded, Exclusion
from twotower.index.topk import Progress, Results, Told, blocks

#: Below these a plain product is as fast: queries of a search, items of a catalog.
LEAST_QUERIES, LEAST_ITEMS = 64, 1 << 16
_ROWS, _COLUMNS = 2048, 8192
# Norms and limits are computed in float32 themselves; this covers their rounding.
_SLACK = 1.0 + 2.0**-10
# Matrix units take numbers below float32's smallest normal one, 2^-126, for zero.
_UNDERFLOW = 2.0**-100


class Screen:
    """The items of a catalog in bfloat16, beside those in float32.

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
        """As `ExactIndex.search`; None where the screen does not serve.

        It serves where K items or more of the first tile have a positive score for every query: positive bfloat16
        numbers are ordered as the integers of the same bits, which are compared faster. Numbers whose products leave
        the range of float32 are left to the plain search, too.
        """
        columns = min(column_tile or _COLUMNS, len(self._items))
        if k > columns or not bool(queries.isfinite().all()) or not self._in_range(queries):
            return None
        rows = row_block or _ROWS
        excluded = None if exclude is None else Excluded.of(exclude, len(queries), self._order)
        told = Told(progress, len(queries), rows, len(self._items), columns)
        results = Results(len(queries), k, self._order)
        room = torch.empty(min(rows, len(queries)) * columns, dtype=torch.bfloat16)
        for block in blocks(len(queries), rows):
            keys = self._block(queries, block, k, excluded=excluded, columns=columns, room=room, told=told)
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
        excluded: Excluded | None,
        columns: int,
        room: Tensor,
        told: Told,
    ) -> Tensor | None:
        asked = queries[block]
        low, margin = asked.to(torch.bfloat16), self.margin(asked)
        best = Best(len(asked), k, asked.device, rescore=lambda row, column: self.score(asked, row, column))
        entries = None if excluded is None else excluded.block(block.start, block.stop, columns)
        limit: Tensor | None = None
        for index, part in enumerate(blocks(len(self._items), columns)):
            estimate = room[: len(asked) * (part.stop - part.start)].view(len(asked), -1)
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
                # K estimates are this large; before they were rounded to nearest, they were less by 2^-8 at most.
                best.bound(value * (1.0 - 2.0**-8 * _SLACK) - margin)
                limit = _limit(best.threshold, margin)
                if limit is None:
                    return None
            row, column, _ = above(tile, maxima, limit)
            if best.offer(row, column + part.start, None):
                limit = _limit(best.threshold, margin)
                assert limit is not None  # thresholds only rise
            told.tile()
        return best.sorted()

    def score(self, queries: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The score of query `row` [P] and the item of place `column` [P], float32, the same whatever P."""
        products = queries.index_select(0, row) * self._items.index_select(0, column)
        return products.sum(1)

    def margin(self, queries: Tensor) -> Tensor:
        """[B, 1]: how far the estimate of a score, before it is rounded, can be from the score at most."""
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
    """What the bits of an estimate must exceed for its score to exceed `threshold`, int16 [B, 1]; None below zero."""
    least = threshold - margin * _SLACK - threshold.abs() * 2.0**-22
    # Cutting the lower half of the bits of a positive float32 rounds it down to bfloat16.
    bits = (least.view(torch.int32) >> 16).to(torch.int16)
    return None if bool((bits < 1).any()) else bits - 1


@cache
def serves() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported())  # type: ignore[no-untyped-call]
