"""Tests of whether candidates appear as often as their source claims, and of whether batches are random draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from twotower.audit.gradients import follow, units_of
from twotower.audit.masks import items_of
from twotower.data import Batch, Interactions
from twotower.negatives import (
    CrossBatchMemory,
    DrawRequest,
    GroupedFrequency,
    InBatch,
    Pool,
    RandomSource,
    popularity_deciles,
)
from twotower.negatives.sources import log_complement

#: Minimum expected appearances per bin and batch, enough for a chi-square test.
_PER_BIN = 5.0
#: Significance level: a correct source is reported as wrong once in ten thousand audits.
SIGNIFICANCE = 1e-4
#: Quantiles of the normal distribution: for the significance of one of three two-sided tests, and for 95 %.
_NOTICED, _MOSTLY = 4.15, 1.64
#: Minimum expected appearances per bin in the test of the batches, which measures the scatter.
_PER_FINE_BIN = 0.5
#: Tolerance for estimated frequencies, which are never exact: deviation from the claim, and dispersion over batches.
_CLOSE, _STEADY = 0.1, 1.25
#: Minimum number of batches for an estimate of the scatter over batches; with fewer, it is computed from the claims.
_SCATTER = 20
#: Relative difference up to which two counts are equal except for rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Appearance:
    """Claimed and observed appearances of one source.

    Attributes:
        source: description of the source.
        batches: number of batches examined.
        claimed: expected appearances by popularity decile of the item, most popular first, summed over the batches.
        observed: observed appearances, in the same deciles.
        ratio: observed appearances divided by claimed appearances.
        missed: relative error of the total count that these batches would have shown with a probability of at least
            95 %; smaller errors may have been missed.
        deviation: half the sum of absolute differences between the observed appearances and `ratio` times the claimed
            appearances over all bins, as a share of the observed sum.
        p_total: p-value of the total count, for the hypothesis that the claims are correct.
        p_counts: p-value of the counts of single items, with the claims scaled to the observed total.
        dispersion: variance of the batches about their mean divided by the variance of random draws: 1 for random
            draws, larger if batches differ from each other; None with fewer than 20 batches.
        p_batches: p-value of the dispersion, for the hypothesis that batches are random draws.
        estimated: whether the frequency is an estimate, which is only approximately right.
    """

    source: str
    batches: int
    claimed: list[float]
    observed: list[float]
    ratio: float
    missed: float
    deviation: float
    p_total: float
    p_counts: float
    dispersion: float | None
    p_batches: float | None
    estimated: bool

    @property
    def as_claimed(self) -> bool:
        """Return whether the observed appearances agree with the claim."""
        return not (self.has_wrong_count or self.has_wrong_frequencies or self.differs_by_batch)

    @property
    def has_wrong_count(self) -> bool:
        """Return whether the source draws more or fewer candidates in total than it claims."""
        return abs(self.ratio - 1.0) > _CLOSE if self.estimated else self.p_total < SIGNIFICANCE / 3

    @property
    def has_wrong_frequencies(self) -> bool:
        """Return whether the source draws items with different frequencies than it claims."""
        return self.deviation > _CLOSE if self.estimated else self.p_counts < SIGNIFICANCE / 3

    @property
    def differs_by_batch(self) -> bool:
        """Return whether the batches differ from each other by more than chance."""
        if self.dispersion is None or self.p_batches is None:
            return False
        return self.dispersion > _STEADY if self.estimated else self.p_batches < SIGNIFICANCE / 3

    @property
    def verdict(self) -> str:
        """Return the finding as a sentence that names the cause."""
        if self.differs_by_batch:
            # The sum over such batches cannot test the counts, because its scatter is unknown.
            return (
                f"batches are not random draws: their variance is {self.dispersion:.2f} times the variance of random "
                "draws"
            )
        found = []
        if self.has_wrong_count:
            found.append(f"wrong count: {self.ratio:.4g} appearances for each one claimed")
        if self.has_wrong_frequencies:
            found.append(f"wrong frequencies: {self.deviation:.1%} of the appearances are of other items than claimed")
        if found:
            return "; ".join(found)
        if self.estimated:
            return f"close to its claim ({max(self.deviation, abs(self.ratio - 1.0)):.1%} off)"
        return f"as claimed; an error in the count above {self.missed:.2%} would have shown in {self.batches:,} batches"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "as_claimed": self.as_claimed, "verdict": self.verdict}


def appearances(
    pool: Pool,
    batches: Iterator[Batch],
    count: int,
    *,
    item_counts: Tensor,
    train: Interactions | None = None,
    rows_per_draw: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Appearance]:
    """Test the claims of every random source against the candidates it draws for the rows of real batches.

    A claim holds for the rows for which the item is not masked; a row whose positive it is sees one occurrence fewer
    among the other rows. In batch t, let f_tj be the share of the rows (whole sequences, questions) for which item j is
    not masked, c_tj its appearances and kappa_tj its expected count. Sums are over bins b of items: each popular item
    has its own bin, and rare items share bins with about five expected appearances.

        o_tb = sum_{j in b} f_tj c_tj,    e_tb = sum_{j in b} f_tj kappa_tj,    rho = sum o_tb / sum e_tb
        total      z   = sum_t d_t / sqrt(T var_t d_t),                             d_t = sum_b (o_tb - e_tb)
        items      X^2 = sum_b (sum_t o_tb - rho e_tb)^2 / (T var_t (o_tb - rho e_tb))
        batches    Q_t = sum_b (r_tb - mean_t r_tb)^2 / v_b,                        r_tb = sum_{j in b} c_tj - kappa_tj

    The first two tests estimate the scatter from the batches. They therefore test only the claims: the total count and
    the frequencies. The third tests only the batches: v_b is the variance of random draws of as many rows, sequences or
    questions, estimated from their scatter within the batches. Bins are correlated, because whole sequences contain
    similar items. X^2 is therefore compared with a chi-square of (sum_b 1)^2 / tr(R^2) degrees of freedom, with R the
    correlation of the bins (Satterthwaite), and the mean of Q with its own standard error. Batches that partition an
    epoch without replacement vary slightly less than random draws, which only makes the p-values larger.

    If a pool removes duplicates, the claims for distinct items are tested. A pool of several sources is also tested as
    a whole.

    Args:
        pool: the pool; estimated frequencies and cross-batch memories are updated as in training.
        batches: an endless iterator over training batches.
        count: number of batches T.
        item_counts: training interactions of each item, [N].
        train: the training interactions, required for batches of whole sequences or questions.
        rows_per_draw: number of rows of a batch that share one draw; None for all.
        generator: random generator of the proposals.
    """
    members = pool.random_sources()
    tests = [_Test.of_source(member, item_counts, in_unique_pool=pool.unique) for member in members]
    if len(members) > 1:
        tests.append(_Test.of_pool(pool, item_counts))
    training = pool.training
    pool.eval()
    try:
        for step in range(count if tests else 0):
            batch = next(batches)
            follow(pool, batch, drawn=False)
            request = DrawRequest(
                batch.items[:rows_per_draw],
                queries=batch.queries[:rows_per_draw],
                group=batch.group,
                generator=generator,
                windows=batch.windows if rows_per_draw is None else None,
                epoch=batch.epoch,
            )
            units = units_of(batch)[:rows_per_draw]
            share = _unmasked(request, units, train, len(item_counts))
            drawn = [_of_one_row(member, request) for member in members]
            if len(members) > 1:
                parts = zip(members, drawn, strict=True)
                drawn.append(torch.cat([torch.unique(items) if one.unique else items for one, items in parts]))
            for test, items in zip(tests, drawn, strict=True):
                test.add(step, request, items, share, units)
            follow(pool, batch, drawn=True)
    finally:
        pool.train(training)
    return [test.result() for test in tests if test.tallies]


def _of_one_row(member: RandomSource, request: DrawRequest) -> Tensor:
    """Draw the candidates of a source; if they are per row, return the candidates of the first row."""
    drawn = member.draw(request)
    return drawn[0] if member.per_row else drawn


def _unmasked(request: DrawRequest, units: Tensor, train: Interactions | None, num_items: int) -> Tensor:
    """Return f: the share of rows, sequences or questions for which each item is not masked, float64 [N]."""
    row, item, count = units, request.positives, int(units[-1]) + 1
    if request.windows is not None:
        assert train is not None and request.queries is not None
        first = torch.searchsorted(units, torch.arange(count))
        known = items_of(train, request.queries[first])
        row, item = torch.cat([row, known[0]]), torch.cat([item, known[1]])
    distinct = torch.unique(row * num_items + item) % num_items
    return 1.0 - torch.bincount(distinct, minlength=num_items).double() / count


@dataclass
class _Tally:
    """Counts of one source, within one group of batches if its claims depend on the group.

    Attributes:
        bins: bin of each item, int64 [N].
        size: number of bins.
        observed, claimed: o_tb and e_tb of each batch, [size].
        plain: r_tb of each batch, in the bins of `fine`.
        fine: bins of the test of the batches, int64 [N]; smaller than `bins`, because this test measures the scatter.
        within: squared deviations of the units' counts from their mean in the batch, summed over units and batches.
        units: number of units of each batch.
        variance: sum over batches of the variance of independent draws according to the claims, [size].
    """

    bins: Tensor
    size: int
    observed: list[Tensor] = field(default_factory=list)
    claimed: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    fine: Tensor | None = None
    within: Tensor | None = None
    variance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.variance = torch.zeros(self.size, dtype=torch.float64)

    def binned(self, values: Tensor) -> Tensor:
        """Sum values of items, [N], in each bin."""
        return torch.zeros(self.size, dtype=torch.float64).index_add_(0, self.bins, values)

    def add_scatter(self, plain: Tensor, within: Tensor, units: int) -> None:
        """Add r_tb of a batch, and the squared deviations of its units from their mean."""
        self.plain.append(plain)
        self.within = within if self.within is None else self.within + within
        self.units.append(units)

    def item_chi_square(self, ratio: float) -> tuple[float, float]:
        """Compute X^2 of the items with the claims multiplied by a ratio, and its degrees of freedom."""
        observed, claimed = torch.stack(self.observed), ratio * torch.stack(self.claimed)
        total = observed.sum(0) - claimed.sum(0)
        impossible = claimed.sum(0) <= 0
        if bool((observed.sum(0)[impossible] > 0).any()):
            return math.inf, 1.0
        scatter = (observed - claimed)[:, ~impossible]
        scatter = scatter - scatter.mean(0)
        number, count = scatter.shape
        variance, total = ratio * self.variance[~impossible], total[~impossible]
        freedom = max(count - 1.0, 1.0)
        if number >= _SCATTER:
            own = scatter.square().sum(0) * number / (number - 3.0)  # mean of 1 / chi-square
            variance = torch.maximum(variance, own)
            correlation = scatter / scatter.norm(dim=0).clamp(min=1e-300)
            # tr(R^2) estimated from n batches exceeds the true value by about bins^2 / (n - 1).
            squares = float((correlation @ correlation.T).square().sum()) - count**2 / (number - 1.0)
            freedom = min(max(count**2 / max(squares, count), 1.0), freedom)
        parts = total.square() / variance.clamp(min=1e-300)
        parts[total.abs() <= _ROUNDING * claimed.sum(0)[~impossible]] = 0.0
        # Scaled to the mean and the variance of the approximating chi-square.
        return float(parts.sum()) * freedom / max(count - 1.0, 1.0), freedom

    def excess(self) -> tuple[list[float], float]:
        """Return Q_t of the batches, and the number of bins, which is the mean of Q_t for random draws."""
        if self.within is None:
            return [], 0.0
        plain, units = torch.stack(self.plain), torch.tensor(self.units, dtype=torch.float64)
        each = self.within / (units - 1.0).sum().clamp(min=1.0)  # variance of one unit's counts
        live = each > 0
        if len(plain) < 2 or not bool(live.any()):
            return [], 0.0
        scatter = (plain - plain.mean(0))[:, live].square() / (units[:, None] * each[live])
        return (scatter.sum(1) * len(plain) / (len(plain) - 1.0)).tolist(), float(live.sum())


class _Test:
    """The tests of one source, or of a whole pool.

    Args:
        name: description of the source.
        claims: returns log kappa of all items for a request.
        item_counts: training interactions of each item, [N].
        unique: whether duplicates are removed.
        members: the sources.
    """

    def __init__(
        self,
        name: str,
        claims: Callable[[Tensor, DrawRequest], Tensor],
        item_counts: Tensor,
        *,
        unique: bool,
        members: list[RandomSource],
    ) -> None:
        self.name, self.claims, self.unique, self.members = name, claims, unique, members
        self.deciles = popularity_deciles(item_counts)
        self.items = torch.arange(len(item_counts))
        self.tallies: dict[int | None, _Tally] = {}
        self.by_decile = torch.zeros(2, 10, dtype=torch.float64)
        self.following = 0

    @classmethod
    def of_source(cls, member: RandomSource, item_counts: Tensor, *, in_unique_pool: bool) -> _Test:
        """Return the test of the claim that the pool uses for a source: counts, or inclusion without duplicates."""

        def inclusion(items: Tensor, request: DrawRequest) -> Tensor:
            return log_complement(member.log_absence(items, request))

        claims = inclusion if in_unique_pool else member.log_expected_count
        unique = in_unique_pool or member.unique
        return cls(describe(member), claims, item_counts, unique=unique, members=[member])

    @classmethod
    def of_pool(cls, pool: Pool, item_counts: Tensor) -> _Test:
        """Return the test of all sources of a pool together."""
        members = pool.random_sources()
        return cls("all sources", pool.log_expected_count, item_counts, unique=pool.unique, members=members)

    def add(self, step: int, request: DrawRequest, drawn: Tensor, share: Tensor, units: Tensor) -> None:
        """Add the counts of one batch; `share` is f of each item, and `units` has the unit of each row."""
        memories = [member.draws(request) for member in self.members if isinstance(member, CrossBatchMemory)]
        if memories == [0]:  # nothing is claimed yet
            return
        claimed = self._of_first_row(self.claims, request).exp()
        tally = self._tally(request, claimed)
        if len(self.members) == 1:
            self._add_scatter(tally, request, drawn, units)
        if step < self.following:
            return
        if memories:  # overlapping contents are not independent, so the next count waits until all content is new
            self.following = step + 1 + -(-memories[0] // len(request.positives))
        copies = torch.bincount(drawn, minlength=len(self.items)).double()
        if all(not isinstance(member, InBatch | CrossBatchMemory) for member in self.members):
            share = torch.ones_like(share)  # independent of the batch
        observed = copies.clamp(max=1.0) if self.unique else copies
        variance = claimed * (1.0 - claimed).clamp(min=0.0) if self.unique else claimed
        tally.observed.append(tally.binned(share * observed))
        tally.claimed.append(tally.binned(share * claimed))
        tally.variance += tally.binned(share**2 * variance)
        parts = torch.stack([share * claimed, share * observed])
        self.by_decile.index_add_(1, self.deciles, parts)

    def _of_first_row(self, claims: Callable[[Tensor, DrawRequest], Tensor], request: DrawRequest) -> Tensor:
        """Return the claims for all items; if they differ by row, the claims for the first row, which is tested."""
        if not any(member.varies_by_row for member in self.members):
            return claims(self.items, request)
        queries = None if request.queries is None else request.queries[:1]
        return claims(self.items[None], replace(request, positives=request.positives[:1], queries=queries))[0]

    def _add_scatter(self, tally: _Tally, request: DrawRequest, drawn: Tensor, units: Tensor) -> None:
        """Add the counts for the test of the batches, with duplicates, and their scatter between units.

        For a source that depends on the rows of batches, the rows of this batch are counted instead of its draws.
        """
        (member,) = self.members
        if isinstance(member, InBatch | CrossBatchMemory):
            share = member.frequency.log_prob(self.items, request.group).exp()
            drawn, windows = request.positives, request.windows
        else:
            share, windows = self._of_first_row(member.log_prob, request).exp(), None
        if tally.fine is None:
            tally.fine = equal_bins(share, _PER_FINE_BIN / max(len(drawn), 1))
        bins, size = tally.fine, int(tally.fine.max()) + 1
        share = torch.zeros(size, dtype=torch.float64).index_add_(0, bins, share)
        copies = torch.bincount(bins[drawn], minlength=size).double()
        if windows is None:
            tally.add_scatter(copies - len(drawn) * share, copies - copies.square() / max(len(drawn), 1), len(drawn))
            return
        count = int(units[-1]) + 1
        own = torch.bincount(units * size + bins[drawn], minlength=count * size).double().reshape(count, size)
        expected = count * windows.rows / windows.total * share
        tally.add_scatter(copies - expected, (own - own.mean(0)).square().sum(0), count)

    def _tally(self, request: DrawRequest, claimed: Tensor) -> _Tally:
        grouped = any(
            isinstance(member, InBatch) and isinstance(member.frequency, GroupedFrequency) for member in self.members
        )
        key = int(request.group) if grouped and request.group is not None else None
        if key not in self.tallies:
            bins = equal_bins(claimed)
            self.tallies[key] = _Tally(bins, int(bins.max()) + 1)
        return self.tallies[key]

    def result(self) -> Appearance:
        """Compute the results of the tests from all batches that were added."""
        # A group may have had no batch at a time when the whole memory was new.
        tallies = [one for one in self.tallies.values() if one.observed]
        observed = torch.cat([torch.stack(one.observed).sum(1) for one in tallies])
        claimed = torch.cat([torch.stack(one.claimed).sum(1) for one in tallies])
        number, most = len(observed), max(float(claimed.sum()), 1e-300)
        ratio = float(observed.sum()) / most
        difference = observed - claimed
        floor = float(sum(one.variance.sum() for one in tallies)) ** 0.5
        error = float(difference.std()) * number**0.5 if number >= _SCATTER else floor
        if self.unique:  # the estimated error is too small if all examined batches contain a frequent item
            error = max(error, floor)
        chi_squares = [one.item_chi_square(ratio) for one in tallies]
        excess, bins = self._excess(list(self.tallies.values()))
        off = sum(
            float((torch.stack(one.observed).sum(0) - ratio * torch.stack(one.claimed).sum(0)).abs().sum())
            for one in tallies
        )
        return Appearance(
            source=self.name,
            batches=number,
            claimed=self.by_decile[0].tolist(),
            observed=self.by_decile[1].tolist(),
            ratio=ratio,
            missed=max((_NOTICED + _MOSTLY) * error / most, _ROUNDING),
            deviation=0.5 * off / max(float(observed.sum()), 1e-300),
            p_total=_two_sided(float(difference.sum()), error, number, most),
            p_counts=survival(sum(x for x, _ in chi_squares), sum(freedom for _, freedom in chi_squares)),
            dispersion=None if excess is None else float(excess.mean()) / bins + 1.0,
            p_batches=None if excess is None else self._p_batches(excess, list(self.tallies.values())),
            estimated=any(
                not frequency.is_exact
                for member in self.members
                if (frequency := getattr(member, "frequency", None)) is not None
            ),
        )

    @staticmethod
    def _excess(tallies: list[_Tally]) -> tuple[Tensor | None, float]:
        """Return Q_t minus its expectation for all batches (None if too few), and the mean number of bins."""
        found = [one.excess() for one in tallies]
        excess = [value - bins for values, bins in found for value in values]
        if len(excess) < _SCATTER:
            return None, 1.0
        return torch.tensor(excess, dtype=torch.float64), sum(len(v) * bins for v, bins in found) / len(excess)

    @staticmethod
    def _p_batches(excess: Tensor, tallies: list[_Tally]) -> float:
        """Return the probability, by chance, of a mean excess at least this large, in the normal approximation."""
        units = sum(sum(one.units) for one in tallies) / max(sum(len(one.units) for one in tallies), 1)
        error = float(excess.std()) / len(excess) ** 0.5 * (1.0 + 1.0 / max(units - 1.0, 1.0)) ** 0.5
        z = float(excess.mean()) / max(error, 1e-300)
        return 0.5 * math.erfc(z / math.sqrt(2.0))


def _two_sided(difference: float, error: float, number: int, scale: float) -> float:
    """Return the probability that a total differs by at least this much by chance."""
    if abs(difference) <= _ROUNDING * scale:
        return 1.0
    t = min(abs(difference) / max(error, 1e-300), 1e6)
    if number >= _SCATTER:  # the error is estimated: convert Student's t to a normal quantile
        freedom = number - 1.0
        t *= (1.0 - 0.25 / freedom) / math.sqrt(1.0 + t * t / (2.0 * freedom))
    return math.erfc(t / math.sqrt(2.0))


def equal_bins(expected: Tensor, least: float = _PER_BIN) -> Tensor:
    """Assign a bin to every item, int64 [N], by descending expectation; the sum over a bin is at least `least`.

    Items with expectation 0 share the last bin, in which every appearance is an error.
    """
    order = torch.argsort(expected, descending=True, stable=True)
    ordered = expected[order]
    # Items above `least` have their own bin; the others are cut where the running sum passes a multiple of `least`.
    alone = int((ordered >= least).sum())
    rest = (ordered[alone:].cumsum(0) / least).long()
    total = int(rest[-1]) if len(rest) else 0
    bins = torch.cat([torch.arange(alone), alone + rest.clamp(max=max(total - 1, 0))])
    bins[ordered <= 0] = int(bins.max()) + 1
    return torch.empty_like(bins).scatter_(0, order, bins)


def survival(chi_square: float, freedom: float) -> float:
    """Return P(X > chi_square) for X chi-square distributed: the regularised upper incomplete gamma function."""
    if math.isinf(chi_square):
        return 0.0
    half = torch.tensor([max(freedom, 1.0) / 2.0, max(chi_square, 0.0) / 2.0], dtype=torch.float64)
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
