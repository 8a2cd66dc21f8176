"""Copies of an item among the candidates, found so that their product is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.negatives import Hits


@dataclass(frozen=True)
class Copies:
    """Candidates of which some are the same.

    Attributes:
        place: where one copy of each distinct candidate stands, int64 [U].
        of: which distinct candidate each one is, int64 [M].
        count: copies of each, [U].
    """

    place: Tensor
    of: Tensor
    count: Tensor

    def spread(self, by_distinct: Tensor) -> Tensor:
        """The gradient by each copy, [M, D], of that by the distinct candidates, [U, D]: copies share it alike."""
        return (by_distinct / self.count[:, None]).index_select(0, self.of)


def find_copies(candidates: Tensor, log_count: Tensor | None, hits: Hits | None) -> Copies | None:
    """Copies of an item that have the same embedding and the same log kappa; None where nothing is to be gained.

    Every term of a loss is then the same for each of them, whatever the form: one product and a weight serve all.
    In-batch candidates by Zipf's law are copies nearly to the half, and each known positive masks all of its item's.

    Args:
        candidates: [M, D].
        log_count: [M]; None for none.
        hits: knows the candidates' items.
    """
    if hits is None or hits.items is None or hits.empty is not None or candidates.device.type != "cpu":
        return None
    items = hits.items
    if len(items) < 2 or bool((items[1:] > items[:-1]).all()):
        return None
    distinct, of, count = torch.unique(items, return_inverse=True, return_counts=True)
    if len(distinct) == len(items):
        return None
    place = torch.empty_like(distinct).scatter_(0, of, torch.arange(len(items)))
    like = place[of]
    if not torch.equal(candidates, candidates.index_select(0, like)):
        return None  # a tower with dropout, say, that embeds each copy on its own
    if log_count is not None and not torch.equal(log_count, log_count[like]):
        return None  # a correction that asks which source a copy came from
    return Copies(place, of, count.to(candidates.dtype))
