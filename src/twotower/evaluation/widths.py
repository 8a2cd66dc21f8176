"""Metrics of a model with nested embeddings at each of its widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twotower.evaluation.significance import Interval, finite


@dataclass(frozen=True)
class WidthTable:
    """Metrics of one model at several widths, ascending; the last is the width of the other tables.

    Attributes:
        metrics: the metrics, in the order of the columns.
        values: by width and metric, the mean over the queries.
        intervals: the 95 % intervals of the means.
    """

    metrics: tuple[str, ...]
    values: Mapping[int, Mapping[str, float]]
    intervals: Mapping[int, Mapping[str, Interval]]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON; NaN becomes None."""
        rows = [
            {
                "width": width,
                "values": dict(values),
                "intervals": {name: one.to_dict() for name, one in self.intervals[width].items()},
            }
            for width, values in self.values.items()
        ]
        plain: dict[str, Any] = finite({"metrics": list(self.metrics), "rows": rows})
        return plain

    def header(self) -> list[str]:
        """Return the column titles."""
        return ["width", *self.metrics]

    def cells(self) -> list[list[str]]:
        """Return the cells, a row for each width."""
        return [
            [str(width), *("-" if math.isnan(values[name]) else f"{values[name]:.4f}" for name in self.metrics)]
            for width, values in self.values.items()
        ]

    def note(self) -> str:
        """Return a sentence that describes the table."""
        return (
            "by width: ranked by the first coordinates of the embeddings alone; the other tables use all "
            f"{max(self.values)} coordinates"
        )
