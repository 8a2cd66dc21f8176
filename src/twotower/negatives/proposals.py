"""Distributions over the catalog that negatives can be drawn from; each tells the exact probability of its draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from twotower.errors import InputError


class Proposal(nn.Module, ABC):
    """A probability distribution q over the N items of the catalog.

    Attributes:
        num_items: N.
    """

    num_items: int

    @abstractmethod
    def log_prob(self, items: Tensor) -> Tensor:
        """log q_j, float64, the shape of `items` (int64 codes); -inf where the proposal never draws the item."""

    @abstractmethod
    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Independent draws with replacement, int64 codes of shape `size`, on the device of the proposal."""


class Uniform(Proposal):
    """q_j = 1/N for every item of the catalog, whether or not it occurs in training.

    Args:
        num_items: N.

    Raises:
        InputError: N is less than 1.
    """

    anchor: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        if num_items < 1:
            raise InputError(f"num_items: expected at least 1, found {num_items}")
        self.num_items = num_items
        # An empty buffer: it moves with the module, and so tells where draws belong.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def log_prob(self, items: Tensor) -> Tensor:
        """-log N, float64, the shape of `items`."""
        return torch.full(items.shape, -math.log(self.num_items), dtype=torch.float64, device=items.device)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draws of shape `size`, each item with probability 1/N."""
        return torch.randint(self.num_items, size, generator=generator, device=self.anchor.device)
