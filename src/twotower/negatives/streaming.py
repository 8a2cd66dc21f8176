"""Item frequency estimated from the batches as they come, when counting beforehand is impossible or would be wrong."""

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
    """The gap estimator: an item that comes back every g rows has p = 1/g (Yi et al. 2019, algorithm 2).

    The published form measures gaps in steps, B[h] <- (1-a) B[h] + a (t - A[h]), and 1/B[h] is the probability of
    standing in a batch, which saturates at 1 for every item that stands in all of them. Here gaps are measured in
    *rows*: an item seen c times in a step of B rows, last seen s steps before, has had c gaps of s B / c rows each,

        w = 1 - (1-a)^c,      G[h] <- (1-w) G[h] + w (s B / c),      A[h] <- t,      p = 1 / G[h],

    so that p is the probability for one row, several occurrences in a step all count, and for small a the estimate is
    a ratio of expectations, E[s B] / E[c] = 1/p, at every p. Defined answers for the corners:

    - first sight: G[h] is the rows seen so far, over c;
    - never seen: p = 0;
    - p = 1: an item that is every row has gap 1 and p = 1;
    - an item that stopped coming: where the gap still open exceeds `patience` times G[h], it counts as
      open gap / patience, so that p decays instead of standing for ever.

    With `buckets`, items share d = `tables` independently hashed tables of that size. Collisions only shorten gaps, so
    the largest of the d is taken.

    State (tables, steps, rows) is in `state_dict`.

    Args:
        num_items: N.
        rate: a, the weight of one new gap; 1/a occurrences are remembered.
        buckets: size of each hashed table; None for a slot of its own for each item.
        tables: d, how many hashed tables.
        patience: see above.
        seed: of the hash functions.

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
            raise InputError("tables: several tables make sense only with hashing; give buckets")
        self.num_items = num_items
        self.rate, self.buckets, self.patience = rate, buckets, patience
        generator = torch.Generator().manual_seed(seed)
        # Keys of the hash functions: part of the state, for the tables mean nothing without them.
        self.register_buffer("keys", torch.randint(2**62, (tables,), generator=generator))
        size = num_items if buckets is None else buckets
        self.register_buffer("gap", torch.full((tables, size), math.inf, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(tables, size, dtype=torch.float64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.float64))

    def observe(self, items: Tensor, group: Group | None = None) -> None:
        """Take the positives of one step, int64 [B]; all occurrences count."""
        del group
        if items.numel() == 0:
            return
        self.clock += items.numel()
        for table, slots in enumerate(self._slots(items.reshape(-1))):
            # `unique` has a data-dependent size, which an accelerator would have to wait for: counts are spread over
            # the whole table instead where the table is small, and the sorted occurrences are used where it is not.
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
        """Log p_j = -log of the largest gap among the tables, float64, the shape of `items`."""
        del group
        gaps = torch.stack([self._open_gap(table, slots) for table, slots in enumerate(self._slots(items))])
        return -gaps.amax(0).clamp(min=1.0).log()

    def merge(self, others: Sequence[StreamingFrequency]) -> None:
        """Take in the estimates of other ranks, which saw other rows of the same stream, in proportion to their rows.

        Args:
            others: estimators with the same settings and keys.

        Raises:
            InputError: their tables do not fit.
        """
        everyone = [self, *others]
        if any(one.gap.shape != self.gap.shape or not torch.equal(one.keys, self.keys) for one in others):
            raise InputError("merge: expected estimators with the same tables and the same hash keys")
        rows = torch.stack([one.clock for one in everyone])
        probability = torch.stack([torch.where(torch.isinf(one.gap), 0.0, 1.0 / one.gap) for one in everyone])
        share = (rows / rows.sum().clamp(min=1.0))[:, None, None]
        self.gap.copy_(1.0 / (probability * share).sum(0))
        # Time goes on as if one rank had seen all rows: open gaps are put on the common clock.
        open_gap = torch.stack([one.clock - one.last for one in everyone]).amin(0)
        self.clock.copy_(rows.sum())
        self.last.copy_(torch.where(torch.isinf(self.gap), 0.0, rows.sum() - open_gap * len(everyone)).clamp_(min=0.0))

    def compare_to(self, counts: Tensor) -> FrequencyReport:
        """How wrong the estimate is, against counted occurrences [N]; see `compare_frequencies`."""
        return compare_frequencies(self, counts)

    def _open_gap(self, table: int, slots: Tensor) -> Tensor:
        return torch.maximum(self.gap[table][slots], (self.clock - self.last[table][slots]) / self.patience)

    def _slots(self, items: Tensor) -> list[Tensor]:
        if self.buckets is None:
            return [items]
        return [splitmix64(items ^ key) % self.buckets for key in self.keys]


def splitmix64(values: Tensor) -> Tensor:
    """A 64-bit mix (Steele, Lea and Flood 2014), without its sign bit; int64, the shape of `values`."""
    # The constants as signed numbers; products wrap, as they should.
    mixed = values + -7046029254386353131
    mixed = (mixed ^ _shift(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shift(mixed, 27)) * -7723592293110705685
    return (mixed ^ _shift(mixed, 31)) & 0x7FFF_FFFF_FFFF_FFFF


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class FrequencyReport:
    """How far an estimated frequency is from the counted one.

    Attributes:
        total_variation: half the summed absolute difference of the two distributions (the estimate scaled to sum to
            one), 0 alike, 1 disjoint.
        worst_log_ratio: by popularity decile, most popular first, the largest |log(estimated / counted)| of its items
            that the estimate has seen; NaN for a decile without any.
        unseen: by decile, the share of its items that the estimate has never seen.
        mass: the sum of the estimated probabilities; 1 for one that is right on the whole.
    """

    total_variation: float
    worst_log_ratio: list[float]
    unseen: list[float]
    mass: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, NaN as None."""
        return {
            "total_variation": self.total_variation,
            "worst_log_ratio": [None if math.isnan(value) else value for value in self.worst_log_ratio],
            "unseen": [None if math.isnan(value) else value for value in self.unseen],
            "mass": self.mass,
        }


def compare_frequencies(estimate: Frequency, counts: Tensor, group: Group | None = None) -> FrequencyReport:
    """Hold an estimate against counted occurrences.

    Deciles are of training interactions, as everywhere in the library: each holds a tenth of them, so the first are a
    few popular items and the last thousands of rare ones. Items never counted are left out of the ratios.

    Args:
        estimate: any frequency.
        counts: occurrences of each item, [N].
        group: the group to ask for, for a grouped estimate.
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
    """The decile of each item, 0 (most popular) to 9, each holding about a tenth of the interactions; int64 [N]."""
    order = torch.argsort(counts, descending=True, stable=True)
    before = counts[order].double().cumsum(0) - counts[order]
    decile = torch.empty_like(order)
    decile[order] = (before / counts.sum() * 10).long().clamp_(max=9)
    return decile
