"""Test of whether candidates appear as often as their source claims, which also detects batches that are not random."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower.audit.gradients import follow
from twotower.data import Batch
from twotower.negatives import CrossBatchMemory, DrawRequest, InBatch, Pool, RandomSource, popularity_deciles
from twotower.negatives.frequency import Group

#: Expected appearances in a bin of one batch: enough for a chi-square.
_PER_BIN = 5.0
#: Significance level: a correct source is called wrong once in ten thousand tests.
SIGNIFICANCE = 1e-4
#: Tolerance for estimated frequencies, which are never exact: deviation from the claim, and dispersion over batches.
_CLOSE, _STEADY = 0.1, 1.25


@dataclass(frozen=True)
class Appearance:
    """Claimed and observed appearances of one source.

    Attributes:
        source: description of the source.
        batches: number of batches examined.
        claimed: expected appearances by popularity decile of the item, most popular first, summed over the batches.
        observed: observed appearances, in the same deciles.
        deviation: half the sum of absolute differences of the two over all bins, as a share of the claimed sum.
        p_counts: p-value of the summed counts, if the claims are correct.
        dispersion: chi-square of single batches over its degrees of freedom: 1 for random draws, larger if batches
            differ from each other; None for a source without duplicates.
        p_batches: p-value of the dispersion, for random draws.
        estimated: whether the frequency is an estimate, which can only be approximately right.
    """

    source: str
    batches: int
    claimed: list[float]
    observed: list[float]
    deviation: float
    p_counts: float
    dispersion: float | None
    p_batches: float | None
    estimated: bool

    @property
    def as_claimed(self) -> bool:
        """Whether the observed appearances agree with the claim."""
        if self.estimated:
            return self.deviation <= _CLOSE and (self.dispersion or 1.0) <= _STEADY
        return min(self.p_counts, 1.0 if self.p_batches is None else self.p_batches) >= SIGNIFICANCE / 2

    @property
    def verdict(self) -> str:
        """The finding as a sentence."""
        if self.as_claimed:
            return f"close to its claim ({self.deviation:.1%} off)" if self.estimated else "as claimed"
        misplaced = f"{self.deviation:.1%} of the appearances are of items other than those claimed"
        if self.dispersion is None or self.dispersion <= _STEADY:
            return f"not as claimed: {misplaced}"
        # Such differences between batches also make the sum differ from the claim: report the cause first.
        return f"batches are not random draws: they differ from each other more than by chance; {misplaced}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "as_claimed": self.as_claimed, "verdict": self.verdict}


@dataclass
class _Tally:
    """Counts of one source within one group of batches."""

    bins: Tensor
    size: int
    claimed: Tensor = field(init=False)
    observed: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    chi_square: float = 0.0
    freedom: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        self.claimed, self.observed, self.variance = torch.zeros(3, self.size, dtype=torch.float64)


def appearances(
    pool: Pool, batches: Iterator[Batch], count: int, *, item_counts: Tensor, generator: torch.Generator | None = None
) -> list[Appearance]:
    """Test the claims of every random source against the candidates it draws for the first row of real batches.

    Let c_tb be the appearances of batch t in item bin b (popular items have their own bin, rare ones share, so that
    about five are expected in each), and e_tb the expectation by log kappa, both without the row's own positive:

        counts            X^2 = sum_b (sum_t c_tb - sum_t e_tb)^2 / V_b,     V_b the variance of random draws
        between batches   X^2 = sum_t sum_b (c_tb - e_tb)^2 / e_tb

    Both are compared with chi-square distributions. The second detects what the first cannot: batches built within
    markets are right on average and wrong each time. Batches that partition an epoch without replacement vary slightly
    less than random draws, which only makes the p-values larger.

    Args:
        pool: the pool; estimated frequencies and cross-batch memories are updated as in training.
        batches: an endless iterator.
        count: number of batches.
        item_counts: training interactions of each item, [N].
        generator: random generator of the proposals.
    """
    tests = [_Test(member, item_counts) for member in pool.random_sources()]
    if not tests:
        return []
    training = pool.training
    pool.eval()
    try:
        for step in range(count):
            batch = next(batches)
            follow(pool, batch, drawn=False)
            request = DrawRequest(
                batch.items, queries=batch.queries, group=batch.group, generator=generator, epoch=batch.epoch
            )
            for test in tests:
                test.add(step, request)
            follow(pool, batch, drawn=True)
    finally:
        pool.train(training)
    return [test.result() for test in tests if test.tallies]


class _Test:
    """The chi-square tests of one source."""

    def __init__(self, member: RandomSource, item_counts: Tensor) -> None:
        self.member = member
        self.deciles = popularity_deciles(item_counts)
        self.items = torch.arange(len(item_counts))
        self.tallies: dict[int | None, _Tally] = {}
        self.by_decile = torch.zeros(2, 10, dtype=torch.float64)

    def add(self, step: int, request: DrawRequest) -> None:
        """Add the counts of one batch."""
        member = self.member
        if isinstance(member, CrossBatchMemory):
            # Overlapping contents are not independent: count again once the whole memory is new.
            stride = -(-member.size // len(request.positives))
            if step % stride or member.draws(request) < member.size:
                return
        own = request.positives[0]
        drawn = member.draw(request)
        drawn = drawn[0] if member.per_row else drawn
        drawn = drawn[drawn != own]
        observed = torch.bincount(drawn, minlength=len(self.items)).double()
        claimed = member.log_expected_count(self.items, request).exp()
        claimed[own] = 0.0
        if member.unique:
            observed.clamp_(max=1.0)
            variance = claimed * (1.0 - claimed)
        else:
            variance = claimed
        tally = self._tally(request.group, claimed)
        parts = torch.zeros(3, tally.size, dtype=torch.float64).index_add_(
            1, tally.bins, torch.stack([claimed, observed, variance])
        )
        tally.claimed += parts[0]
        tally.observed += parts[1]
        tally.variance += parts[2]
        tally.batches += 1
        if not member.unique:
            tally.chi_square += _pearson(parts[1], parts[0], parts[0])
            tally.freedom += int((parts[0] > 0).sum()) - 1
        self.by_decile.index_add_(1, self.deciles, torch.stack([claimed, observed]))

    def _tally(self, group: Group | None, claimed: Tensor) -> _Tally:
        key = None if group is None else int(group)
        if key not in self.tallies:
            bins = equal_bins(claimed)
            self.tallies[key] = _Tally(bins, int(bins.max()) + 1)
        return self.tallies[key]

    def result(self) -> Appearance:
        tallies = list(self.tallies.values())
        chi_square = sum(_pearson(one.observed, one.claimed, one.variance) for one in tallies)
        freedom = sum(int((one.claimed > 0).sum()) for one in tallies)
        unique = self.member.unique
        dispersion = sum(one.chi_square for one in tallies)
        within = max(sum(one.freedom for one in tallies), 1)
        off = sum(float((one.observed - one.claimed).abs().sum()) for one in tallies)
        frequency = getattr(self.member, "frequency", None)
        return Appearance(
            source=describe(self.member),
            batches=sum(one.batches for one in tallies),
            claimed=self.by_decile[0].tolist(),
            observed=self.by_decile[1].tolist(),
            deviation=0.5 * off / max(sum(float(one.claimed.sum()) for one in tallies), 1e-300),
            p_counts=survival(chi_square, freedom),
            dispersion=None if unique else dispersion / within,
            p_batches=None if unique else survival(dispersion, within),
            estimated=frequency is not None and not frequency.is_exact,
        )


def equal_bins(expected: Tensor, least: float = _PER_BIN) -> Tensor:
    """Assign a bin to every item, int64 [N]: by descending expectation, so that each bin expects at least `least`.

    Items with expectation 0 share the last bin, in which a single appearance is one too many.
    """
    order = torch.argsort(expected, descending=True, stable=True)
    ordered = expected[order]
    # Items above `least` have their own bin; the rest is cut where the running sum passes a multiple of it.
    alone = int((ordered >= least).sum())
    rest = (ordered[alone:].cumsum(0) / least).long()
    total = int(rest[-1]) if len(rest) else 0
    bins = torch.cat([torch.arange(alone), alone + rest.clamp(max=max(total - 1, 0))])
    bins[ordered <= 0] = int(bins.max()) + 1
    return torch.empty_like(bins).scatter_(0, order, bins)


def survival(chi_square: float, freedom: int) -> float:
    """Return P(X > chi_square) for X chi-square distributed: the regularised upper incomplete gamma function."""
    if math.isinf(chi_square):
        return 0.0
    half = torch.tensor([max(freedom, 1) / 2.0, max(chi_square, 0.0) / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def describe(member: object) -> str:
    """Describe a source in a few words."""
    if isinstance(member, InBatch):
        return "in-batch"
    if isinstance(member, CrossBatchMemory):
        return f"memory of {member.size}"
    proposal = getattr(member, "proposal", None)
    if proposal is None:
        return type(member).__name__.lower()
    power = getattr(proposal, "power", None)
    name = f"frequency^{power:g}" if power is not None else type(proposal).__name__.lower()
    return f"{name}, {getattr(member, 'size', 0):,} draws"


def _pearson(observed: Tensor, expected: Tensor, variance: Tensor) -> float:
    certain = variance <= 0
    if bool(((observed - expected).abs() > 1e-9)[certain].any()):
        return math.inf
    live = ~certain
    return float(((observed - expected)[live] ** 2 / variance[live]).sum())
