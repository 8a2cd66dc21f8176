"""Item frequencies: the probability p_j that an item is a row's positive, from which in-batch candidates are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from twotower.errors import InputError

#: Index of a batch's group, as an int or a scalar tensor.
Group = int | Tensor


class HasItemCounts(Protocol):
    """An object that can count its items, such as `twotower.Interactions`."""

    def item_counts(self) -> np.ndarray:
        """Count the occurrences of each item, int64 [N]."""
        ...


class HasGroups(Protocol):
    """Interactions with a group column, such as `twotower.Interactions`."""

    @property
    def item_codes(self) -> np.ndarray:
        """Item of each interaction, [n]."""
        ...

    @property
    def groups(self) -> np.ndarray | None:
        """Group of each interaction, [n]."""
        ...

    @property
    def num_items(self) -> int:
        """N."""
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
    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j in float64.

        Args:
            items: codes, int64, any shape.
            group: the group that the batch was drawn from; None if batches are random draws.

        Returns:
            float64, the shape of `items`; -inf for an item that never occurs.
        """

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Update the estimate with the positives of one training step, before the draw; no-op for counted ones."""
        del items, group


class CountedFrequency(Frequency):
    """Exact frequency, counted from the training interactions: p_j = count_j / sum of counts.

    Items never seen get p_j = 0 (log p_j = -inf): they become candidates only through a source that draws them, such as
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
            raise InputError(f"counts: expected one number per item, shape [N]; found shape {list(values.shape)}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise InputError("counts: expected finite numbers >= 0, one per item")
        if not bool(values.sum() > 0):
            raise InputError("counts: all are zero; count them from the training interactions")
        self.num_items = len(values)
        # Derived from the data, so it is recomputed instead of stored in every checkpoint.
        self.register_buffer("log_probability", values.log() - values.sum().log(), persistent=False)

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j, float64, the shape of `items`; `group` is ignored."""
        del group
        return self.log_probability[items]


class GroupedFrequency(Frequency):
    """One frequency for each group (market, kind of session), for batches that are built within a group.

    Such batches are not random draws from all interactions, so the global frequency is the wrong q for them
    (docs/theory.md, rule 8). Members may be counted or streaming. Memory is the sum over members: N numbers per counted
    group.

    Args:
        members: the frequency within group 0, 1, ...

    Raises:
        InputError: there are no members, or their catalog sizes differ.
    """

    def __init__(self, members: Sequence[Frequency]) -> None:
        super().__init__()
        if not members or len({member.num_items for member in members}) != 1:
            raise InputError("members: expected one frequency per group, all over the same catalog")
        self.members = nn.ModuleList(members)
        self.num_items = members[0].num_items
        self.is_exact = all(member.is_exact for member in members)

    @classmethod
    def counted(cls, interactions: HasGroups) -> GroupedFrequency:
        """Count the interactions of every group.

        Raises:
            InputError: the interactions have no group column.
        """
        if interactions.groups is None:
            raise InputError("frequency: grouped counts need a group column; name it with data.columns.group")
        groups = np.asarray(interactions.groups, dtype=np.int64)
        size, count = interactions.num_items, int(groups.max()) + 1
        table = np.bincount(groups * size + interactions.item_codes, minlength=count * size).reshape(count, size)
        return cls([CountedFrequency(row) for row in table])

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j within the group, float64, the shape of `items`."""
        return self._member(group).log_prob(items)

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Update the frequency of the group."""
        self._member(group).observe(items)

    def _member(self, group: Group | None) -> Frequency:
        if group is None:
            raise InputError("frequency: a grouped frequency needs the group of the batch; draw with group=...")
        member: Frequency = self.members[int(group)]  # type: ignore[assignment]  # ModuleList is untyped
        return member
