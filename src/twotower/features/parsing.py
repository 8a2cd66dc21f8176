"""Conversion of feature columns to text, numbers, times, lists, words or vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.io.timestamps import date_microseconds, parse_dates, to_microseconds, unit_of
from twotower.errors import InputError


class Ids(Protocol):
    """A lookup of the id of each row."""

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(frozen=True)
class ErrorLocation:
    """A table and the ids of its rows, which error messages use to name a cell.

    Attributes:
        table: name of the table.
        ids: the id of each row; None if the rows have no ids.
        side: "item" or "query".
    """

    table: str
    ids: Ids | None = None
    side: str = "item"

    def error(self, column: str, row: int, expected: str, found: object) -> InputError:
        """Return the error for one cell."""
        which = f"row {row + 1}" if self.ids is None else f"{self.side} {self.ids[row]!r}"
        return InputError(f"{self.table}: column {column!r}, {which}: expected {expected}, found {_shown(found)}.")

    def wrong_type(self, series: pl.Series, expected: str) -> InputError:
        """Return the error for a whole column."""
        return InputError(f"{self.table}: column {series.name!r}: expected {expected}, found type {series.dtype}.")


def _shown(value: object) -> str:
    text = repr(value.to_list() if isinstance(value, pl.Series) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first(mask: pl.Series) -> int:
    return int(mask.arg_true()[0])


def as_text(series: pl.Series, place: ErrorLocation) -> pl.Series:
    """Convert to text. 3, 3.0 and "3" become the same text, because integers with nulls are often stored as floats.

    Raises:
        InputError: the column contains lists, structs, bytes or durations.
    """
    if series.dtype == pl.Null:
        return series.cast(pl.String)
    if series.dtype.is_nested() or series.dtype in (pl.Object, pl.Binary, pl.Duration):
        raise place.wrong_type(series, "one value in each row (kind multi takes lists)")
    if series.dtype.is_float():
        values = series.fill_nan(None)
        whole = values.cast(pl.Int64, strict=False)
        text = pl.select(
            pl.when(whole.cast(pl.Float64) == values.cast(pl.Float64))
            .then(whole.cast(pl.String))
            .otherwise(values.cast(pl.String))
        ).to_series()
        return text.alias(series.name)
    text = series.cast(pl.String).str.strip_chars()
    return text.set(text == "", None)


def as_numbers(series: pl.Series, place: ErrorLocation) -> NDArray[np.float64]:
    """Convert to finite numbers, float64 [rows]; missing values become NaN.

    Raises:
        InputError: the column contains dates, lists, infinite numbers, or text that is not a number.
    """
    if series.dtype == pl.String:
        text = as_text(series, place)
        numbers = text.cast(pl.Float64, strict=False)
        wrong = numbers.is_null() & text.is_not_null()
        if wrong.any():
            row = _first(wrong)
            raise place.error(series.name, row, "a number, or an empty cell for a missing value", series[row])
    elif series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null):
        numbers = series.cast(pl.Float64)
    else:
        raise place.wrong_type(series, "numbers")
    infinite = numbers.is_infinite().fill_null(False)
    if infinite.any():
        row = _first(infinite)
        raise place.error(series.name, row, "a finite number, or an empty cell for a missing value", series[row])
    return numbers.fill_null(float("nan")).to_numpy()


def as_times(series: pl.Series, place: ErrorLocation, unit: str | None = None) -> tuple[pl.Series, str | None]:
    """Convert times to Int64 microseconds since 1970, null where missing; also return the unit of numeric times.

    Args:
        series: dates, ISO text, or unix time.
        place: location for error messages.
        unit: unit of unix time; None to infer it from the largest value.

    Raises:
        InputError: a value is not a time.
    """
    if series.dtype == pl.Null:
        return series.cast(pl.Int64), unit
    if series.dtype == pl.Date or isinstance(series.dtype, pl.Datetime):
        return date_microseconds(series, partial(place.error, series.name)), unit
    if series.dtype.is_numeric():
        numbers = pl.Series(series.name, as_numbers(series, place)).fill_nan(None)
        present = numbers.drop_nulls().to_numpy()
        if unit is None:
            unit = unit_of(present, f"{place.table}: {series.name!r}")
        times = pl.Series(series.name, [None] * len(series), dtype=pl.Int64)
        return times.scatter(numbers.is_not_null().arg_true(), to_microseconds(present, unit)), unit
    if series.dtype != pl.String:
        raise place.wrong_type(series, "dates, ISO text or unix time")
    text = as_text(series, place)
    as_number = text.cast(pl.Float64, strict=False)
    if text.null_count() < len(text) and as_number.null_count() == text.null_count():
        return as_times(as_number.alias(series.name), place, unit)
    times = parse_dates(text)
    wrong = times.is_null() & text.is_not_null()
    if wrong.any():
        row = _first(wrong)
        raise place.error(series.name, row, "unix time or ISO text like 2024-05-31 17:05:00", series[row])
    return times, unit


def as_lists(series: pl.Series, separator: str | None, place: ErrorLocation) -> pl.Series:
    """Convert to lists of text without blank or repeated values; null where missing.

    Raises:
        InputError: the column contains text but no separator is given, or it contains neither text nor lists.
    """
    if series.dtype == pl.Null:
        return series.cast(pl.List(pl.String))
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if isinstance(series.dtype, pl.List):
        inner = series.explode(keep_nulls=False, empty_as_null=False)
        if len(inner):
            as_text(inner.alias(series.name), place)  # rejects lists of lists
        texts = series.cast(pl.List(pl.String))
    elif series.dtype == pl.String and separator is not None:
        texts = series.str.split(separator)
    elif series.dtype == pl.String:
        raise place.wrong_type(series, "lists (or set the separator, if a text holds several values)")
    else:
        raise place.wrong_type(series, "lists, or text with a separator")
    cleaned = texts.list.eval(pl.element().str.strip_chars().filter(pl.element().str.strip_chars() != ""))
    return cleaned.list.unique(maintain_order=True).alias(series.name)


def as_words(series: pl.Series, place: ErrorLocation) -> pl.Series:
    """Split text into distinct lower-case words of letters and digits in any script; null where missing."""
    text = as_text(series, place).str.to_lowercase()
    return text.str.extract_all(r"[\p{L}\p{N}]+").list.unique(maintain_order=True)


def as_vectors(
    series: pl.Series, width: int | None, place: ErrorLocation
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Convert to vectors, float32 [rows, width], with zeros for missing rows; also return the mask of missing rows.

    Args:
        series: lists or arrays of numbers.
        width: required length of each vector; None for the length of the first vector.
        place: location for error messages.

    Raises:
        InputError: a value is not a list or has the wrong length, or a number is missing or not finite.
    """
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype == pl.Null:
        series = series.cast(pl.List(pl.Float32))
    inner: Any = series.dtype.inner if isinstance(series.dtype, pl.List) else None
    if inner is None or not (inner.is_numeric() or inner == pl.Null):
        raise place.wrong_type(series, "a list of numbers in each row")
    missing = series.is_null()
    lengths = series.list.len()
    if width is None:
        present = lengths.drop_nulls()
        width = int(present[0]) if len(present) else 1
    wrong = (lengths != width).fill_null(False)
    if wrong.any():
        row = _first(wrong)
        raise place.error(series.name, row, f"{width} numbers", int(lengths[row]))
    flat = series.filter(~missing).list.explode(keep_nulls=True, empty_as_null=False)
    values = flat.cast(pl.Float32).fill_null(float("nan")).to_numpy().reshape(-1, width)
    at = np.flatnonzero(~missing.to_numpy())
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        row = int(at[np.flatnonzero(bad)[0]])
        raise place.error(series.name, row, "only finite numbers", series[row])
    vectors = np.zeros((len(series), width), dtype=np.float32)
    vectors[at] = values
    return vectors, missing.to_numpy()
