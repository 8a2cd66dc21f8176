"""Objectives compared on the same test queries: means with intervals, paired tests, and what may be said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.evaluation import Row
from twotower.evaluation.significance import Interval, bootstrap_intervals, holm, paired_comparison

#: Two objectives are told apart below this adjusted p-value ...
SIGNIFICANT = 0.05
#: ... where the difference is also larger than this many standard errors over seeds.
SEED_ERRORS = 2.0

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One number of one objective.

    Attributes:
        mean: over queries and seeds.
        low, high: its 95 % bootstrap interval over queries; None where there is no value for each query.
        by_seed: the mean over queries of each seed.
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
class Contest:
    """One objective against another on the same queries.

    Attributes:
        name: the objective.
        difference: mean over queries of its value less that of the one it is held against, both averaged over seeds.
        low, high: 95 % interval over queries.
        p_value: two-sided, of the paired bootstrap.
        adjusted: p_value after Holm, over all contests of the family.
        effect_size: mean difference over its standard deviation over queries.
        seed_error: standard error of the difference over seeds; None where no objective has two seeds.
        num_queries: queries with both values.
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
        """`ahead`, `behind` or `not told apart`."""
        beyond_seeds = self.seed_error is None or abs(self.difference) > SEED_ERRORS * self.seed_error
        if not (self.adjusted < SIGNIFICANT and beyond_seeds):
            return "not told apart"
        return "ahead" if self.difference > 0 else "behind"


@dataclass(frozen=True)
class Family:
    """All contests about one question, adjusted together.

    Attributes:
        about: `all` queries, the `tail`, or the `baselines`.
        metric: such as "NDCG@10".
        part: the slice, such as "tail"; None for all queries.
        against: the objective that all others are held against.
        contests: one for each other objective.
    """

    about: str
    metric: str
    part: str | None
    against: str
    contests: tuple[Contest, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        contests = [{**_plain(asdict(one)), "verdict": one.verdict} for one in self.contests]
        return {
            "about": self.about,
            "metric": self.metric,
            "slice": self.part,
            "against": self.against,
            "contests": contests,
        }


@dataclass(frozen=True)
class Compared:
    """What `compare` found: by objective, the metrics over all queries and by slice, and the families of tests."""

    values: dict[str, dict[str, Measured]]
    slices: dict[str, dict[str, dict[str, Measured]]]
    families: tuple[Family, ...]

    def best(self, metric: str) -> str:
        """The objective with the highest mean."""
        return max(self.values, key=lambda name: self.values[name][metric].mean)

    def model(self, name: str) -> dict[str, Any]:
        """The numbers of one objective as plain JSON values."""
        return {
            "values": {metric: _measured(found) for metric, found in self.values[name].items()},
            "slices": {
                part: {metric: _measured(found) for metric, found in metrics.items()}
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
) -> Compared:
    """Compare objectives by their values for each query, averaged over seeds.

    Every other objective is held against the one with the highest mean of `metric`, once on all queries by `metric` and
    once on the queries of the tail by `tail_metric`; so are the baselines, by `metric`. Choosing the best by the same
    numbers favours it a little: a small lead means less than its p-value says, which the adjustment for many
    comparisons covers in part.

    Args:
        rows: for each objective one evaluated row a seed; all of the same queries.
        baselines: rows of the same queries.
        metric: what decides, such as "NDCG@10".
        tail_metric: what is asked of the tail, such as "Recall@10".
        tail: the slice that is the tail.

    Raises:
        ValueError: no objective, one without a row, or rows of different queries.
    """
    if not rows or not all(rows.values()):
        raise ValueError("compare: expected at least one objective, each with a row")
    numbers = {name: measured(runs) for name, runs in rows.items()}
    values = {name: overall for name, (overall, _) in numbers.items()}
    slices = {name: parts for name, (_, parts) in numbers.items()}
    best = Compared(values, slices, ()).best(metric)
    families = []
    if len(rows) > 1:
        families.append(contest("all", rows, metric, None, best))
        if tail in slices[best] and np.isfinite(over_seeds(rows[best], f"{tail}/{tail_metric}")).sum() > 1:
            families.append(contest("tail", rows, tail_metric, tail, best))
    if baselines:
        beside = {best: rows[best], **{row.name: [row] for row in baselines}}
        families.append(contest("baselines", beside, metric, None, best))
    return Compared(values, slices, tuple(families))


def measured(runs: Sequence[Row]) -> tuple[dict[str, Measured], dict[str, dict[str, Measured]]]:
    """All numbers of one objective over its seeds: by metric, and by slice and metric."""
    intervals = _intervals(runs)

    def one(by_seed: tuple[float, ...], key: str) -> Measured:
        if key not in intervals:
            return Measured(float(np.mean(by_seed)), None, None, by_seed)
        found = intervals[key]
        low, high = (value if math.isfinite(value) else None for value in (found.low, found.high))
        return Measured(found.mean, low, high, by_seed)

    overall = {key: one(tuple(run.values[key] for run in runs), key) for key in runs[0].values}
    parts = {
        part: {key: one(tuple(run.slices[part][key] for run in runs), f"{part}/{key}") for key in metrics}
        for part, metrics in runs[0].slices.items()
    }
    return overall, parts


def _intervals(runs: Sequence[Row]) -> dict[str, Interval]:
    """The interval over queries of everything that has a value for each query, averaged over seeds.

    Metrics of the same queries are drawn again together, which costs little more than one of them.
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
    """The value of each query, averaged over seeds, [E]."""
    stacked = np.stack([run.per_query[key] for run in runs])
    mean: Values = stacked.mean(axis=0)
    return mean


def contest(about: str, rows: Mapping[str, Sequence[Row]], metric: str, part: str | None, against: str) -> Family:
    """Hold every other objective against one, by the paired bootstrap, adjusted together."""
    key = metric if part is None else f"{part}/{metric}"
    reference = over_seeds(rows[against], key)
    others = [name for name in rows if name != against]
    pairs = [paired_comparison(over_seeds(rows[name], key), reference) for name in others]
    adjusted = holm([pair.p_value for pair in pairs])
    spread = _pooled_deviation([[float(np.nanmean(run.per_query[key])) for run in runs] for runs in rows.values()])
    contests = tuple(
        Contest(
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
    return Family(about, metric, part, against, contests)


def _pooled_deviation(by_seed: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation over seeds, pooled over objectives: three seeds alone say little about their spread."""
    freedom = sum(len(values) - 1 for values in by_seed)
    if freedom == 0:
        return None
    squares = sum(float(((np.array(values) - np.mean(values)) ** 2).sum()) for values in by_seed)
    return math.sqrt(squares / freedom)


def _measured(found: Measured) -> dict[str, Any]:
    return _plain({**asdict(found), "deviation": found.deviation})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in values.items()}
