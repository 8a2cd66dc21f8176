"""Confidence intervals of means over queries, and comparisons of models: bootstrap, paired and multiple comparisons.

The query is the unit: queries are resampled with replacement, together with all their values. This measures the
variation over queries of one trained model. Variation over training seeds is separate, and needs several runs.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twotower.errors import InputError

Values = NDArray[np.float64]

#: A difference is significant below this p-value.
SIGNIFICANT = 0.05

#: Number of counts in memory at a time, resamples x queries: 32 MB in float64.
_BLOCK = 1 << 22
#: A standard deviation below this share of the largest value is rounding error.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean over queries and its confidence interval.

    Attributes:
        mean: mean of the values that are not NaN; NaN if there are none.
        low: lower end; NaN with fewer than 2 values.
        high: upper end; NaN with fewer than 2 values.
        level: confidence level, such as 0.95.
    """

    mean: float
    low: float
    high: float
    level: float

    def to_dict(self) -> dict[str, float | None]:
        """Convert to plain types for JSON; non-finite values become None."""
        plain: dict[str, float | None] = finite(asdict(self))
        return plain


@dataclass(frozen=True)
class PairedComparison:
    """Comparison of two models on the same queries.

    Attributes:
        difference: mean over queries of a - b.
        low: lower end of the difference's confidence interval; NaN if it cannot be bounded, because there are fewer
            than 2 queries or so few queries with a difference that a resample often contains none of them.
        high: upper end; NaN in the same cases.
        p_value: two-sided, under the hypothesis that the mean difference is 0; NaN with fewer than 2 queries.
        effect_size: Cohen's d_z, the mean difference over its standard deviation over queries (divisor E - 1); 0 if all
            differences are 0, infinite if they are all equal and not 0, NaN with fewer than 2 queries.
        num_queries: number of queries with both values.
    """

    difference: float
    low: float
    high: float
    p_value: float
    effect_size: float
    num_queries: int

    def to_dict(self) -> dict[str, float | None]:
        """Convert to plain types for JSON; non-finite values become None."""
        plain: dict[str, float | None] = finite(asdict(self))
        return plain


def bootstrap_interval(values: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Compute the BCa (bias-corrected and accelerated) bootstrap confidence interval of a mean over queries.

        z0 = Phi^-1(share of resampled means below the mean)
        a  = sum_e d_e^3 / (6 (sum_e d_e^2)^{3/2}),   d_e = x_e - mean
        an end is the quantile Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the resampled means,
            z = Phi^-1((1 -+ level) / 2)

    (Efron 1987, eq. 2.3 and 6.6; Efron & Tibshirani 1993, ch. 14.) a is the skewness of the mean divided by 6: with
    skewed values, such as an NDCG of 0 for most queries, the interval extends further towards the long tail, as it
    should. If all values are equal, the interval has width 0.

    Args:
        values: [E], one per query; NaN entries are ignored.
        level: confidence, in (0, 1).
        resamples: R, number of bootstrap resamples.
        seed: seed of the resampling; the same seed draws the same queries for every metric with the same E.

    Returns:
        Mean and interval.

    Raises:
        InputError: `values` is not [E], or a setting is out of range.
    """
    values = _one_dimensional(values, "values")
    return bootstrap_intervals(values[~np.isnan(values), None], level=level, resamples=resamples, seed=seed)[0]


def bootstrap_intervals(values: Values, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> list[Interval]:
    """Compute `bootstrap_interval` for several metrics of the same queries, from the same resamples.

    Args:
        values: [E, M], without NaN.
        level: as in `bootstrap_interval`.
        resamples: as in `bootstrap_interval`.
        seed: as in `bootstrap_interval`.

    Returns:
        M intervals.
    """
    _check(level, resamples)
    if values.ndim != 2 or np.isnan(values).any():
        raise InputError(f"values must be [E, M] without NaN, got shape {values.shape}")
    if len(values) < 2:
        means = values[0].tolist() if len(values) else [math.nan] * values.shape[1]
        return [Interval(mean, math.nan, math.nan, level) for mean in means]
    means = values.mean(axis=0)
    centred = values - means  # so that rounding errors scale with the spread, not with the mean
    drawn = np.concatenate([counts @ centred for counts in _resamples(len(values), resamples, seed)]) / len(values)
    return [
        _bca(float(mean), deviation, np.sort(column), level)
        for mean, deviation, column in zip(means, centred.T, drawn.T, strict=True)
    ]


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Compute the BCa bootstrap confidence interval of a ratio of sums over queries.

        ratio = sum_e a_e / sum_e b_e,    d_e = (a_e - ratio b_e) / mean(b)

    Queries are resampled with both of their sums. The d_e are the linearised deviations of the ratio (Cochran 1977, eq.
    2.39), which give the acceleration as in `bootstrap_interval`. If every b_e is 1, the interval is the one that
    `bootstrap_interval` computes for a.

    Args:
        numerators: a, [E], one per query.
        denominators: b, [E], not negative.
        level: as in `bootstrap_interval`.
        resamples: as in `bootstrap_interval`; resamples in which all b are 0 are left out.
        seed: as in `bootstrap_interval`.

    Returns:
        Ratio and interval; NaN if all b are 0, and no interval with fewer than 2 queries.

    Raises:
        InputError: the shapes are not [E], or a setting is out of range.
    """
    _check(level, resamples)
    a, b = _one_dimensional(numerators, "numerators"), _one_dimensional(denominators, "denominators")
    if a.shape != b.shape:
        raise InputError(f"numerators and denominators must be of the same queries, got {len(a)} and {len(b)}")
    if not b.any():
        return Interval(math.nan, math.nan, math.nan, level)
    ratio = float(a.sum() / b.sum())
    if len(a) < 2:
        return Interval(ratio, math.nan, math.nan, level)
    scale = float(b.mean())
    deviation = (a - ratio * b) / scale
    both = np.stack([deviation, b / scale], axis=1)
    sums = np.concatenate([counts @ both for counts in _resamples(len(a), resamples, seed)])
    drawn = sums[sums[:, 1] > 0]
    return _bca(ratio, deviation, np.sort(drawn[:, 0] / drawn[:, 1]), level)


def paired_comparison(
    a: ArrayLike,
    b: ArrayLike,
    *,
    method: Literal["bootstrap", "t-test"] = "bootstrap",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two models by the differences x_e = a_e - b_e of their per-query values.

    With d the mean of x, s its standard deviation, se = s / sqrt(E), t = d / se:

    - `"bootstrap"`, studentized (Efron & Tibshirani 1993, sec. 16.4; Sakai 2006, "Evaluating evaluation metrics
      based on the bootstrap"): queries are resampled, t* = (d* - d) / se*, and

          p = (1 + #{|t*| >= |t|}) / (1 + R),    interval = d -+ (quantile `level` of |t*|) se

      (symmetric bootstrap-t; Hall 1988). A resample without spread counts as one with |t*| >= |t|.
    - `"t-test"`: Student's distribution with E - 1 degrees of freedom in place of t*.

    Interval and p-value are consistent: the interval excludes 0 exactly if p <= 1 - level. For multiple comparisons,
    adjust the p-values (`holm`).

    Args:
        a: [E] values of one model; NaN for a query without a value.
        b: [E] values of the other model, for the same queries in the same order.
        method: source of the distribution of t.
        level: confidence of the interval.
        resamples: R; p is no smaller than 1 / (1 + R).
        seed: seed of the resampling.

    Returns:
        The comparison over the queries that have both values.

    Raises:
        InputError: the shapes disagree, the method is unknown, or a setting is out of range.
    """
    a, b = _one_dimensional(a, "a"), _one_dimensional(b, "b")
    if a.shape != b.shape:
        raise InputError(f"a and b must be values of the same queries, got {len(a)} and {len(b)}")
    if method not in ("bootstrap", "t-test"):
        raise InputError(f"method must be 'bootstrap' or 't-test', got {method!r}")
    _check(level, resamples)
    x = a - b
    x = x[~np.isnan(x)]
    count = len(x)
    if count < 2:
        mean = float(x[0]) if count else math.nan
        return PairedComparison(mean, math.nan, math.nan, math.nan, math.nan, count)
    difference, deviation = float(x.mean()), float(x.std(ddof=1))
    if deviation <= _ROUNDING * float(np.abs(x).max()):
        return _without_spread(difference, count, 1 / (1 + resamples) if method == "bootstrap" else 0.0)
    error = deviation / math.sqrt(count)
    t = abs(difference) / error
    if method == "t-test":
        from scipy.special import stdtr, stdtrit  # noqa: PLC0415  # serving imports this file, but does not need scipy

        p_value = 2 * float(stdtr(count - 1, -t))
        reach = float(stdtrit(count - 1, (1 + level) / 2))
    else:
        drawn = _studentized(x - difference, resamples, seed)
        p_value = (1 + int((drawn >= t).sum())) / (1 + resamples)
        # The order statistic that makes interval and p-value consistent: |t| above it gives p <= 1 - level.
        place = math.ceil(level * (1 + resamples) - 1e-9) - 1
        reach = float(np.sort(drawn)[place]) if place < resamples else math.inf
    half = reach * error if math.isfinite(reach) else math.nan
    return PairedComparison(difference, difference - half, difference + half, p_value, difference / deviation, count)


def holm(p_values: ArrayLike) -> Values:
    """Adjust p-values for multiple comparisons, controlling the probability of any false positive.

    With p_(1) <= ... <= p_(m):  adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))   (Holm 1979).

    The adjustment is valid for any dependence between the comparisons, and never larger than Bonferroni's m p.

    Args:
        p_values: [m] in [0, 1]; NaN stays NaN and is not counted in m.

    Returns:
        [m] adjusted p-values, in the order given.

    Raises:
        InputError: the shape is not [m], or a value is outside [0, 1].
    """
    p = _one_dimensional(p_values, "p_values")
    if ((p < 0) | (p > 1)).any():
        raise InputError("p_values must lie in [0, 1]")
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    left = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(left * p[order], 1.0))
    return adjusted


def _bca(mean: float, deviation: Values, drawn: Values, level: float) -> Interval:
    """Compute the interval; `drawn` are the resampled means minus the mean, ascending."""
    from scipy.special import ndtr, ndtri  # noqa: PLC0415  # as in `paired_comparison`

    square = float((deviation**2).sum())
    if math.sqrt(square / len(deviation)) <= _ROUNDING * abs(mean) or square == 0:
        return Interval(mean, mean, mean, level)
    # Resampled means of few distinct values often equal the mean; half of these count as below it, despite rounding.
    edge = _ROUNDING * float(np.abs(deviation).max())
    below = (np.searchsorted(drawn, -edge) + np.searchsorted(drawn, edge)) / 2
    z0 = float(ndtri(np.clip(below / len(drawn), 1 / (1 + len(drawn)), len(drawn) / (1 + len(drawn)))))
    acceleration = float((deviation**3).sum()) / (6 * square**1.5)
    ends = []
    for z in (float(ndtri((1 - level) / 2)), float(ndtri((1 + level) / 2))):
        share = ndtr(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))
        ends.append(mean + float(np.quantile(drawn, share)))
    return Interval(mean, ends[0], ends[1], level)


def _studentized(centred: Values, resamples: int, seed: int) -> Values:
    """Compute |t*| of each resample, [R]; infinite if the resample has no spread."""
    count = len(centred)
    both = np.stack([centred, centred**2], axis=1)
    sums = np.concatenate([counts @ both for counts in _resamples(count, resamples, seed)])
    means = sums[:, 0] / count
    variance = np.maximum(sums[:, 1] / count - means**2, 0.0) * (count / (count - 1))
    error = np.sqrt(variance / count)
    flat = error <= _ROUNDING * np.abs(centred).max()
    return np.where(flat, np.inf, np.abs(means) / np.where(flat, 1.0, error))


def _resamples(count: int, resamples: int, seed: int) -> Iterator[Values]:
    """Yield how often each query is drawn (multinomial counts), float64 [block, E]; R rows over all blocks."""
    random = np.random.default_rng(seed)
    block = max(1, min(resamples, _BLOCK // count))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(0, count, (rows, count), dtype=np.int64)
        drawn += np.arange(rows)[:, None] * count
        yield np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _without_spread(difference: float, count: int, smallest: float) -> PairedComparison:
    """Build the comparison for the case that all differences are equal."""
    if difference == 0:
        return PairedComparison(0.0, 0.0, 0.0, 1.0, 0.0, count)
    return PairedComparison(difference, difference, difference, smallest, math.copysign(math.inf, difference), count)


def _one_dimensional(values: ArrayLike, name: str) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"{name} must be one-dimensional, got shape {array.shape}")
    return array


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")


def finite(value: Any) -> Any:
    """Convert nested values to plain types for JSON: tuples become lists, and non-finite numbers become None."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
