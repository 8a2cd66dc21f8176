"""Mined hard negatives: a window of the items that the model itself ranks highest for a query."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.negatives.sources import DrawRequest, PerQuery, Stratum

#: Number of training pairs whose skipped items are counted at a time.
_PAIRS = 1 << 16


class HardNegatives(PerQuery):
    """Hard negatives: a window of the ranking of each query by the current model, refreshed periodically.

    r_1, r_2, ... are the items in descending order of raw score at the last refresh, without the query's training
    items. With `ranks` (a, b), the items of a row (x, y) that may be drawn, E, and the items that are skipped, F, are

        E(x, y) = { r_i : a <= i <= b, s_i <= limit },   F(x, y) = { r_i : i <= b } without E
        limit   = min( s_y - margin, s_y - relative_margin |s_y|, max_score )

    Both sampling rules have a known expected count, and no other source contributes the row's stratum:

        top       the stratum is the first R items of E, all of them in every draw:              kappa = 1
        random    the stratum is E, R of its items are drawn uniformly without replacement:      kappa = min(1, R / |E|)

    This is stratified sampling: the source estimates the sum over the stratum, the others the rest, so a pool stays
    unbiased whatever the ranking. It lowers the spread of the estimate where the model has its largest scores; it does
    not weight hard negatives more than the full softmax does. Skipped items may come from the other sources
    (`skipped="keep"`), or they are left out of the row's sum (`"mask"`); the target is then the softmax without F.

    Mine with the raw scores: in corrected logits rare items would look hard.

    State (the mined items, and the number of skipped items of each pair) is in `state_dict`.

    Args:
        num_queries: number of queries, Q.
        size: R, hard negatives per row; there are none until the first `refresh`.
        ranks: a and b, from 1; None for (1, R).
        sampling: "top" takes the first R items of E, "random" draws R items of E.
        skipped: whether skipped items may come from the other sources ("keep") or are left out of the sum ("mask").
        margin: smallest allowed s_y - s_j, in scores not divided by the temperature; None for no limit.
        relative_margin: smallest allowed (s_y - s_j) / |s_y|; None for no limit.
        max_score: largest allowed score; None for no limit.
        pairs: the training pairs, encoded as query * N + item, int64 [P], ascending and distinct; needed with a limit.
        num_items: N; needed with a limit.
        after: epochs before the first refresh.

    Raises:
        InputError: the size, the window or a limit is out of range, or a limit or the mask lacks what it needs.
    """

    items: Tensor
    limits: Tensor | None
    pairs: Tensor | None

    def __init__(
        self,
        num_queries: int,
        size: int,
        *,
        ranks: tuple[int, int] | None = None,
        sampling: Literal["top", "random"] = "top",
        skipped: Literal["keep", "mask"] = "keep",
        margin: float | None = None,
        relative_margin: float | None = None,
        max_score: float | None = None,
        pairs: Tensor | None = None,
        num_items: int | None = None,
        after: int = 1,
    ) -> None:
        if size < 1:
            raise InputError(f"size: expected at least 1 hard negative for each row, found {size}")
        first, last = ranks or (1, size)
        if first < 1 or last - first + 1 < size:
            raise InputError(
                f"ranks: [{first}, {last}]: expected two ranks from 1, with at least size={size} items from the first "
                "to the last"
            )
        limits = {"margin": margin, "relative_margin": relative_margin, "max_score": max_score}
        for name, value in limits.items():
            least = -math.inf if name == "max_score" else 0.0
            if value is not None and not (math.isfinite(value) and value >= least):
                raise InputError(f"{name}: expected a finite number{' >= 0' if least == 0 else ''}, found {value}")
        is_limited = any(value is not None for value in limits.values())
        if is_limited and (pairs is None or num_items is None):
            raise InputError("pairs: a margin or max_score needs the training pairs and num_items")
        if skipped == "mask" and first == 1 and not is_limited:
            raise InputError(
                "skipped: mask: nothing is skipped; set ranks, margin, relative_margin or max_score, or skipped: keep"
            )
        super().__init__(torch.full((num_queries, last), -1, dtype=torch.int32))
        self.size, self.first, self.last, self.after = size, first, last, after
        self.sampling, self.skipped = sampling, skipped
        self.margin, self.relative_margin, self.max_score = margin, relative_margin, max_score
        self.num_items = num_items
        self._eligible: tuple[float, float] | None = None
        self.register_buffer("pairs", pairs if is_limited else None, persistent=False)
        counts = torch.zeros(len(pairs), dtype=torch.int32) if is_limited and pairs is not None else None
        self.register_buffer("limits", counts)

    def draw(self, request: DrawRequest) -> Tensor:
        """Draw the items of the selected rows, int64 [B, R], -1 where fewer are eligible."""
        return self.stratum(request).drawn

    def stratum(self, request: DrawRequest) -> Stratum:
        """Return the eligible items of the selected rows, and the items drawn from them.

        Random numbers are drawn for all rows of the batch, so that they do not depend on how it is split.

        Raises:
            InputError: the request has no queries.
        """
        ranked = super().draw(request)
        rank = torch.arange(1, self.last + 1, device=ranked.device)
        start, above = self._starts(request)
        eligible = (ranked >= 0) & (rank >= start[:, None])
        skipped = None
        if self.skipped == "mask":
            skipped = ranked.masked_fill(rank >= above[:, None], -1)
        if self.sampling == "top":
            place = start[:, None] - 1 + torch.arange(self.size, device=ranked.device)
            taken = ranked.gather(1, place.clamp(max=self.last - 1)).masked_fill(place >= self.last, -1)
            return Stratum(taken, taken, skipped=skipped)
        noise = torch.rand(
            (len(request.positives), self.last), generator=request.generator, dtype=torch.float64, device=ranked.device
        )
        noise = noise if request.rows is None else noise[request.rows]
        lowest, place = noise.masked_fill(~eligible, 2.0).topk(self.size, largest=False)
        drawn = ranked.gather(1, place).masked_fill(lowest > 1.0, -1)
        count = eligible.sum(1).clamp(min=self.size).double()
        return Stratum(ranked.masked_fill(~eligible, -1), drawn, math.log(self.size) - count.log(), skipped)

    def _starts(self, request: DrawRequest) -> tuple[Tensor, Tensor]:
        """Return the first rank that may be drawn and the first that is not skipped, from 1, int64 [B] each.

        They differ only for a row that is not a training pair: its limit is unknown, so nothing is drawn for it.
        """
        positives, queries = request.own_positives, request.queries
        first = torch.full_like(positives, self.first)
        if self.pairs is None or self.limits is None or self.num_items is None or queries is None:
            return first, first
        if not len(self.pairs):
            return torch.full_like(positives, self.last + 1), first
        keys = queries * self.num_items + positives
        at = torch.searchsorted(self.pairs, keys).clamp(max=len(self.pairs) - 1)
        known = (self.pairs[at] == keys) & (queries >= 0)
        above = torch.where(known, self.limits[at].long() + 1, 1).clamp(min=self.first)
        return torch.where(known, above, self.last + 1), above

    def pairs_of(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the training pairs of some queries: (index, row among the queries, item), int64 [P'] each."""
        assert self.pairs is not None and self.num_items is not None
        start = torch.searchsorted(self.pairs, queries * self.num_items)
        count = torch.searchsorted(self.pairs, (queries + 1) * self.num_items) - start
        row = torch.repeat_interleave(count)
        index = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count - start)[row]
        return index, row, self.pairs[index] % self.num_items

    def refresh(
        self, queries: Tensor, ranked: Tensor, scores: Tensor | None = None, own_scores: Tensor | None = None
    ) -> None:
        """Replace the mined items of some queries with the first items of a new ranking.

        Args:
            queries: query codes, int64 [E].
            ranked: the highest-ranked items of each query, known positives excluded, int64 [E, >= b], padded with -1.
            scores: the scores of `ranked`, descending, float32 [E, >= b]; needed with a limit.
            own_scores: scores of the training pairs in the order of `pairs_of(queries)`, [P']; needed with a limit.

        Raises:
            InputError: the ranking has a different number of queries, or fewer than b items per query, or scores are
                missing.
        """
        if ranked.ndim != 2 or len(ranked) != len(queries) or ranked.shape[1] < self.last:
            raise InputError(
                f"ranked: expected [{len(queries)}, at least {self.last}], padded with -1; found {list(ranked.shape)}"
            )
        ranked = ranked[:, : self.last]
        if self.limits is not None:
            if scores is None or own_scores is None:
                raise InputError("scores: a margin or max_score needs the scores of the ranking and of the pairs")
            falling = -scores[:, : self.last].double().masked_fill(ranked < 0, math.inf)
            index, row, _ = self.pairs_of(queries)
            for start in range(0, len(index), _PAIRS):
                part = slice(start, start + _PAIRS)
                limit = self._limit(own_scores[part].double())
                above = torch.searchsorted(falling[row[part]], -limit[:, None])[:, 0]
                self.limits[index[part]] = above.to(self.limits.dtype)
        self.items[queries] = ranked.to(self.items.dtype)
        self._eligible = None

    @property
    def is_mined(self) -> bool:
        """Whether items have been mined, or loaded with a saved state."""
        return self._eligible is not None or bool((self.items[:, 0] >= 0).any())

    def eligible(self) -> tuple[float, float]:
        """Return the mean of |E| and the share of empty sets E.

        With a limit both are taken over the training pairs, otherwise over the queries. They are computed once after
        each refresh.
        """
        if self._eligible is None:
            count = (self.items >= 0).sum(1)
            if self.pairs is None or self.limits is None or self.num_items is None:
                count = count - (self.first - 1)
            else:
                count = count[self.pairs // self.num_items] - self.limits.clamp(min=self.first - 1)
            count = count.clamp(min=0).double()
            self._eligible = float(count.mean()), float((count == 0).double().mean())
        return self._eligible

    def _limit(self, own: Tensor) -> Tensor:
        """Return the largest score that an eligible item may have, given the score of each pair, float64 [P]."""
        limit = torch.full_like(own, math.inf if self.max_score is None else self.max_score)
        if self.margin is not None:
            limit = torch.minimum(limit, own - self.margin)
        if self.relative_margin is not None:
            limit = torch.minimum(limit, own - self.relative_margin * own.abs())
        return limit
