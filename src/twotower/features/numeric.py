"""Encoders of numbers, timestamps and vectors; categorical.py describes the forms of their arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import DenseFeature, NumericFeature, TimestampFeature
from twotower.features.categorical import Form
from twotower.features.parsing import ErrorLocation, as_numbers, as_times, as_vectors

DAY = 86_400_000_000
YEAR_DAYS = 365.25


@dataclass(frozen=True)
class Standardization:
    """Standardisation, z = (x - mean) / deviation, of values clipped to the range of the fitted values.

    A price a thousand times the largest training price then simply counts as the largest one.
    """

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> Standardization:
        """Fit the mean, population standard deviation and range of the values, ignoring NaN."""
        known = values[~np.isnan(values)]
        if not len(known):
            return cls(0.0, 1.0, 0.0, 0.0)
        deviation = float(known.std())
        return cls(float(known.mean()), deviation if deviation > 0 else 1.0, float(known.min()), float(known.max()))

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standardise values; 0 where NaN."""
        z = (np.clip(values, self.low, self.high) - self.mean) / self.deviation
        return np.nan_to_num(z, nan=0.0)

    def state(self) -> dict[str, float]:
        """Return the constructor arguments as JSON values."""
        return {"mean": self.mean, "deviation": self.deviation, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class NumericEncoder:
    """Encoder of a number by its standardised value or standardised logarithm."""

    scale: Standardization
    log: bool
    note: str = ""
    form: ClassVar[Form] = "numbers"
    size: ClassVar[int] = 2

    @classmethod
    def fit(cls, declared: NumericFeature, column: pl.Series, place: ErrorLocation) -> NumericEncoder:
        """Fit the mean and deviation of a column."""
        log = declared.scale == "log"
        scale = Standardization.fit(_numbers(column, place, log=log))
        return cls(scale, log, f"mean {scale.mean:.4g}, deviation {scale.deviation:.4g}" + (" of log(1+x)" * log))

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.float32]:
        """See `FeatureEncoder`."""
        values = _numbers(column, place, log=self.log)
        return np.stack([self.scale(values), np.isnan(values)], axis=1).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return self.scale.state()

    @classmethod
    def restore(cls, declared: NumericFeature, state: dict[str, Any]) -> NumericEncoder:
        """Restore from the result of `state`."""
        return cls(Standardization(**state), declared.scale == "log")


def _numbers(column: pl.Series, place: ErrorLocation, *, log: bool) -> NDArray[np.float64]:
    values = as_numbers(column, place)
    if not log:
        return values
    below = np.flatnonzero(values <= -1)
    if below.size:
        row = int(below[0])
        raise place.error(column.name, row, "a number above -1 for scale: log", column[row])
    logs: NDArray[np.float64] = np.log1p(values)
    return logs


@dataclass(frozen=True)
class Quantile:
    """Encoder of a number x by its bin: the code is 1 + the count of inner edges <= x, or 0 where x is missing."""

    edges: NDArray[np.float64]
    note: str = ""
    form: ClassVar[Form] = "codes"

    @classmethod
    def fit(cls, declared: NumericFeature, column: pl.Series, place: ErrorLocation) -> Quantile:
        """Fit the distinct inner edges at the quantiles 1/bins, 2/bins, ..."""
        values = as_numbers(column, place)
        known = values[~np.isnan(values)]
        levels = np.arange(1, declared.bins) / declared.bins
        # An edge at or below the smallest value would leave the first bin empty.
        edges = np.unique(np.quantile(known, levels)) if len(known) else np.empty(0)
        edges = edges[edges > known.min()] if len(known) else edges
        return cls(edges, f"{len(edges) + 1} bins")

    @property
    def size(self) -> int:
        """The number of rows of the embedding table: one per bin, and one for missing values."""
        return len(self.edges) + 2

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.int64]:
        """See `FeatureEncoder`."""
        values = as_numbers(column, place)
        return np.where(np.isnan(values), 0, 1 + np.searchsorted(self.edges, values, side="right"))

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return {"edges": self.edges.tolist()}

    @classmethod
    def restore(cls, declared: NumericFeature, state: dict[str, Any]) -> Quantile:
        """Restore from the result of `state`."""
        del declared
        return cls(np.array(state["edges"], dtype=np.float64))


@dataclass(frozen=True)
class TimestampEncoder:
    """Encoder of a timestamp by its cyclic parts in UTC and its age relative to the latest fitted timestamp."""

    declared: TimestampFeature
    unit: str | None
    latest: int
    age: Standardization
    note: str = ""
    form: ClassVar[Form] = "numbers"

    @classmethod
    def fit(cls, declared: TimestampFeature, column: pl.Series, place: ErrorLocation) -> TimestampEncoder:
        """Fit the unit, the latest timestamp, and the scale of the ages."""
        times, unit = as_times(column, place)
        last: Any = times.max()
        latest = int(last) if last is not None else 0
        ages = cls._ages(times, latest)
        note = "none known" if last is None else f"latest {pl.Series([latest]).cast(pl.Datetime('us'))[0]}"
        return cls(declared, unit, latest, Standardization.fit(ages), note)

    @property
    def size(self) -> int:
        """The width: two columns per cyclic part, one for the age and one for missing values."""
        return sum(1 if part == "age" else 2 for part in self.declared.parts) + 1

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.float32]:
        """See `FeatureEncoder`."""
        times, _ = as_times(column, place, self.unit)
        missing = times.is_null().to_numpy()
        at = times.fill_null(0)
        calendar = at.cast(pl.Datetime("us"))
        turns = {
            "hour": (at % DAY).to_numpy() / DAY,
            # 1970-01-01 was a Thursday, so with the offset 3 Monday is 0.
            "weekday": ((at // DAY + 3) % 7).to_numpy() / 7,
            "season": (calendar.dt.ordinal_day() - 1).to_numpy() / YEAR_DAYS,
        }
        parts: list[NDArray[Any]] = []
        for part in self.declared.parts:
            if part == "age":
                parts.append(self.age(self._ages(times, self.latest)))
            else:
                angle = 2 * np.pi * turns[part]
                parts += [np.where(missing, 0.0, np.sin(angle)), np.where(missing, 0.0, np.cos(angle))]
        return np.stack([*parts, missing], axis=1).astype(np.float32)

    @staticmethod
    def _ages(times: pl.Series, latest: int) -> NDArray[np.float64]:
        """Compute log(1 + days before the latest timestamp): 0 for later times, NaN where missing."""
        days = (latest - times).cast(pl.Float64).fill_null(float("nan")).to_numpy() / DAY
        ages: NDArray[np.float64] = np.log1p(np.maximum(days, 0.0))
        return ages

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return {"unit": self.unit, "latest": self.latest, "age": self.age.state()}

    @classmethod
    def restore(cls, declared: TimestampFeature, state: dict[str, Any]) -> TimestampEncoder:
        """Restore from the result of `state`."""
        return cls(declared, state["unit"], int(state["latest"]), Standardization(**state["age"]))


@dataclass(frozen=True)
class DenseEncoder:
    """Encoder of a given vector, unchanged or scaled to length 1."""

    declared: DenseFeature
    width: int
    note: str = ""
    form: ClassVar[Form] = "numbers"

    @classmethod
    def fit(cls, declared: DenseFeature, column: pl.Series, place: ErrorLocation) -> DenseEncoder:
        """Determine the width of the vectors of a column."""
        vectors, _ = as_vectors(column, None, place)
        return cls(declared, vectors.shape[1], f"{vectors.shape[1]} wide")

    @property
    def size(self) -> int:
        """The width: the length of the vector, and one column for missing values."""
        return self.width + 1

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.float32]:
        """See `FeatureEncoder`."""
        vectors, missing = as_vectors(column, self.width, place)
        return with_missing(vectors, missing, normalise=self.declared.normalise)

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return {"width": self.width}

    @classmethod
    def restore(cls, declared: DenseFeature, state: dict[str, Any]) -> DenseEncoder:
        """Restore from the result of `state`."""
        return cls(declared, int(state["width"]))


def with_missing(vectors: NDArray[np.float32], missing: NDArray[np.bool_], *, normalise: bool) -> NDArray[np.float32]:
    """Append a column that marks missing vectors; `normalise` scales vectors to length 1 (zeros stay zeros)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True) if normalise else np.ones((len(vectors), 1))
    scaled = vectors / np.where(lengths > 0, lengths, 1.0)
    return np.concatenate([scaled, missing[:, None]], axis=1).astype(np.float32)
