"""Log of the items shown in the test window, with their propensities, for estimating a policy's reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.run import ExposureConfig
from twotower.data.interactions import Interactions
from twotower.data.loading.histories import take_ranges
from twotower.data.prepare.request_context import joined_context
from twotower.data.splits.holdout import Holdout
from twotower.data.splits.protocols import Split, rows_before
from twotower.errors import InputError

Values = NDArray[np.float64]

#: Number of rows with the mean reward that are added to an item's training rows to predict its reward.
PRIOR_ROWS = 10.0


@dataclass(frozen=True)
class Examination:
    """The probability that a user looks at a position.

    Attributes:
        curve: the probabilities by position, from position 1; or the exponent e of position^-e; or None for 1 at every
            position.
    """

    curve: tuple[float, ...] | float | None = None

    def at(self, positions: NDArray[np.int64]) -> Values:
        """Return the probability of each position, counted from 1, same shape.

        Raises:
            InputError: a position is below 1 or beyond the end of the curve.
        """
        if self.curve is None:
            return np.ones(positions.shape)
        last = len(self.curve) if isinstance(self.curve, tuple) else None
        if positions.size and (positions.min() < 1 or (last is not None and positions.max() > last)):
            wrong = positions.min() if positions.min() < 1 else positions.max()
            raise InputError(
                f"evaluation.exposure: position {wrong}; expected positions from 1"
                + ("" if last is None else f" to {last}, the length of evaluation.exposure.examination")
            )
        if isinstance(self.curve, tuple):
            return np.asarray(self.curve, dtype=np.float64)[positions - 1]
        return positions.astype(np.float64) ** -self.curve


@dataclass(frozen=True, eq=False)
class ExposureLog:
    """The rows that were shown in the test window: n rows of E queries, as ragged arrays.

    Attributes:
        asked: the queries that have rows, with their histories before the window; the targets are the shown items, one
            per row, so they may repeat.
        rewards: [n], the logged reward of each row.
        propensities: [n], the probability that each row's item was shown, in (0, 1]; without a propensity column, the
            item's share of its query's rows.
        examination: [n], the probability that the user looked at the row.
        curve: the probability that the user looks at each position of a policy's list.
        item_rewards: [N], the reward of each item if the user looks at it, predicted from the training rows.
        clip: the largest importance weight; None for no limit.
        remark: the assumptions of the estimates, as text for a report.
    """

    asked: Holdout
    rewards: Values
    propensities: Values
    examination: Values
    curve: Examination
    item_rewards: Values
    clip: float | None
    remark: str

    @property
    def owners(self) -> NDArray[np.int64]:
        """The query of each row, as a position in `asked`, int64 [n]."""
        return np.repeat(np.arange(len(self.asked)), np.diff(self.asked.target_offsets))


def exposure_log(split: Split, settings: ExposureConfig | None, ks: Sequence[int]) -> ExposureLog | None:
    """Collect the log of the test window of a split by time; return None without settings.

    The log has the rows at or after the test cut, both positives and rows below `positive_label`, of all queries that
    may be test queries. Rows with items that are not in training are included: a policy that never shows these items
    gets no reward from them.

    For the doubly robust estimate, the reward of an item is predicted from the training rows, independently of the log:
    with c = 10, rho = sum r / sum theta over all training rows, and theta the examination of a row,

        reward(j) = (sum over rows of j of r + c rho) / (sum over rows of j of theta + c).

    Args:
        split: the data; its context must have the columns named in `settings`, for rows below `positive_label` too.
        settings: `evaluation.exposure`.
        ks: the cut-offs K of the evaluation.

    Raises:
        InputError: the split is not by time, a setting of the data rules out an estimate, rows without a reward are
            missing, the log is empty, or a value is out of range.
    """
    if settings is None:
        return None
    if split.name != "by_time" or "continues" in split.settings:
        what = "a continued model (--from)" if "continues" in split.settings else f"the split {split.name}"
        raise InputError(
            f"evaluation.exposure: {what} has no window of logged rows; use data.split=time and train from scratch, or "
            "remove evaluation.exposure"
        )
    data = split.data
    if data.event is not None:
        raise InputError(
            "evaluation.exposure: with data.events a shown item may have rewards of several event types; estimate one "
            "type in a run without data.events, with its reward in evaluation.exposure.reward"
        )
    if data.query_text is not None:
        raise InputError(
            "evaluation.exposure: with both data.query_text and data.columns.query, an item is shown for one of the "
            "texts of a query; train without data.columns.query, so that the texts are the queries"
        )
    if data.eligibility is not None and data.eligibility.governs_rows:
        raise InputError(
            "evaluation.exposure: with data.eligibility a policy may only show items that are eligible for a row, and "
            "the log does not say which were; remove evaluation.exposure, or estimate in a run without the rule"
        )
    if data.negatives is None and settings.reward is None:
        raise InputError(
            "evaluation.exposure: every row has the reward 1, so rows that were shown without a reward are missing; "
            "set data.positive_label, or name a column with evaluation.exposure.reward"
        )
    curve = Examination(tuple(settings.examination) if isinstance(settings.examination, list) else settings.examination)
    curve.at(np.arange(1, max(ks) + 1))
    first, second = split.settings["cuts"]
    known = rows_before(data, second if split.settings["histories"] else first) > 0
    if split.settings["cold"] == "keep":
        known[:] = True
    log = _Rows.of(data, settings, curve, from_=second)
    log = log.select(known[log.queries])
    if not len(log.items):
        raise InputError(
            "evaluation.exposure: the test window has no logged row of a known query; use a larger data.test"
        )
    queries, starts = np.unique(log.queries, return_index=True)
    offsets = np.append(starts, len(log.items)).astype(np.int64)
    starts_of, ends_of = data.offsets[queries], data.offsets[queries] + rows_before(data, second)[queries]
    history_rows, history_offsets = take_ranges(starts_of, ends_of)
    times = data.timestamps
    assert times is not None
    asked = Holdout(
        name="test log",
        queries=queries.astype(np.int64),
        history_offsets=history_offsets,
        history_items=np.asarray(data.item_codes[history_rows]),
        target_offsets=offsets,
        target_items=log.items,
        history_timestamps=np.asarray(times[history_rows]),
        query_times=log.times[starts],
        context=None if log.context is None else log.context[starts],
    )
    learnt = _Rows.of(split.train, settings, curve, with_propensities=False)
    mean = learnt.rewards.sum() / learnt.examination.sum()
    sums, looks = (
        np.bincount(learnt.items, weights=values, minlength=data.num_items)
        for values in (learnt.rewards, learnt.examination)
    )
    return ExposureLog(
        asked,
        log.rewards,
        log.shares(offsets) if log.propensities is None else log.propensities,
        log.examination,
        curve,
        (sums + PRIOR_ROWS * mean) / (looks + PRIOR_ROWS),
        settings.clip,
        _remark(settings, len(log.items), len(queries)),
    )


def _remark(settings: ExposureConfig, rows: int, queries: int) -> str:
    text = (
        "estimated reward of a row if its item were drawn at random from the first K: "
        f"{rows:,} logged rows of {queries:,} queries"
    )
    if settings.propensity is None:
        text += (
            "; without a propensity column, the share of an item in its query's rows is used instead, so items that "
            "were not shown to a query count as 0 in IPS, are left out of SNIPS, and have the predicted reward in DR"
        )
    else:
        text += f", propensities from {settings.propensity}"
    if settings.position is not None:
        text += (
            f"; the probability that a row is looked at is evaluation.exposure.examination at its {settings.position}"
        )
    return text


@dataclass(frozen=True, eq=False)
class _Rows:
    """Positives and negatives together, sorted by query and time."""

    queries: NDArray[np.int64]
    items: NDArray[np.int32]
    times: NDArray[np.int64]
    rewards: Values
    examination: Values
    propensities: Values | None
    context: pl.DataFrame | None

    @classmethod
    def of(
        cls,
        data: Interactions,
        settings: ExposureConfig,
        curve: Examination,
        *,
        from_: int | None = None,
        with_propensities: bool = True,
    ) -> _Rows:
        parts = [(data, 1.0)] if data.negatives is None else [(data, 1.0), (data.negatives, 0.0)]
        if from_ is not None:
            parts = [(rows.select(np.asarray(rows.timestamps) >= from_), reward) for rows, reward in parts]
        propensity = settings.propensity if with_propensities else None
        found: list[dict[str, Any]] = [
            {
                "queries": rows.query_codes().astype(np.int64),
                "items": np.asarray(rows.item_codes),
                "times": np.asarray(rows.timestamps),
                "rewards": _column(rows, settings.reward, "reward", reward),
                "positions": _column(rows, settings.position, "position", 1.0),
                "propensities": _column(rows, propensity, "propensity", 1.0),
            }
            for rows, reward in parts
        ]
        joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        order = np.lexsort((joined["times"], joined["queries"]))
        positions, propensities = joined["positions"], joined["propensities"]
        for what, column, wrong, expected in (
            ("position", settings.position, positions[positions != np.round(positions)], "whole numbers"),
            ("propensity", propensity, propensities[(propensities <= 0) | (propensities > 1)], "values in (0, 1]"),
        ):
            if len(wrong):
                raise InputError(
                    f"evaluation.exposure.{what}: column {column!r} has values such as {wrong[0]:g} in {len(wrong):,} "
                    f"of {len(order):,} rows; expected {expected}"
                )
        return cls(
            joined["queries"][order],
            joined["items"][order],
            joined["times"][order],
            joined["rewards"][order],
            curve.at(positions.astype(np.int64))[order],
            None if propensity is None else propensities[order],
            joined_context([rows.context for rows, _ in parts if len(rows)], order),
        )

    def select(self, mask: NDArray[np.bool_]) -> _Rows:
        arrays = ("queries", "items", "times", "rewards", "examination", "propensities")
        chosen: dict[str, Any] = {name: values[mask] for name in arrays if (values := getattr(self, name)) is not None}
        return replace(self, context=None if self.context is None else self.context.filter(pl.Series(mask)), **chosen)

    def shares(self, offsets: NDArray[np.int64]) -> Values:
        """Return the share of each row's item among the rows of its query, [n]."""
        sizes = np.diff(offsets)
        keys = np.repeat(np.arange(len(sizes)), sizes) * (int(self.items.max()) + 1) + self.items
        _, of, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shares: Values = counts[of] / np.repeat(sizes, sizes)
        return shares


def _column(data: Interactions, column: str | None, field: str, default: float) -> Values:
    """Return the numbers of a context column, or the default for every row if there is no column."""
    if column is None or not len(data):
        return np.full(len(data), default)
    if data.context is None or column not in data.context.columns:
        raise InputError(
            f"evaluation.exposure.{field}: column {column!r} was not read with the interactions; in Python pass "
            f"context=[{column!r}] to Interactions.read or from_frame"
        )
    values = data.context[column].cast(pl.Float64, strict=False)
    if not values.is_finite().fill_null(value=False).all():
        wrong = int((~values.is_finite().fill_null(value=False)).arg_true()[0])
        raise InputError(
            f"evaluation.exposure.{field}: column {column!r} has {data.context[column][wrong]!r}; expected a finite "
            "number in every row"
        )
    return values.to_numpy()
