"""Detection of repeated items among the candidates, so that their product is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.negatives import NegativeMask


@dataclass(frozen=True)
class CandidateCopies:
    """A mapping between candidates, [M], and distinct candidates, [U].

    Attributes:
        place: position of one copy of each distinct candidate, int64 [U].
        of: index of the distinct candidate of each candidate, int64 [M].
        count: number of copies of each distinct candidate, [U].
    """

    place: Tensor
    of: Tensor
    count: Tensor

    def spread(self, by_distinct: Tensor) -> Tensor:
        """Split the gradient of each distinct candidate, [U, D], evenly over its copies, [M, D]."""
        return (by_distinct / self.count[:, None]).index_select(0, self.of)


def find_copies(candidates: Tensor, log_count: Tensor | None, mask: NegativeMask | None) -> CandidateCopies | None:
    """Find copies of an item with the same embedding and the same log kappa; None if there is nothing to gain.

    Such copies contribute equal terms to every loss, so one product and a weight are enough for all of them. With
    Zipf-distributed popularity nearly half of the in-batch candidates are copies, and each known positive masks all
    copies of its item.

    Args:
        candidates: [M, D].
        log_count: [M], or None.
        mask: the mask, which has the candidates' items.
    """
    if mask is None or mask.items is None or mask.empty is not None or candidates.device.type != "cpu":
        return None
    items = mask.items
    if len(items) < 2 or bool((items[1:] > items[:-1]).all()):
        return None
    distinct, of, count = torch.unique(items, return_inverse=True, return_counts=True)
    if len(distinct) == len(items):
        return None
    place = torch.empty_like(distinct).scatter_(0, of, torch.arange(len(items)))
    like = place[of]
    if not torch.equal(candidates, candidates.index_select(0, like)):
        return None  # for example a tower with dropout, which embeds each copy differently
    if log_count is not None and not torch.equal(log_count, log_count[like]):
        return None  # a correction that depends on the source of a copy
    return CandidateCopies(place, of, count.to(candidates.dtype))
