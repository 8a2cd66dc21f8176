"""Weights of training rows from a column, such as dwell time, and from the age of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.interactions import Interactions
from twotower.errors import InputError, counted

DAY = 86_400_000_000
#: Number of steps of the `quantile` rule.
STEPS = 100


def weigh_rows(
    data: Interactions,
    *,
    rows: NDArray[np.int64] | None = None,
    column: str | None = None,
    rule: str = "log1p",
    cap: float | None = None,
    quantiles: list[float] | None = None,
    half_life: float | None = None,
) -> tuple[Interactions, list[float] | None]:
    """Multiply the weights of training rows by a weight computed from a column's value x, and by 2^(-age / half-life).

        log1p: log(1 + x);   cap: min(x, cap);   none: x
        quantile: the share of the training rows whose value is at most x, in steps of 1/100

    The age is counted from the newest training row. Multiplying all weights by a constant changes nothing: the loss
    divides by their mean.

    Args:
        data: the training interactions.
        rows: the rows to train on, if not all; the quantiles and the newest row are taken from these rows.
        column: context column with x, at least 0; None for no such weight.
        rule: log1p, cap, quantile or none.
        cap: the largest weight under the `cap` rule.
        quantiles: the quantiles of an earlier run, to get the same weights; None to compute them.
        half_life: days after which the weight of a row is halved; None for no decay.

    Returns:
        The interactions with new weights, and the quantiles under the `quantile` rule, otherwise None.

    Raises:
        InputError: the column was not read, is not numeric, or has a value that is missing, negative or not finite; or
            a half-life is given and the interactions have no timestamps.
    """
    weights = np.ones(len(data)) if data.weights is None else np.asarray(data.weights, dtype=np.float64)
    learnt = np.arange(len(data)) if rows is None else rows
    if column is not None:
        values = _values(data, column)
        if rule == "quantile" and quantiles is None:
            shares = np.arange(1, STEPS + 1) / STEPS
            quantiles = np.quantile(values[learnt], shares, method="inverted_cdf").tolist()
        weights = weights * _by_rule(values, rule, cap, quantiles)
    if half_life is not None:
        if data.timestamps is None:
            raise InputError(
                "data.recency_half_life: the data has no timestamps; name the column with data.columns.timestamp, or "
                "remove this setting"
            )
        times = np.asarray(data.timestamps)
        age = (times[learnt].max() - times) / DAY
        weights = weights * np.exp2(-np.maximum(age, 0.0) / half_life)
    found = replace(data, weights=weights.astype(np.float32), known_fingerprint=None)
    return found, quantiles if rule == "quantile" and column is not None else None


def _values(data: Interactions, column: str) -> NDArray[np.float64]:
    if data.context is None or column not in data.context.columns:
        raise InputError(
            f"data.weights.column: {column!r} was not read with the interactions; in Python pass context=[{column!r}] "
            "to Interactions.read or from_frame"
        )
    values = data.context[column]
    if not (values.dtype.is_numeric() or values.dtype == pl.Boolean):
        raise InputError(f"data.weights.column: {column!r} is {values.dtype}; expected numbers")
    numbers: NDArray[Any] = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if len(wrong):
        raise InputError(
            f"data.weights.column: {column!r} has {counted(len(wrong), 'value that is', 'values that are')} missing, "
            f"negative or not finite; the first is {values[int(wrong[0])]}; expected finite, non-negative numbers"
        )
    return numbers


def _by_rule(
    values: NDArray[np.float64], rule: str, cap: float | None, quantiles: list[float] | None
) -> NDArray[np.float64]:
    if rule == "log1p":
        return np.log1p(values)
    if rule == "cap":
        return np.minimum(values, np.inf if cap is None else cap)
    if rule == "quantile":
        assert quantiles is not None
        # The k-th quantile is the smallest value that at least k/100 of the rows do not exceed.
        return np.searchsorted(np.asarray(quantiles), values, side="right") / len(quantiles)
    return values
