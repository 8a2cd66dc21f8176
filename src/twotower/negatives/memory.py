"""The cross-batch memory: candidates remembered from the last batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.negatives.frequency import Frequency, Group, GroupedFrequency
from twotower.negatives.sources import RandomSource, Request


class CrossBatchMemory(RandomSource):
    """The last M positives of earlier batches: kappa_j = M p_j, or 1 - (1-p_j)^M if unique.

    The memory contains item codes, not embeddings: remembered items are embedded again in every step, so no embedding
    is stale and both towers get their gradient. Only the choice of items ages; `age` reports by how much.

    With a grouped frequency each remembered row was drawn within the group g of its own batch, not within the group of
    the current batch: kappa_j = sum_g M_g p_j^g, with M_g remembered rows of group g.

    State (items, groups, steps, fill level) is in `state_dict`, so a resumed run continues with the same memory.

    Args:
        frequency: how often each item is a positive.
        size: M, how many positives are remembered.
        unique: remove duplicates within the memory.

    Raises:
        InputError: size is less than 1.
    """

    items: Tensor
    groups: Tensor
    steps: Tensor
    state: Tensor

    def __init__(self, frequency: Frequency, size: int, *, unique: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size: expected at least 1 remembered item, found {size}")
        self.frequency = frequency
        self.size = size
        self.unique = unique
        self.register_buffer("items", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("groups", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(size, dtype=torch.int64))
        # Filled places, next place, step: Python integers, so that reading them never synchronizes with a device.
        self._filled, self._next, self._step = 0, 0, 0
        self.register_buffer("state", torch.zeros(3, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_restore)  # type: ignore[no-untyped-call]

    def draw(self, request: Request) -> Tensor:
        """Return the remembered items, [M] or fewer at the start; call `remember` after the draw."""
        del request
        return self.items[: self._filled].clone()

    def remember(self, positives: Tensor, group: Group | None = None) -> None:
        """Store the positives of a finished draw, and their group, in place of the oldest ones."""
        newest = positives[-self.size :]
        places = (torch.arange(len(newest), device=self.items.device) + self._next) % self.size
        self.items[places] = newest
        self.groups[places] = 0 if group is None else int(group)
        self.steps[places] = self._step
        self._next = (self._next + len(newest)) % self.size
        self._filled = min(self._filled + len(newest), self.size)
        self._step += 1
        self.state.copy_(torch.tensor([self._filled, self._next, self._step]))

    @property
    def age(self) -> float:
        """Mean age of the remembered items, in steps; 0 while the memory is empty."""
        return float((self._step - self.steps[: self._filled]).double().mean()) if self._filled else 0.0

    def draws(self, request: Request) -> int:
        """Return the number of remembered positives."""
        del request
        return self._filled

    def log_prob(self, items: Tensor, request: Request) -> Tensor:
        """Return log p_j; with a grouped frequency, of the mean over the remembered rows' groups."""
        if not self._mixes_groups:
            return self.frequency.log_prob(items, request.group)
        rows, log_prob = self._by_group(items)
        return torch.logsumexp(log_prob + rows.log(), 0) - math.log(self._filled)

    def log_absence(self, items: Tensor, request: Request) -> Tensor:
        """Return the log of prod_g (1 - p_j^g)^M_g: no remembered row is item j, float64, the shape of `items`."""
        if not self._mixes_groups:
            return super().log_absence(items, request)
        rows, log_prob = self._by_group(items)
        absence = rows * torch.log1p(-torch.exp(log_prob))
        return torch.where(rows > 0, absence, 0.0).sum(0)

    @property
    def _mixes_groups(self) -> bool:
        return isinstance(self.frequency, GroupedFrequency) and self._filled > 0

    def _by_group(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Count the remembered rows of each group, float64 [G, 1, ...]; also return log p_j within each, [G, ...]."""
        frequency: GroupedFrequency = self.frequency  # type: ignore[assignment]  # called only if `_mixes_groups`
        log_prob = torch.stack([frequency.log_prob(items, group) for group in range(len(frequency.members))])
        rows = torch.zeros(len(log_prob), dtype=torch.float64, device=items.device)
        remembered = self.groups[: self._filled]
        rows.index_add_(0, remembered, torch.ones(len(remembered), dtype=torch.float64, device=items.device))
        return rows.reshape(-1, *[1] * items.ndim), log_prob


def _restore(memory: CrossBatchMemory, _: object) -> None:
    memory._filled, memory._next, memory._step = (int(value) for value in memory.state)
