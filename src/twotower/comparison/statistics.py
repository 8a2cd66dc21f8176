"""Statistics of objectives compared on the same test queries: means with intervals, paired tests, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.evaluation import Row
from twotower.evaluation.significance import SIGNIFICANT, Interval, bootstrap_intervals, finite, holm, paired_comparison

#: A significant difference between objectives counts only if it exceeds this many standard errors over seeds.
SEED_ERRORS = 2.0

Values = NDArray[np.float64]


@dataclass(frozen=True)
class MetricEstimate:
    """One metric of one objective.

    Attributes:
        mean: mean over queries and seeds.
        low, high: 95 % bootstrap interval over queries; None if the metric has no per-query values.
        by_seed: the mean over queries for each seed.
    """

    mean: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (divisor S - 1); None with one seed."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class PairwiseTest:
    """A paired comparison of one objective with the reference of its family.

    Attributes:
        name: the objective.
        difference: mean over queries of its value minus the reference's value, both averaged over seeds.
        low, high: 95 % interval over queries.
        p_value: two-sided p-value of the paired bootstrap.
        adjusted: p_value after Holm's adjustment over the family.
        effect_size: mean difference divided by its standard deviation over queries.
        seed_error: standard error of the difference over seeds; None if no objective has two seeds.
        num_queries: number of queries with both values.
    """

    name: str
    difference: float
    low: float
    high: float
    p_value: float
    adjusted: float
    effect_size: float
    seed_error: float | None
    num_queries: int

    @property
    def verdict(self) -> str:
        """The result of the test: `ahead`, `behind` or `not told apart`."""
        beyond_seeds = self.seed_error is None or abs(self.difference) > SEED_ERRORS * self.seed_error
        if not (self.adjusted < SIGNIFICANT and beyond_seeds):
            return "not told apart"
        return "ahead" if self.difference > 0 else "behind"


@dataclass(frozen=True)
class TestFamily:
    """A family of tests with the same metric and reference, adjusted together.

    Attributes:
        about: what is tested: `all` (all queries), `tail` or `baselines`.
        metric: name of the metric, such as "NDCG@10".
        part: the slice, such as "tail"; None for all queries.
        against: the reference objective that all others are compared with.
        contests: the test of each other objective.
    """

    about: str
    metric: str
    part: str | None
    against: str
    contests: tuple[PairwiseTest, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        contests = [{**finite(asdict(one)), "verdict": one.verdict} for one in self.contests]
        return {
            "about": self.about,
            "metric": self.metric,
            "slice": self.part,
            "against": self.against,
            "contests": contests,
        }


@dataclass(frozen=True)
class ComparisonStatistics:
    """The result of `compare`: metrics of each objective, overall and by slice, and the families of tests."""

    values: dict[str, dict[str, MetricEstimate]]
    slices: dict[str, dict[str, dict[str, MetricEstimate]]]
    families: tuple[TestFamily, ...]

    def best(self, metric: str) -> str:
        """Return the objective with the highest mean."""
        return max(self.values, key=lambda name: self.values[name][metric].mean)

    def model(self, name: str) -> dict[str, Any]:
        """Return the metrics of one objective as plain JSON values."""
        return {
            "values": {metric: _estimate_to_dict(found) for metric, found in self.values[name].items()},
            "slices": {
                part: {metric: _estimate_to_dict(found) for metric, found in metrics.items()}
                for part, metrics in self.slices[name].items()
            },
        }


def compare(
    rows: Mapping[str, Sequence[Row]],
    baselines: Sequence[Row] = (),
    *,
    metric: str,
    tail_metric: str,
    tail: str = "tail",
) -> ComparisonStatistics:
    """Compare objectives by their per-query values, averaged over seeds.

    The reference is the objective with the highest mean of `metric`. Every other objective is compared with it twice:
    on all queries by `metric`, and on the tail by `tail_metric`. The baselines are compared with it by `metric`.
    Selecting the reference by the same numbers favours it slightly, so a small lead means less than its p-value
    suggests. The adjustment for multiple comparisons compensates for part of this.

    Args:
        rows: for each objective one evaluated row per seed, all of the same queries.
        baselines: rows of the same queries.
        metric: the deciding metric, such as "NDCG@10".
        tail_metric: the metric on the tail, such as "Recall@10".
        tail: name of the tail slice.

    Raises:
        InputError: there is no objective, an objective has no rows, or rows are of different queries.
    """
    if not rows or not all(rows.values()):
        raise InputError("compare: expected at least one objective, each with at least one row")
    numbers = {name: measured(runs) for name, runs in rows.items()}
    values = {name: overall for name, (overall, _) in numbers.items()}
    slices = {name: parts for name, (_, parts) in numbers.items()}
    best = ComparisonStatistics(values, slices, ()).best(metric)
    families = []
    if len(rows) > 1:
        families.append(contest("all", rows, metric, None, best))
        if tail in slices[best] and np.isfinite(over_seeds(rows[best], f"{tail}/{tail_metric}")).sum() > 1:
            families.append(contest("tail", rows, tail_metric, tail, best))
    if baselines:
        with_baselines = {best: rows[best], **{row.name: [row] for row in baselines}}
        families.append(contest("baselines", with_baselines, metric, None, best))
    return ComparisonStatistics(values, slices, tuple(families))


def measured(runs: Sequence[Row]) -> tuple[dict[str, MetricEstimate], dict[str, dict[str, MetricEstimate]]]:
    """Aggregate one objective over its seeds: by metric, and by slice and metric."""
    intervals = _intervals(runs)

    def one(by_seed: tuple[float, ...], key: str) -> MetricEstimate:
        if key not in intervals:
            return MetricEstimate(float(np.mean(by_seed)), None, None, by_seed)
        found = intervals[key]
        low, high = (value if math.isfinite(value) else None for value in (found.low, found.high))
        return MetricEstimate(found.mean, low, high, by_seed)

    overall = {key: one(tuple(run.values[key] for run in runs), key) for key in runs[0].values}
    parts = {
        part: {key: one(tuple(run.slices[part][key] for run in runs), f"{part}/{key}") for key in metrics}
        for part, metrics in runs[0].slices.items()
    }
    return overall, parts


def _intervals(runs: Sequence[Row]) -> dict[str, Interval]:
    """Compute the interval over queries of every per-query metric, averaged over seeds.

    Metrics with values on the same queries share the bootstrap resamples, which costs little more than one metric.
    """
    together: dict[bytes, list[str]] = {}
    means = {key: over_seeds(runs, key) for key in runs[0].per_query}
    for key, mean in means.items():
        together.setdefault(np.isnan(mean).tobytes(), []).append(key)
    found: dict[str, Interval] = {}
    for keys in together.values():
        known = ~np.isnan(means[keys[0]])
        stacked = np.stack([means[key][known] for key in keys], axis=1)
        found |= dict(zip(keys, bootstrap_intervals(stacked), strict=True))
    return found


def over_seeds(runs: Sequence[Row], key: str) -> Values:
    """Average the value of each query over seeds, [E]."""
    stacked = np.stack([run.per_query[key] for run in runs])
    mean: Values = stacked.mean(axis=0)
    return mean


def contest(about: str, rows: Mapping[str, Sequence[Row]], metric: str, part: str | None, against: str) -> TestFamily:
    """Compare every other objective with the reference by the paired bootstrap, with Holm-adjusted p-values."""
    key = metric if part is None else f"{part}/{metric}"
    reference = over_seeds(rows[against], key)
    others = [name for name in rows if name != against]
    pairs = [paired_comparison(over_seeds(rows[name], key), reference) for name in others]
    adjusted = holm([pair.p_value for pair in pairs])
    spread = _pooled_deviation([[float(np.nanmean(run.per_query[key])) for run in runs] for runs in rows.values()])
    contests = tuple(
        PairwiseTest(
            name=name,
            difference=pair.difference,
            low=pair.low,
            high=pair.high,
            p_value=pair.p_value,
            adjusted=float(p),
            effect_size=pair.effect_size,
            seed_error=None if spread is None else spread * math.sqrt(1 / len(rows[name]) + 1 / len(rows[against])),
            num_queries=pair.num_queries,
        )
        for name, pair, p in zip(others, pairs, adjusted, strict=True)
    )
    return TestFamily(about, metric, part, against, contests)


def _pooled_deviation(by_seed: Sequence[Sequence[float]]) -> float | None:
    """Pool the standard deviation over seeds across objectives, because one objective alone has few seeds."""
    freedom = sum(len(values) - 1 for values in by_seed)
    if freedom == 0:
        return None
    squares = sum(float(((np.array(values) - np.mean(values)) ** 2).sum()) for values in by_seed)
    return math.sqrt(squares / freedom)


def _estimate_to_dict(found: MetricEstimate) -> dict[str, Any]:
    plain: dict[str, Any] = finite({**asdict(found), "deviation": found.deviation})
    return plain
