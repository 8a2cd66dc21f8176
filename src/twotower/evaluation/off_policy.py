"""Estimates of the reward that a policy would have received, from a log of another policy with known propensities.

A log has n rows: to query x_i the logging system showed item a_i, which it chose with probability p_i (the propensity),
and received reward r_i. Plain metrics treat such a log as if the query had been shown every item; these estimates
weight each row by how much more often the evaluated policy would have shown its item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twotower.data import ExposureLog
from twotower.errors import InputError, counted
from twotower.evaluation.significance import Interval, bootstrap_ratio

Values = NDArray[np.float64]

#: Names of the estimators: inverse propensity, self-normalised, doubly robust.
ESTIMATORS = ("IPS", "SNIPS", "DR")


@dataclass(frozen=True)
class OffPolicyEstimate:
    """The estimated reward of one policy.

    Attributes:
        intervals: estimate and 95 % interval over queries, by the names in `ESTIMATORS`; DR only with a reward model.
        effective_size: number of rows of an unweighted sample that would be as informative, (sum w)^2 / sum w^2.
        rows: n, number of rows of the log.
        clipped: number of rows whose weight was larger than `clip`.
    """

    intervals: dict[str, Interval]
    effective_size: float
    rows: int
    clipped: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON; NaN becomes None."""
        return {
            "estimates": {name: interval.to_dict() for name, interval in self.intervals.items()},
            "effective_size": self.effective_size,
            "rows": self.rows,
            "clipped": self.clipped,
        }


def off_policy_estimate(
    rewards: ArrayLike,
    policy: ArrayLike,
    propensities: ArrayLike,
    *,
    queries: ArrayLike | None = None,
    attention: ArrayLike | None = None,
    predicted: ArrayLike | None = None,
    expected: ArrayLike | None = None,
    clip: float | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> OffPolicyEstimate:
    """Estimate the mean reward per row if the items had been chosen by another policy.

    With pi_i the probability that the policy shows item a_i to query x_i, weights v_i = pi_i / p_i and w_i = v_i t_i:

        IPS   = sum_i w_i r_i / n                                     (Horvitz & Thompson 1952)
        SNIPS = sum_i w_i r_i / sum_i v_i                             (Swaminathan & Joachims 2015, eq. 10)
        DR    = sum_i [ e_i + w_i (r_i - m_i) ] / n                   (Dudik, Langford & Li 2011, eq. 2)

    m_i is a model's prediction of r_i, and e_i its prediction of the reward under the policy, sum_a pi(a | x_i) m(x_i,
    a). IPS and DR are unbiased if the propensities are right and positive for every item that the policy may show. For
    DR the model may be wrong, but must not be fitted on these rows. SNIPS is consistent; without t, a constant added to
    all rewards is added to the estimate. Intervals resample whole queries (`bootstrap_ratio`).

    The factor t_i corrects for positions: if the probability that a user looks at a row depends on its position, t_i is
    this probability at the position where the policy would show the item, divided by the probability at the logged
    position (the item-position model of Li et al. 2018, "Offline evaluation of ranking policies with click models").

    Args:
        rewards: r, [n].
        policy: pi, [n], in [0, 1].
        propensities: p, [n], in (0, 1].
        queries: [n], the query of each row, in any coding; None if every row has its own query.
        attention: t, [n], not negative; None for 1.
        predicted: m, [n]; together with `expected`, or None for no DR.
        expected: e, [n].
        clip: largest allowed v; larger values are cut to it, which biases every estimate. None for no limit.
        level: confidence of the intervals.
        resamples: see `bootstrap_ratio`.
        seed: see `bootstrap_ratio`.

    Raises:
        InputError: a value is not finite or out of range, the lengths differ, or no row of the log could have been
            shown by the policy (an effective sample size of 0).
    """
    r, pi, p = _values(rewards, "rewards"), _values(policy, "policy"), _values(propensities, "propensities")
    count = len(r)
    t = np.ones(count) if attention is None else _values(attention, "attention")
    if (predicted is None) != (expected is None):
        raise InputError("off-policy estimate: expected both predicted and expected for DR, or neither; found one")
    m, e = (
        None if one is None else _values(one, name) for one, name in ((predicted, "predicted"), (expected, "expected"))
    )
    for name, values in (("policy", pi), ("propensities", p), ("attention", t), ("predicted", m), ("expected", e)):
        if values is not None and len(values) != count:
            raise InputError(
                f"off-policy estimate: {counted(count, 'reward')}, but {counted(len(values), 'value')} of {name}"
            )
    if ((p <= 0) | (p > 1)).any():
        wrong = p[(p <= 0) | (p > 1)]
        raise InputError(
            f"propensities: values such as {wrong[0]:g} in {len(wrong):,} of {count:,} rows; expected values in (0, 1]"
        )
    if ((pi < 0) | (pi > 1)).any() or (t < 0).any():
        raise InputError("off-policy estimate: expected a policy in [0, 1] and an attention of at least 0")
    if clip is not None and not clip > 0:
        raise InputError(f"clip: {clip}; expected a number above 0, or None")
    v = pi / p
    clipped = 0 if clip is None else int((v > clip).sum())
    if clip is not None:
        v = np.minimum(v, clip)
    w = v * t
    if not w.any():
        raise InputError(
            f"off-policy estimate: effective sample size 0: the policy would have shown none of the {count:,} logged "
            "rows"
        )
    of = np.arange(count) if queries is None else np.unique(np.asarray(queries), return_inverse=True)[1]
    if len(of) != count:
        raise InputError(f"off-policy estimate: {counted(count, 'reward')}, but {counted(len(of), 'query', 'queries')}")

    def ratio(numerators: Values, denominators: Values) -> Interval:
        sums = (np.bincount(of, weights=values) for values in (numerators, denominators))
        return bootstrap_ratio(*sums, level=level, resamples=resamples, seed=seed)

    ones = np.ones(count)
    intervals = {"IPS": ratio(w * r, ones), "SNIPS": ratio(w * r, v)}
    if m is not None and e is not None:
        intervals["DR"] = ratio(e + w * (r - m), ones)
    return OffPolicyEstimate(intervals, float(w.sum() ** 2 / (w**2).sum()), count, clipped)


def estimate_top_k(ranked: NDArray[np.int64], log: ExposureLog, k: int) -> OffPolicyEstimate | None:
    """Estimate the reward of a row whose item is drawn uniformly from the first K of a ranking.

    pi_i = 1 / K if the item of row i is among the first K of its query, else 0. With positions, t_i is the examination
    probability at the item's rank divided by the examination probability at the position at which it was shown. K times
    the estimate is then the expected reward of a list of K, if the reward of an item does not depend on the rest of the
    list. The doubly robust estimate takes `ExposureLog.item_rewards` as its prediction of the reward of an item.

    Args:
        ranked: [E, at least K] item codes for the queries of `log.asked`, best first, -1 where nothing was ranked.
        log: the log.
        k: K.

    Returns:
        The estimate; None if none of the logged rows is among the first K.
    """
    top, owners = ranked[:, :k], log.owners
    looked = log.curve.at(np.arange(1, k + 1))
    place = top[owners] == np.asarray(log.asked.target_items)[:, None]
    shown = place.any(axis=1)
    if not shown.any():
        return None
    expected = (np.where(top >= 0, log.item_rewards[top], 0.0) * looked).sum(axis=1) / k
    return off_policy_estimate(
        log.rewards,
        shown / k,
        log.propensities,
        queries=owners,
        attention=looked[place.argmax(axis=1)] / log.examination,
        predicted=log.examination * log.item_rewards[log.asked.target_items],
        expected=expected[owners],
        clip=log.clip,
    )


@dataclass(frozen=True)
class OffPolicyTable:
    """Estimated rewards of all rankers.

    Attributes:
        logged: the mean reward of the logged rows, with its interval.
        rows: ranker -> K -> its estimate; None if the ranker would have shown none of the logged rows.
        clip: the largest weight allowed; None for no limit.
        remark: assumptions of the estimates.
    """

    logged: Interval
    rows: dict[str, dict[int, OffPolicyEstimate | None]]
    clip: float | None
    remark: str

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON."""
        return {
            "logged": self.logged.to_dict(),
            "clip": self.clip,
            "remark": self.remark,
            "rows": {
                name: {str(k): None if found is None else found.to_dict() for k, found in by_k.items()}
                for name, by_k in self.rows.items()
            },
        }

    def header(self, k: int) -> list[str]:
        """Return the column titles of the table of one K."""
        return [f"reward @{k}", "estimator", "estimate", "95 % interval", "effective rows"]

    def cells(self, k: int) -> list[list[str]]:
        """Return the cells of the table of one K: a line for the log, then a line for each ranker and estimator."""
        lines = [["the log itself", "mean", *_shown(self.logged), ""]]
        for name, by_k in self.rows.items():
            found = by_k[k]
            if found is None:
                lines.append([name, "none", "-", "-", "0"])
                continue
            lines += [
                [name, estimator, *_shown(interval), f"{found.effective_size:,.0f}"]
                for estimator, interval in found.intervals.items()
            ]
        return lines

    def notes(self) -> list[str]:
        """Return the sentences below the table."""
        none = [name for name, by_k in self.rows.items() if None in by_k.values()]
        lines = [self.remark]
        if none:
            lines.append(
                f"{', '.join(none)}: effective sample size 0 at some K: no logged row shows an item of the first K, so "
                "the reward at that K cannot be estimated"
            )
        if self.clip is not None:
            cut = max((one.clipped for by_k in self.rows.values() for one in by_k.values() if one), default=0)
            lines.append(
                f"weights above {self.clip:g} were cut, in at most {counted(cut, 'row')} per ranker; this "
                "biases the estimates"
            )
        return lines


def _shown(interval: Interval) -> Sequence[str]:
    if math.isnan(interval.low):
        return f"{interval.mean:.4f}", "-"
    return f"{interval.mean:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"


def _values(given: ArrayLike, name: str) -> Values:
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(f"{name}: expected one finite number for each row of the log")
    return values
