"""Validation of the rows of a source, and conversion to a common form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.io.readers import LISTS, ROW, FileSource
from twotower.data.io.timestamps import date_microseconds, parse_dates
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import ids_of
from twotower.errors import InputError

#: Labels and weights are stored as float32; a larger number would become infinite.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class CleanRows:
    """The validated rows of one chunk.

    Attributes:
        queries: query ids, Int64 or String [n].
        items: item ids, Int64 or String [n].
        times: [n], microseconds if `calendar`, otherwise the file's numbers, int64 or float64; None if there is no
            timestamp column.
        calendar: whether the times are dates.
        weights: float32 [n], or None if there is no weight column.
        labels: float32 [n], or None if there is no usable label column.
        groups: group ids [n], or None if there is no usable group column.
        context: the unchanged context columns, with n rows; or None.
        empty_lists: number of file rows with an empty list of items.
        unusable: by field, the reason why an optional column could not be read.
    """

    queries: pl.Series
    items: pl.Series
    times: NDArray[Any] | None
    calendar: bool
    weights: NDArray[np.float32] | None
    labels: NDArray[np.float32] | None
    groups: pl.Series | None
    context: pl.DataFrame | None = None
    empty_lists: int = 0
    unusable: dict[str, str] = field(default_factory=dict)


def clean(
    frame: pl.DataFrame,
    columns: ColumnRoles,
    source: FileSource,
    context: Sequence[str] = (),
    optional: Collection[str] = (),
) -> CleanRows:
    """Validate one chunk of a source.

    Args:
        frame: the chunk.
        columns: the column of each role.
        source: the file; counts of changed values are added to the notes of the source.
        context: additional columns to pass through.
        optional: roles, "label" or "group", whose column is omitted if a value is unusable.

    Raises:
        InputError: an id is null, or an id, timestamp, weight, label or list is unusable; the message names file,
            column and row.
    """
    assert columns.query is not None
    assert columns.item is not None
    empty = 0
    if is_list(frame, columns.item):
        frame, empty = _explode(frame, columns, source, context)
    at = _Where(source, frame[ROW])
    if source.text:
        _refuse_repeated_header(frame, columns, at)
    calendar, times = False, None
    if columns.timestamp is not None:
        calendar, times = _times(frame[columns.timestamp], at)
    unusable: dict[str, str] = {}

    def usable(role: str, field_name: str, convert: Callable[[pl.Series, _Where, str], Any]) -> Any:
        column = getattr(columns, role)
        if column is None:
            return None
        try:
            return convert(frame[column], at, role)
        except InputError as error:
            if role not in optional:
                raise
            unusable[field_name] = str(error)
            return None

    return CleanRows(
        queries=_ids(frame[columns.query], at, "query"),
        items=_ids(frame[columns.item], at, "item"),
        times=times,
        calendar=calendar,
        weights=None if columns.weight is None else _weights(frame[columns.weight], at),
        labels=usable("label", "labels", lambda *given: _numbers(*given).astype(np.float32)),
        groups=usable("group", "groups", _ids),
        context=frame.select(context) if context else None,
        empty_lists=empty,
        unusable=unusable,
    )


def _refuse_repeated_header(frame: pl.DataFrame, columns: ColumnRoles, at: _Where) -> None:
    """Check that no row repeats the header, as after ``cat a.csv b.csv``; the column names would become ids.

    Raises:
        InputError: a row repeats the header.
    """
    same = pl.lit(True)
    for name in (columns.query, columns.item):
        if frame.schema[name or ""] != pl.String:
            return
        same &= pl.col(name or "").str.ends_with(name or "")  # the name may follow blanks or a byte order mark
    found = frame.select(ROW, columns.query or "", columns.item or "").filter(same)
    for row, query, item in found.iter_rows():
        if (query.strip(" \ufeff"), item.strip()) == (columns.query, columns.item):
            raise InputError(
                f"{at.source.name}: row {row} repeats the header; were files concatenated? Remove these lines, or "
                "put the files into a folder."
            )


def is_list(frame: pl.DataFrame, column: str) -> bool:
    """Return whether a column contains lists."""
    return isinstance(frame.schema[column], LISTS)


class _Where:
    """The row numbers of a chunk in its file, for error messages."""

    def __init__(self, source: FileSource, rows: pl.Series) -> None:
        self.source, self.rows = source, rows

    def error(self, column: str, position: int, found: str) -> InputError:
        return InputError(f"{self.source.name}: column {column!r}, row {self.rows[position]}: {found}")


def _first(mask: pl.Series) -> int:
    return int(mask.arg_true()[0])


def _ids(series: pl.Series, at: _Where, role: str) -> pl.Series:
    if series.null_count():
        raise at.error(series.name, _first(series.is_null()), f"empty {role} id; every row needs one.")
    typed = ids_of(series, f"{at.source.name}: column {series.name!r}")
    if typed.dtype != pl.String:
        return typed
    numbers = _canonical_integers(typed) if at.source.text else None
    if numbers is not None:
        return numbers
    stripped = typed.str.strip_chars()
    if at.source.text and stripped.head(_FIRST_ROWS).str.contains(_FLOAT).any():
        label = f"{role} ids written as floats"
        at.source.notes[label] = at.source.notes.get(label, 0) + int(stripped.str.contains(_FLOAT).sum())
    blank = stripped == ""
    if blank.any():
        raise at.error(series.name, _first(blank), f"blank {role} id; every row needs one.")
    changed = int((stripped != typed).sum())
    notes = at.source.notes
    zeros = typed.str.contains("\0", literal=True) if at.source.text else typed.is_null()
    if zeros.any():
        raise at.error(series.name, _first(zeros), f"zero bytes in the {role} id; is the file damaged?")
    if not at.source.text:
        if changed:
            notes["blanks kept around ids"] = notes.get("blanks kept around ids", 0) + changed
        return typed
    if "line breaks in fields" in notes:
        broken = stripped.str.contains("\n", literal=True)
        if broken.any():
            bad = _first(broken)
            raise at.error(
                series.name, bad, f"the {role} id {stripped[bad][:40]!r} has a line break; is a quotation mark missing?"
            )
    if not changed:
        return typed
    notes["blanks around ids"] = notes.get("blanks around ids", 0) + changed
    numbers = _canonical_integers(stripped)
    return stripped if numbers is None else numbers


#: Matches ids such as 12.0, or 1.23457E+12, which a spreadsheet has rounded. If one is among the first rows of a chunk,
#: all such ids of the chunk are counted.
_FLOAT = r"^\d+\.0$|^\d(\.\d+)?[eE]\+\d+$"
_FIRST_ROWS = 1000


def _canonical_integers(text: pl.Series) -> pl.Series | None:
    """Convert to Int64 if every text is the canonical form of an integer; "007" and "+7" stay text."""
    numbers = text.cast(pl.Int64, strict=False)
    if not numbers.null_count() and bool((numbers.cast(pl.String) == text).all()):
        return numbers
    return None


def _numbers(series: pl.Series, at: _Where, role: str) -> NDArray[np.float64]:
    if series.dtype not in (pl.String, pl.Null, pl.Boolean) and not series.dtype.is_numeric():
        raise InputError(f"{at.source.name}: column {series.name!r}: {role}s of type {series.dtype}; expected numbers.")
    text = series.str.strip_chars() if series.dtype == pl.String else series
    numbers = text.cast(pl.Float64, strict=False)
    good = numbers.is_finite().fill_null(False)
    if not good.all() and text.dtype == pl.String:
        words = text.str.to_lowercase().replace_strict({"true": 1.0, "false": 0.0}, default=None)
        numbers = numbers.zip_with(good, words)
        good = numbers.is_finite().fill_null(False)
    good &= numbers.abs() <= _LARGEST
    if not good.all():
        bad = _first(~good)
        raise at.error(series.name, bad, f"{role} {series[bad]!r}; expected a finite number.")
    return numbers.to_numpy()


def _weights(series: pl.Series, at: _Where) -> NDArray[np.float32]:
    weights = _numbers(series, at, "weight")
    negative = np.flatnonzero(weights < 0)
    if negative.size:
        bad = int(negative[0])
        raise at.error(series.name, bad, f"weight {series[bad]!r} is negative; weights must be 0 or more.")
    return weights.astype(np.float32)


def _times(series: pl.Series, at: _Where) -> tuple[bool, NDArray[Any]]:
    """Return whether the times are dates, and the times: int64 microseconds for dates, otherwise the file's numbers."""
    if series.null_count():
        raise at.error(
            series.name, _first(series.is_null()), "no timestamp; every row needs one, or leave out the column."
        )
    dtype = series.dtype
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        times = date_microseconds(
            series, lambda row, expected, found: at.error(series.name, row, f"timestamp {found}; expected {expected}.")
        )
        return True, times.to_numpy()
    if dtype == pl.String:
        return _text_times(series, at)
    if dtype.is_integer():
        try:
            return False, series.cast(pl.Int64).to_numpy()
        except pl.exceptions.InvalidOperationError:
            wrong = _first(series.cast(pl.Int64, strict=False).is_null())
            raise at.error(series.name, wrong, f"timestamp {series[wrong]}; expected unix time below 2^63.") from None
    if dtype.is_float() or dtype.is_decimal():
        return False, _float_times(series, at)
    raise InputError(
        f"{at.source.name}: column {series.name!r}: timestamps of type {dtype}; expected dates, ISO text or unix time."
    )


def _text_times(series: pl.Series, at: _Where) -> tuple[bool, NDArray[Any]]:
    whole = _integers(series)
    if whole is not None:
        return False, whole.to_numpy()
    first_is_number = series.head(1).str.strip_chars().cast(pl.Float64, strict=False).null_count() == 0
    return (False, _float_times(series, at)) if first_is_number else (True, _dates(series, at))


def _integers(text: pl.Series) -> pl.Series | None:
    """Convert text to Int64, ignoring blanks around the digits; None if a value is not an integer."""
    for values in (text, text.str.strip_chars()):
        numbers = values.cast(pl.Int64, strict=False)
        if not numbers.null_count():
            return numbers
        wrong = values[_first(numbers.is_null())]
        if wrong == wrong.strip():
            break
    return None


def _float_times(series: pl.Series, at: _Where) -> NDArray[Any]:
    text = series.str.strip_chars() if series.dtype == pl.String else series
    numbers = text.cast(pl.Float64, strict=False)
    good = numbers.is_finite().fill_null(False)
    if not good.all():
        bad = _first(~good)
        raise at.error(series.name, bad, f"timestamp {series[bad]!r}; expected unix time, as in other rows.")
    values: NDArray[np.float64] = numbers.to_numpy()
    return values


def _dates(series: pl.Series, at: _Where) -> NDArray[np.int64]:
    parsed = parse_dates(series)
    if parsed.null_count():
        bad = _first(parsed.is_null())
        raise at.error(
            series.name, bad, f"timestamp {series[bad]!r}; expected unix time or ISO text like 2024-05-31 17:05:00."
        )
    values: NDArray[np.int64] = parsed.to_numpy()
    return values


def _explode(
    frame: pl.DataFrame, columns: ColumnRoles, source: FileSource, context: Sequence[str]
) -> tuple[pl.DataFrame, int]:
    """Expand lists to one row per item, and other list columns in parallel; also return the number of empty lists."""
    assert columns.item is not None
    frame = frame.with_columns(
        pl.col(name).arr.to_list() for name in frame.columns if isinstance(frame.schema[name], pl.Array)
    )
    items = frame[columns.item]
    if items.null_count():
        row = frame[ROW][_first(items.is_null())]
        raise InputError(
            f"{source.name}: column {columns.item!r}, row {row}: null instead of a list of items; use an empty list."
        )
    names = list(dict.fromkeys([*columns.roles().values(), *context]))
    lists = [name for name in names if is_list(frame, name)]
    if columns.query in lists:
        raise InputError(f"{source.name}: column {columns.query!r}: lists of query ids; expected one id per row.")
    for name in lists:
        uneven = frame[name].list.len().ne_missing(items.list.len())
        if uneven.any():
            row = frame[ROW][_first(uneven)]
            raise InputError(
                f"{source.name}: column {name!r}, row {row}: the list is not as long as the list in {columns.item!r}."
            )
    full = frame.filter(items.list.len() > 0)
    return full.select(ROW, *names).explode(lists), len(frame) - len(full)
