"""Encoding of the contexts and features in requests, where each row is interpreted on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import TimestampFeature
from twotower.data.io.timestamps import unit_of
from twotower.data.loading.batches import Encoded
from twotower.data.loading.gaps import gap_codes
from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError
from twotower.features.feature_set import FeatureSet
from twotower.features.frames import frame_of
from twotower.features.parsing import ErrorLocation, as_times


def given_gaps(times: Sequence[Any] | None, count: int) -> NDArray[np.int8]:
    """Compute the gap codes of a request's history from unix times, dates or ISO text; all 0 if `times` is None.

    Raises:
        InputError: the numbers of times and items differ, or a value is not a time.
    """
    if times is None:
        return np.zeros(count, dtype=np.int8)
    if len(times) != count:
        raise InputError(f"times: expected {count}, one per item of the history; found {len(times)}.")
    try:
        series = pl.Series("times", list(times))
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        raise InputError("times: values of mixed types; give all of them as numbers, or all as text.") from None
    parsed, _ = as_times(series, ErrorLocation("history"))
    if parsed.null_count():
        raise InputError("times: expected one per item of the history; some are missing.")
    return gap_codes(np.array([0, count]), parsed.to_numpy())


#: One context per request, None for an unknown context; or a frame with one row per request.
ContextRows = pl.DataFrame | Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True)
class EncodedContext:
    """The encoded context of several requests, kept so that encoding runs only once.

    Attributes:
        arrays: one array per feature, in which row i belongs to request i.
        rows: number of requests.
    """

    arrays: Encoded
    rows: int

    @classmethod
    def of(cls, features: FeatureSet, rows: ContextRows) -> EncodedContext:
        """Encode the context of requests; see `encode_context_rows`."""
        return cls(encode_context_rows(features, rows), len(rows))

    @classmethod
    def joined(cls, parts: Sequence[EncodedContext]) -> EncodedContext:
        """Concatenate the requests of one or more parts."""
        order = np.arange(sum(part.rows for part in parts))
        columns = zip(*(part.arrays for part in parts), strict=True)
        return cls([_in_order(list(column), order) for column in columns], len(order))

    def __len__(self) -> int:
        return self.rows

    def repeated(self, times: int) -> EncodedContext:
        """Repeat every request `times` times consecutively."""
        return EncodedContext([np.repeat(array, times, axis=0) for array in self.arrays], self.rows * times)


def encode_context_rows(features: FeatureSet, rows: ContextRows) -> Encoded:
    """Encode the context of requests as in training; see `encode_apart`.

    Args:
        features: fitted on the context of the training rows.
        rows: a frame, whose other columns are ignored, or one mapping from column to value (or None) per request.
            Absent columns count as missing.

    Raises:
        InputError: a mapping has a column that is not in the model's context, or a value has the wrong type.
    """
    if isinstance(rows, pl.DataFrame):
        return features.encode_rows(rows, ErrorLocation("context"))
    known = features.columns
    for row in rows:
        for name in row or {}:
            if name not in known:
                raise InputError(f"context: the model has no column {name!r}; its context columns are {listed(known)}.")
    return encode_apart(features, [row or {} for row in rows], "context")


def encode_apart(features: FeatureSet, rows: Sequence[Mapping[str, Any]], name: str) -> Encoded:
    """Encode rows so that each has the same result as if it were encoded alone.

    Rows whose values have the same types are encoded together, so 3 in one row and "three" in the next, or unix time in
    one row and a date in the next, do not affect each other.

    Args:
        features: the fitted encoders.
        rows: mappings from column to value. Absent columns count as missing; additional columns are ignored.
        name: name of the rows in messages.

    Raises:
        InputError: a value has the wrong type.
    """
    if not rows:
        return [empty[:0] for empty in features.missing()]
    known = features.columns
    groups: dict[tuple[str, ...], list[int]] = {}
    timestamps = {one.column for one in features.declared if isinstance(one, TimestampFeature)}
    for place, row in enumerate(rows):
        kinds = tuple(_kind(row.get(column), name, timestamp=column in timestamps) for column in known)
        groups.setdefault(kinds, []).append(place)
    found: list[Encoded] = []
    for places in groups.values():
        chosen = [{column: rows[place].get(column) for column in known} for place in places]
        where = ErrorLocation(name, [place + 1 for place in places], "row")
        found.append(features.encode_rows(frame_of(chosen, known, name), where))
    order = np.concatenate([np.asarray(places, dtype=np.int64) for places in groups.values()])
    return [_in_order([encoded[one] for encoded in found], order) for one in range(len(features.declared))]


def _kind(value: Any, name: str, *, timestamp: bool) -> str:
    if isinstance(value, str) and timestamp:
        # Unix time as text also has a unit, inferred from the largest of the values encoded together.
        number = _number(value)
        return "text" if number is None else f"text of {unit_of(np.array([number]), name)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return unit_of(np.array([float(value)]), name) if timestamp and np.isfinite(value) else "number"
    return type(value).__name__


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _in_order(parts: list[NDArray[Any]], order: NDArray[np.int64]) -> NDArray[Any]:
    """Merge the rows of several arrays into the given order; bags are padded to the widest bag."""
    width = max((part.shape[1] for part in parts if part.ndim == 2), default=0)
    shape = (len(order), width) if parts[0].ndim == 2 else (len(order),)
    joined = np.zeros(shape, dtype=parts[0].dtype)
    start = 0
    for part in parts:
        at = order[start : start + len(part)]
        if part.ndim == 2:
            joined[at, : part.shape[1]] = part
        else:
            joined[at] = part
        start += len(part)
    return joined
