"""Item frequencies: the probability p_j that a row has item j as its positive, the distribution of in-batch candidates.

A frequency is counted from the training interactions, over all of them or per group. For data that cannot be counted in
advance it is estimated from the stream of batches. `compare_frequencies` measures the error of an estimate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
        """Number of items, N."""
        ...


class Frequency(nn.Module, ABC):
    """The probability p_j that one row of a batch has item j as its positive.

    Attributes:
        num_items: N, the size of the catalog.
        is_exact: True if p_j is counted, False if it is estimated from a stream.
    """

    num_items: int
    is_exact: bool

    @abstractmethod
    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j in float64.

        Args:
            items: codes, int64, any shape.
            group: the group that the batch was drawn from; None for a batch drawn from all rows.

        Returns:
            float64, the shape of `items`; -inf for an item that never occurs.
        """

    def epoch_rows(self, group: Group | None = None) -> float | None:
        """Return R if a batch is drawn without replacement from an epoch of R rows; None if its rows are independent.

        Args:
            group: the group that the batch was drawn from; R then counts the rows of this group.
        """
        del group
        return None

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Update the estimate with the positives of one training step, before the draw; a no-op if p_j is counted."""
        del items, group


class CountedFrequency(Frequency):
    """Exact frequency, counted from the training interactions: p_j = count_j / sum of counts.

    Items that never occur get p_j = 0 (log p_j = -inf). They become candidates only through a source that draws them,
    such as `Sampled(Uniform(N))`, and their expected count then comes from that source alone.

    The counts also give R, the number of rows. Training shuffles the rows once per epoch and cuts them into batches
    (`TrainingBatches`, any `DataLoader(shuffle=True)`), so the rows of a batch are drawn *without* replacement, and
    the chance that an item is among them depends on R and not only on p_j.

    Args:
        counts: occurrences of each item, [N], whole numbers or weights >= 0; or an object with `item_counts()`.
        replacement: True if the rows of a batch are independent draws with replacement from the counted rows, instead
            of a part of an epoch. Implied by counts that are not whole numbers, because R is then unknown.

    Raises:
        InputError: counts are negative, not finite, or all zero.

    Example:
        >>> import torch
        >>> import twotower as tt
        >>> frequency = tt.negatives.CountedFrequency(torch.tensor([3, 1, 0]))
        >>> frequency.log_prob(torch.tensor([0, 1, 2])).exp()
        tensor([0.7500, 0.2500, 0.0000], dtype=torch.float64)
    """

    is_exact = True
    log_probability: Tensor

    def __init__(self, counts: Tensor | np.ndarray | HasItemCounts, *, replacement: bool = False) -> None:
        super().__init__()
        if not isinstance(counts, Tensor | np.ndarray):
            counts = counts.item_counts()
        values = torch.as_tensor(counts).to(torch.float64)
        if values.ndim != 1 or len(values) == 0:
            raise InputError(f"counts: expected one number per item, shape [N]; found shape {list(values.shape)}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise InputError("counts: expected finite numbers >= 0, one per item")
        total = float(values.sum())
        if not total > 0:
            raise InputError("counts: all are zero; count them from the training interactions")
        is_whole = bool((values == values.round()).all())
        self._rows = total if is_whole and not replacement else None
        self.num_items = len(values)
        # Derived from the data, so it is recomputed instead of stored in every checkpoint.
        self.register_buffer("log_probability", values.log() - values.sum().log(), persistent=False)

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j, float64, the shape of `items`; `group` is ignored."""
        del group
        return self.log_probability[items]

    def epoch_rows(self, group: Group | None = None) -> float | None:
        """Return R, the sum of the counts; None for independent draws. `group` is ignored."""
        del group
        return self._rows


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
            raise InputError("members: expected one frequency per group, all for the same catalog")
        self.members = nn.ModuleList(members)
        self.num_items = members[0].num_items
        self.is_exact = all(member.is_exact for member in members)

    @classmethod
    def counted(cls, interactions: HasGroups) -> GroupedFrequency:
        """Count the interactions of every group.

        Raises:
            InputError: the interactions have no group column.
        """
        return cls([CountedFrequency(row) if row.any() else _NoRows(len(row)) for row in count_by_group(interactions)])

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j within the group, float64, the shape of `items`."""
        return self._member(group).log_prob(items)

    def epoch_rows(self, group: Group | None = None) -> float | None:
        """Return the number of rows of the group in an epoch; None for independent draws."""
        return self._member(group).epoch_rows()

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Update the frequency of the group."""
        self._member(group).observe(items)

    def _member(self, group: Group | None) -> Frequency:
        if group is None:
            raise InputError("frequency: a grouped frequency needs the group of the batch; draw with group=...")
        member: Frequency = self.members[int(group)]  # type: ignore[assignment]  # ModuleList is untyped
        return member


def count_by_group(interactions: HasGroups) -> np.ndarray:
    """Count the occurrences of each item within each group, int64 [G, N].

    Raises:
        InputError: the interactions have no group column.
    """
    if interactions.groups is None:
        raise InputError("frequency: grouped counts need a group column; name it with data.columns.group")
    groups = np.asarray(interactions.groups, dtype=np.int64)
    size, count = interactions.num_items, int(groups.max()) + 1
    return np.bincount(groups * size + interactions.item_codes, minlength=count * size).reshape(count, size)


class _NoRows(Frequency):
    """The frequency within a group that has no training row: every p_j is 0, and no batch is drawn from it."""

    is_exact = True

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        del group
        return torch.full(items.shape, -torch.inf, dtype=torch.float64, device=items.device)


class StreamingFrequency(Frequency):
    """The gap estimator: an item that recurs every g rows has p = 1/g (Yi et al. 2019, algorithm 2).

    The published form measures gaps in steps, B[h] <- (1-a) B[h] + a (t - A[h]), and 1/B[h] is the probability of
    being in a batch, which saturates at 1 for every item that is in all batches. Here gaps are measured in *rows*: an
    item seen c times in a step of B rows, last seen s steps before, has had c gaps of s B / c rows each,

        w = max( 1 - (1-a)^c, c / n ),      G[h] <- (1-w) G[h] + w (s B / c),      A[h] <- t,      p = 1 / G[h],

    with n the number of gaps so far, including these c. The first gaps are therefore averaged with equal weights; from
    n = 1/a on, the mean is a moving average. p is the probability for one row, every occurrence in a step counts, and
    for small a the estimate is a ratio of expectations, E[s B] / E[c] = 1/p, at every p. Edge cases:

    - first occurrence: there is no gap yet. G[h] is t / c, with t the number of rows since the item could first occur,
      a provisional value (n = 0) that the next step with the item replaces. Within an epoch of R rows, drawn
      without replacement, t becomes R (1/R + 1/(R-1) + ... + 1/(R-t+1)), so that the mean is R/c_j for an item with c_j
      rows; without this the mean would be R/2 for an item with one row. An item that occurs c > 1 times in its first
      step may have joined the catalog shortly before. If it had not, all c occurrences would be among the last B of t
      rows with probability (B/t)^(c-1), so

          G[h] = ( (B/t)^(c-1) t + (1 - (B/t)^(c-1)) B ) / c

      which is B/c in the first step of a run, and at most 1.11 B/c from c = 5 on, however long the run has lasted;
    - never seen: p = 0;
    - p = 1: an item that is in every row has gap 1 and p = 1;
    - an item that no longer occurs: once the rows since it last occurred, its open gap, exceed `patience` times G[h],
      open gap / patience is used instead, so that p decays and does not stay constant.

    State (gap, number of gaps, row of the last occurrence, rows seen) is in `state_dict`.

    Args:
        num_items: number of items, N.
        rate: a, the weight of one new gap; about 1/a occurrences are averaged.
        patience: number of mean gaps without the item after which p decays; see above.
        rows: R, if the batches of an epoch are drawn without replacement from R rows (`epoch_rows`).

    Raises:
        InputError: a setting is out of range.
    """

    is_exact = False
    gap: Tensor
    last: Tensor
    gaps: Tensor
    clock: Tensor

    def __init__(self, num_items: int, *, rate: float = 0.05, patience: float = 5.0, rows: float | None = None) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise InputError(f"rate: expected a number in (0, 1], found {rate}")
        if not patience > 0:
            raise InputError(f"patience: expected a number above 0, found {patience}")
        self.num_items = num_items
        self.rate, self.patience = rate, patience
        self._rows = None if rows is None else float(rows)
        # [1, N], as in the checkpoints of earlier versions, which had several hashed tables.
        self.register_buffer("gap", torch.full((1, num_items), math.inf, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(1, num_items, dtype=torch.float64))
        self.register_buffer("gaps", torch.zeros(1, num_items, dtype=torch.float64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_from_earlier_versions)  # type: ignore[no-untyped-call]

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Update the estimate with the positives of one step, int64 [B]; all occurrences count."""
        del group
        if items.numel() == 0:
            return
        self.clock += items.numel()
        items, gap, last, gaps = items.reshape(-1), self.gap[0], self.last[0], self.gaps[0]
        # `unique` has a data-dependent size, which would stall an accelerator: count over the whole table instead.
        ones = torch.ones(len(items), dtype=torch.float64, device=items.device)
        occurrences = torch.zeros_like(gap).index_add_(0, items, ones)[items]
        elapsed = self.clock - last[items]
        old = gap[items]
        is_first = torch.isinf(old)
        number = gaps[items] + occurrences
        weight = torch.maximum(1.0 - (1.0 - self.rate) ** occurrences, occurrences / number)
        new = torch.where(is_first, self._first_gap(elapsed, occurrences, len(items)), elapsed) / occurrences
        # Every occurrence of an item writes the same value, so their order does not matter.
        gap[items] = torch.where(is_first, new, old + weight * (new - old))
        gaps[items] = torch.where(is_first, 0.0, number)
        last[items] = self.clock

    def _first_gap(self, elapsed: Tensor, occurrences: Tensor, rows: int) -> Tensor:
        """Return c G for items that first occur in this step of B rows, c times, after `elapsed` rows."""
        since = elapsed
        if self._rows is not None:
            within = torch.digamma(torch.tensor(self._rows + 1.0, dtype=torch.float64, device=elapsed.device))
            within = self._rows * (within - torch.digamma((self._rows - elapsed).clamp(min=0.0) + 1.0))
            since = torch.where(elapsed <= self._rows, within, elapsed)
        by_chance = (rows / elapsed) ** (occurrences - 1.0)
        return by_chance * since + (1.0 - by_chance) * rows

    def epoch_rows(self, group: Group | None = None) -> float | None:
        """Return R; None if it is not known. `group` is ignored."""
        del group
        return self._rows

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j = -log of the gap, or of the open gap / patience if that is larger; the shape of `items`."""
        del group
        open_gap = (self.clock - self.last[0][items]) / self.patience
        return -torch.maximum(self.gap[0][items], open_gap).clamp(min=1.0).log()


def _from_earlier_versions(frequency: StreamingFrequency, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Convert a state saved by an earlier version: drop hash keys, and set a missing gap count to the full 1/a."""
    state.pop(f"{prefix}keys", None)
    if f"{prefix}gap" in state and f"{prefix}gaps" not in state:
        state[f"{prefix}gaps"] = torch.isfinite(state[f"{prefix}gap"]).double() / frequency.rate


@dataclass(frozen=True)
class FrequencyReport:
    """The error of an estimated frequency relative to the counted one.

    Attributes:
        total_variation: half the summed absolute difference of the two distributions (the estimate scaled to sum to
            one): 0 if equal, 1 if disjoint.
        worst_log_ratio: per popularity decile, most popular first, the largest |log(estimated / counted)| over the
            items that the estimate has seen; NaN if it has seen none of the decile.
        unseen: per decile, the share of its items that the estimate has never seen.
        mass: the sum of the estimated probabilities; 1 for an estimate without overall bias.
    """

    total_variation: float
    worst_log_ratio: list[float]
    unseen: list[float]
    mass: float

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values, NaN to None."""
        return {
            "total_variation": self.total_variation,
            "worst_log_ratio": [None if math.isnan(value) else value for value in self.worst_log_ratio],
            "unseen": [None if math.isnan(value) else value for value in self.unseen],
            "mass": self.mass,
        }


def compare_frequencies(estimate: Frequency, counts: Tensor, group: Group | None = None) -> FrequencyReport:
    """Compare an estimated frequency with counted occurrences.

    Each decile has a tenth of the training interactions, as everywhere in the library: the first has a few popular
    items, the last has thousands of rare ones. Items with a count of zero are left out of the ratios.

    Args:
        estimate: any frequency.
        counts: occurrences of each item, [N].
        group: the group to compare, for a grouped estimate.
    """
    counted = counts.double().cpu() / counts.sum().cpu()
    estimated = estimate.log_prob(torch.arange(len(counts), device=counts.device), group).exp().cpu()
    mass = float(estimated.sum())
    decile = popularity_deciles(counts.cpu())
    worst, unseen = [], []
    for number in range(10):
        members = (decile == number) & (counted > 0)
        seen = members & (estimated > 0)
        ratio = (estimated[seen].log() - counted[seen].log()).abs()
        worst.append(float(ratio.max()) if len(ratio) else math.nan)
        unseen.append(float((members & ~seen).sum() / members.sum()) if bool(members.any()) else math.nan)
    distance = 0.5 * float((estimated / mass - counted).abs().sum()) if mass > 0 else 1.0
    return FrequencyReport(distance, worst, unseen, mass)


def popularity_deciles(counts: Tensor) -> Tensor:
    """Assign each item a decile, 0 (most popular) to 9, each with about a tenth of the interactions; int64 [N]."""
    order = torch.argsort(counts, descending=True, stable=True)
    before = counts[order].double().cumsum(0) - counts[order]
    decile = torch.empty_like(order)
    decile[order] = (before / counts.sum() * 10).long().clamp_(max=9)
    return decile
