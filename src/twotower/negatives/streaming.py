"""Item frequency estimated from the stream of batches, for data that cannot be counted in advance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.negatives.frequency import Frequency, Group


class StreamingFrequency(Frequency):
    """The gap estimator: an item that recurs every g rows has p = 1/g (Yi et al. 2019, algorithm 2).

    The published form measures gaps in steps, B[h] <- (1-a) B[h] + a (t - A[h]), and 1/B[h] is the probability of
    being in a batch, which saturates at 1 for every item that is in all of them. Here gaps are measured in *rows*: an
    item seen c times in a step of B rows, last seen s steps before, has had c gaps of s B / c rows each,

        w = 1 - (1-a)^c,      G[h] <- (1-w) G[h] + w (s B / c),      A[h] <- t,      p = 1 / G[h],

    so that p is the probability for one row, several occurrences in a step all count, and for small a the estimate is
    a ratio of expectations, E[s B] / E[c] = 1/p, at every p. Edge cases:

    - first occurrence: G[h] is the number of rows seen so far, divided by c;
    - never seen: p = 0;
    - p = 1: an item that is in every row has gap 1 and p = 1;
    - an item that no longer occurs: once the open gap exceeds `patience` times G[h], open gap / patience is used
      instead, so that p decays instead of staying constant.

    With `buckets`, items share d = `tables` independently hashed tables of that size. Collisions only shorten gaps, so
    the largest of the d gaps is used.

    State (tables, steps, rows) is in `state_dict`.

    Args:
        num_items: N.
        rate: a, the weight of one new gap; about 1/a occurrences are averaged.
        buckets: size of each hashed table; None for one slot per item.
        tables: d, the number of hashed tables.
        patience: see above.
        seed: seed of the hash functions.

    Raises:
        InputError: a setting is out of range.
    """

    is_exact = False
    gap: Tensor
    last: Tensor
    clock: Tensor
    keys: Tensor

    def __init__(
        self,
        num_items: int,
        *,
        rate: float = 0.05,
        buckets: int | None = None,
        tables: int = 1,
        patience: float = 5.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise InputError(f"rate: expected a number in (0, 1], found {rate}")
        if tables < 1 or (buckets is not None and buckets < 1):
            raise InputError(f"buckets and tables: expected at least 1, found {buckets} and {tables}")
        if buckets is None and tables != 1:
            raise InputError("tables: several tables are only useful with hashing; set buckets")
        self.num_items = num_items
        self.rate, self.buckets, self.patience = rate, buckets, patience
        generator = torch.Generator().manual_seed(seed)
        # Keys of the hash functions: part of the state, because the tables are meaningless without them.
        self.register_buffer("keys", torch.randint(2**62, (tables,), generator=generator))
        size = num_items if buckets is None else buckets
        self.register_buffer("gap", torch.full((tables, size), math.inf, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(tables, size, dtype=torch.float64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.float64))

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Update the estimate with the positives of one step, int64 [B]; all occurrences count."""
        del group
        if items.numel() == 0:
            return
        self.clock += items.numel()
        for table, slots in enumerate(self._slots(items.reshape(-1))):
            # `unique` has a data-dependent size, which would stall an accelerator: count over the whole table instead.
            occurrences = torch.zeros_like(self.gap[table]).index_add_(
                0, slots, torch.ones(len(slots), dtype=torch.float64, device=slots.device)
            )[slots]
            elapsed = (self.clock - self.last[table][slots]) / occurrences
            weight = 1.0 - (1.0 - self.rate) ** occurrences
            old = self.gap[table][slots]
            new = torch.where(torch.isinf(old), elapsed, old + weight * (elapsed - old))
            # Every occurrence of a slot writes the same value, so their order does not matter.
            self.gap[table][slots] = new
            self.last[table][slots] = self.clock

    def log_prob(self, items: Tensor, group: Group | None = None) -> Tensor:
        """Return log p_j = -log of the largest gap among the tables, float64, the shape of `items`."""
        del group
        gaps = torch.stack([self._open_gap(table, slots) for table, slots in enumerate(self._slots(items))])
        return -gaps.amax(0).clamp(min=1.0).log()

    def merge(self, others: Sequence[StreamingFrequency]) -> None:
        """Merge the estimates of other ranks, which saw other rows of the same stream, weighted by their rows.

        Args:
            others: estimators with the same settings and keys.

        Raises:
            InputError: their tables or hash keys differ.
        """
        everyone = [self, *others]
        if any(one.gap.shape != self.gap.shape or not torch.equal(one.keys, self.keys) for one in others):
            raise InputError("merge: expected estimators with the same tables and the same hash keys")
        rows = torch.stack([one.clock for one in everyone])
        probability = torch.stack([torch.where(torch.isinf(one.gap), 0.0, 1.0 / one.gap) for one in everyone])
        share = (rows / rows.sum().clamp(min=1.0))[:, None, None]
        self.gap.copy_(1.0 / (probability * share).sum(0))
        # Set the clock as if one rank had seen all rows, and convert open gaps to this common clock.
        open_gap = torch.stack([one.clock - one.last for one in everyone]).amin(0)
        self.clock.copy_(rows.sum())
        self.last.copy_(torch.where(torch.isinf(self.gap), 0.0, rows.sum() - open_gap * len(everyone)).clamp_(min=0.0))

    def compare_to(self, counts: Tensor) -> FrequencyReport:
        """Measure the error of the estimate against counted occurrences, [N]; see `compare_frequencies`."""
        return compare_frequencies(self, counts)

    def _open_gap(self, table: int, slots: Tensor) -> Tensor:
        return torch.maximum(self.gap[table][slots], (self.clock - self.last[table][slots]) / self.patience)

    def _slots(self, items: Tensor) -> list[Tensor]:
        if self.buckets is None:
            return [items]
        return [splitmix64(items ^ key) % self.buckets for key in self.keys]


def splitmix64(values: Tensor) -> Tensor:
    """Hash to 63 bits (splitmix64 without the sign bit; Steele, Lea and Flood 2014); int64, the shape of `values`."""
    # The constants are written as signed numbers; products wrap around, as intended.
    mixed = values + -7046029254386353131
    mixed = (mixed ^ _shift(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shift(mixed, 27)) * -7723592293110705685
    return (mixed ^ _shift(mixed, 31)) & 0x7FFF_FFFF_FFFF_FFFF


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift right logically, filling with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class FrequencyReport:
    """The error of an estimated frequency relative to the counted one.

    Attributes:
        total_variation: half the summed absolute difference of the two distributions (the estimate scaled to sum to
            one): 0 if equal, 1 if disjoint.
        worst_log_ratio: per popularity decile, most popular first, the largest |log(estimated / counted)| over its
            items that the estimate has seen; NaN for a decile without any.
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

    Deciles are of training interactions, as everywhere in the library: each contains a tenth of them, so the first are
    a few popular items and the last thousands of rare ones. Items never counted are left out of the ratios.

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
