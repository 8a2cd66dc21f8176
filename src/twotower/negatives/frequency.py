"""How often each item is the positive of a row: the p_j that in-batch candidates are drawn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from twotower.errors import InputError


class HasItemCounts(Protocol):
    """Anything that can count its items, such as `twotower.Interactions`."""

    def item_counts(self) -> np.ndarray:
        """Occurrences of each item, int64 [N]."""
        ...


class Frequency(nn.Module, ABC):
    """The probability p_j that one row of a batch has item j as its positive.

    Attributes:
        num_items: N, the size of the catalog.
        is_exact: True where p_j is counted, False where it is estimated from a stream.
    """

    num_items: int
    is_exact: bool

    @abstractmethod
    def log_prob(self, items: Tensor, group: Tensor | None = None) -> Tensor:
        """log p_j, in float64.

        Args:
            items: codes, int64, any shape.
            group: the group that the batch was drawn from, int64 scalar tensor; None where batches are random draws.

        Returns:
            float64, the shape of `items`; -inf for an item that never occurs.
        """

    def observe(self, items: Tensor, group: Tensor | None = None) -> None:
        """Take note of the positives of one training step; an exact frequency has nothing to learn from it."""
        del items, group


class CountedFrequency(Frequency):
    """Exact frequency, counted from the training interactions: p_j = count_j / sum of counts.

    Items never seen get p_j = 0 (log p_j = -inf): they can only arrive through a source that draws them, such as
    `Sampled(Uniform(N))`, and their expected count then comes from that source alone.

    Args:
        counts: occurrences of each item, [N], whole numbers or weights >= 0; or anything with `item_counts()`.

    Raises:
        InputError: counts are negative, not finite, or all zero.

    Example:
        >>> frequency = CountedFrequency(torch.tensor([3, 1, 0]))
        >>> frequency.log_prob(torch.tensor([0, 1])).exp().tolist()
        [0.75, 0.25]
    """

    is_exact = True
    log_probability: Tensor

    def __init__(self, counts: Tensor | np.ndarray | HasItemCounts) -> None:
        super().__init__()
        if not isinstance(counts, Tensor | np.ndarray):
            counts = counts.item_counts()
        values = torch.as_tensor(counts).to(torch.float64)
        if values.ndim != 1 or len(values) == 0:
            raise InputError(f"counts: expected one number for each item, shape [N]; found shape {list(values.shape)}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise InputError("counts: expected finite numbers >= 0, one for each item")
        if not bool(values.sum() > 0):
            raise InputError("counts: all are zero; count them from the training interactions")
        self.num_items = len(values)
        # Derived from the data, so it is rebuilt rather than stored in every checkpoint.
        self.register_buffer("log_probability", values.log() - values.sum().log(), persistent=False)

    def log_prob(self, items: Tensor, group: Tensor | None = None) -> Tensor:
        """log p_j, float64, the shape of `items`; `group` is ignored."""
        del group
        return self.log_probability[items]
