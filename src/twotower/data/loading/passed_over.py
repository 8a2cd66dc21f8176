"""The slates of the rows of a batch, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PassedOver:
    """The items that were shown to the query of each row and passed over.

    Attributes:
        items: int64 [B, S], padded with -1; an item may occur several times in a row.
        weights: float32 [B, S], how much each item counts, at least 0; None for 1 each.
    """

    items: Tensor
    weights: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> PassedOver:
        return PassedOver(self.items[rows], None if self.weights is None else self.weights[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PassedOver:
        """Move the tensors to a device."""
        weights = None if self.weights is None else self.weights.to(device, non_blocking=non_blocking)
        return PassedOver(self.items.to(device, non_blocking=non_blocking), weights)

    def distinct(self) -> tuple[Tensor, Tensor]:
        """Return each item of a row once, with its largest weight: (items [B, S], -1 where empty; weights [B, S])."""
        weights = torch.ones(self.items.shape, device=self.items.device) if self.weights is None else self.weights
        by_weight = torch.sort(weights, dim=1, descending=True, stable=True).indices
        items, order = torch.sort(self.items.gather(1, by_weight), dim=1, stable=True)
        weights = weights.gather(1, by_weight).gather(1, order)
        later = torch.zeros_like(items, dtype=torch.bool)
        later[:, 1:] = items[:, 1:] == items[:, :-1]
        items = items.masked_fill(later | (weights <= 0), -1)
        return items, weights.masked_fill(items < 0, 0.0)
