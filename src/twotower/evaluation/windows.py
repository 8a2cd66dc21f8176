"""Metrics over several consecutive test windows: a value for each window, and their mean with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.evaluation.significance import finite

#: The normal quantile of a 95 % interval.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class WindowMean:
    """A metric of a ranker over windows.

    Attributes:
        by_window: the mean over the queries of each window, oldest first.
        mean: the mean of `by_window`.
        low: lower end of the mean's 95 % interval over queries; NaN with fewer than 2 queries.
        high: upper end of the interval.
    """

    by_window: tuple[float, ...]
    mean: float
    low: float
    high: float


def window_mean(windows: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> WindowMean:
    """Average a metric over windows, with an interval that treats each query as one cluster.

    Window k of K has E_k queries and the mean m_k. The mean over windows is m = sum_k m_k / K. With U distinct queries
    as independent clusters (the linearised variance of a cluster sample; Cochran 1977, chapter 9A),

        c_q = sum over the windows k of q of (x_qk - m_k) / (K E_k),   var(m) = U / (U - 1) sum_q c_q^2

    The values of one query in two windows are not independent; if they were treated as independent, the interval would
    be too narrow. The interval describes the uncertainty of m for these windows, not for future windows.

    Args:
        windows: the query codes [E_k] and the values [E_k] of each window.
    """
    means = [float(values.mean()) for _, values in windows]
    codes = np.concatenate([queries for queries, _ in windows])
    shares = np.concatenate(
        [(values - mean) / (len(windows) * len(values)) for (_, values), mean in zip(windows, means, strict=True)]
    )
    distinct, place = np.unique(codes, return_inverse=True)
    count, mean = len(distinct), float(np.mean(means))
    if count < 2:
        return WindowMean(tuple(means), mean, math.nan, math.nan)
    half = Z95 * math.sqrt(count / (count - 1) * float((np.bincount(place, weights=shares) ** 2).sum()))
    return WindowMean(tuple(means), mean, mean - half, mean + half)


@dataclass(frozen=True)
class WindowTable:
    """Metrics of all rankers over the windows.

    Attributes:
        begins: the time of the first test row of each window, as text.
        metrics: names of the metrics; the first is the deciding one, which the printed table shows.
        rows: ranker -> metric -> its mean; includes only rankers that were measured in every window.
    """

    begins: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: dict[str, dict[str, WindowMean]]

    @classmethod
    def of(cls, frames: Sequence[pl.DataFrame], begins: Sequence[str], metrics: Sequence[str]) -> WindowTable:
        """Build the table from the `Evaluation.per_query_frame` of each window, oldest first."""
        names = [
            name
            for name in frames[-1]["ranker"].unique(maintain_order=True)
            if all((frame["ranker"] == name).any() for frame in frames)
        ]
        rows = {}
        for name in names:
            parts = [frame.filter(pl.col("ranker") == name) for frame in frames]
            rows[name] = {
                metric: window_mean([(part["query_code"].to_numpy(), part[metric].to_numpy()) for part in parts])
                for metric in metrics
            }
        return cls(tuple(begins), tuple(metrics), rows)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON; NaN becomes None."""
        rows = {name: {metric: asdict(one) for metric, one in found.items()} for name, found in self.rows.items()}
        plain: dict[str, Any] = finite({"begins": self.begins, "rows": rows})
        return plain

    def header(self) -> list[str]:
        """Return the column titles of the deciding metric's table."""
        return [self.metrics[0], *(f"window {place + 1}" for place in range(len(self.begins))), "mean", "95 % interval"]

    def cells(self) -> list[list[str]]:
        """Return the cells of the deciding metric's table."""
        return [
            [
                name,
                *(f"{value:.4f}" for value in found[self.metrics[0]].by_window),
                f"{found[self.metrics[0]].mean:.4f}",
                f"{found[self.metrics[0]].low:.4f} to {found[self.metrics[0]].high:.4f}",
            ]
            for name, found in self.rows.items()
        ]

    def note(self) -> str:
        """Return a sentence that describes the table."""
        return (
            f"{len(self.begins)} test windows, from {', '.join(self.begins)} on; for each window, a model is trained "
            "on the rows before it. The other tables show the last window"
        )
