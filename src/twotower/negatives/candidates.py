"""The candidates of a batch: items, expected counts and masks in one object, so that they cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from twotower.negatives.masks import NegativeMask


@dataclass(frozen=True)
class Candidates:
    """The candidates of one batch: candidates shared by all rows, [M], and per-row candidates, [B, R], if any.

    Attributes:
        items: codes of the shared candidates, int64 [M].
        log_expected_count: log kappa_j of each, pooled over all sources, float32 [M]; 0 for an item that is always
            included, inf for an empty slot. After `collapse()`, exp(-log_expected_count) is the total weight of all
            copies of the item.
        negative_mask: the mask of the shared candidates as (row, item) pairs and rules, for the tiled losses; `mask` is
            the matrix.
        multiplicity: how many drawn copies each candidate represents, int64 [M]: 1 before copies are merged, 0 for an
            empty slot.
        source: index of the source in the pool that drew the candidate, int64 [M]; -1 after copies are merged.
        positives: the rows' positives, int64 [B].
        positive_log_count: the pool's correction evaluated at the positives, float32 [B]; 0 for a positive that is
            always included. Only losses that correct the positive use it.
        log_unmasked: log of the probability that one draw is neither the row's positive nor one of its known
            positives, float32 [B]; None unless the objective needs it (`Pool.counts_unmasked`).
        row_items: per-row candidates, int64 [B, R], -1 where empty; None if there are none.
        row_log_expected_count: log kappa of each per-row candidate, float32 [B, R].
        row_mask: bool [B, R], True where a per-row candidate is not a negative for its row.
        slate: float32 [B, S], weights of the items of each row's slate, which are the last S of its per-row candidates,
            for a loss on the slate; 0 where empty. The partition sum leaves them out (`row_mask`). None without such a
            loss.
    """

    items: Tensor
    log_expected_count: Tensor
    negative_mask: NegativeMask
    multiplicity: Tensor
    source: Tensor
    positives: Tensor
    positive_log_count: Tensor
    row_items: Tensor | None = None
    row_log_expected_count: Tensor | None = None
    row_mask: Tensor | None = None
    log_unmasked: Tensor | None = None
    slate: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Bool [B, M], True where a candidate is not a negative for the row; computed on first access.

        A hit is the row's own positive (accidental hit), a known positive, an item of one of the row's strata, an item
        that a stratum skips, a candidate that a rule excludes (eligibility, guard), or an empty slot.
        """
        return self.negative_mask.dense()

    def head(self, rows: int) -> Candidates:
        """Return the same candidates for the first `rows` rows only."""
        return self._rows(slice(rows), self.negative_mask.head(rows))

    def row(self, row: int) -> Candidates:
        """Return the same candidates for a single row."""
        part = slice(row, row + 1)
        return self._rows(part, NegativeMask.of(self.mask[part]))

    def _rows(self, part: slice, mask: NegativeMask) -> Candidates:
        return replace(
            self,
            negative_mask=mask,
            positives=self.positives[part],
            positive_log_count=self.positive_log_count[part],
            log_unmasked=None if self.log_unmasked is None else self.log_unmasked[part],
            row_items=None if self.row_items is None else self.row_items[part],
            row_log_expected_count=None if self.row_log_expected_count is None else self.row_log_expected_count[part],
            row_mask=None if self.row_mask is None else self.row_mask[part],
            slate=None if self.slate is None else self.slate[part],
        )

    def without_slate(self) -> Candidates:
        """Return only the candidates of the partition sum, without the slates, which have their own loss."""
        if self.slate is None or self.row_items is None:
            return self
        kept = self.row_items.shape[1] - self.slate.shape[1]

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None or not kept else values[:, :kept]

        return replace(
            self,
            row_items=cut(self.row_items),
            row_log_expected_count=cut(self.row_log_expected_count),
            row_mask=cut(self.row_mask),
            slate=None,
        )

    def collapse(self, *, sum_weights: bool = True) -> Candidates:
        """Merge the copies of each shared item, so that no product is computed twice.

        Args:
            sum_weights: merge the copies into their summed weight, for losses that sum exponentials:

                    sum over copies of exp(s_j - log kappa_j) = exp(s_j - log kappa'_j)
                    log kappa'_j = -logsumexp(-log kappa_j)

                False keeps log kappa, for losses that weight each candidate by its `multiplicity`; copies with
                different log kappa are then not merged.
        """
        if not sum_weights:
            return self._merge_equal()
        items, inverse = torch.unique(self.items, return_inverse=True)
        weight = torch.zeros(len(items), dtype=torch.float64, device=items.device)
        # The weights of one item's copies are close (the same kappa, or one per source): subtracting the item's own
        # maximum is enough to avoid overflow.
        log_weight = -self.log_expected_count.double()
        largest = torch.full_like(weight, -torch.inf).scatter_reduce(0, inverse, log_weight, "amax")
        weight.index_add_(0, inverse, torch.exp(log_weight - largest[inverse]).nan_to_num(0.0))
        # Copies are masked in the same rows, except empty slots, which are masked in all rows: prefer a live copy.
        place = torch.arange(len(inverse), device=items.device)
        live = torch.isfinite(log_weight).long() * len(inverse)
        chosen = torch.zeros_like(items).scatter_reduce(0, inverse, place + live, "amax") % max(len(inverse), 1)
        multiplicity = torch.zeros_like(items).index_add_(0, inverse, self.multiplicity)
        return replace(
            self,
            items=items,
            log_expected_count=-(largest + weight.log()).to(self.log_expected_count.dtype),
            negative_mask=self.negative_mask.select(chosen),
            multiplicity=multiplicity,
            source=torch.full_like(items, -1),
        )

    def _merge_equal(self) -> Candidates:
        """Merge the copies of each shared item that have the same log kappa; see `collapse`."""
        items, order = torch.sort(self.items, stable=True)
        log_count = self.log_expected_count[order]
        is_new = torch.ones_like(items, dtype=torch.bool)
        is_new[1:] = (items[1:] != items[:-1]) | (log_count[1:] != log_count[:-1])
        chosen = order[is_new]
        multiplicity = torch.zeros_like(chosen).index_add_(0, is_new.cumsum(0) - 1, self.multiplicity[order])
        return replace(
            self,
            items=self.items[chosen],
            log_expected_count=self.log_expected_count[chosen],
            negative_mask=self.negative_mask.select(chosen),
            multiplicity=multiplicity,
            source=torch.full_like(chosen, -1),
        )

    def to(self, device: torch.device | str) -> Candidates:
        """Return a copy on another device."""
        present = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        moved: dict[str, Any] = {name: value.to(device) for name, value in present.items()}
        return replace(self, **moved)
