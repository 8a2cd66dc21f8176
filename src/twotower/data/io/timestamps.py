"""Timestamps: units of numbers, dates in text, and account lines about times that are probably wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.schema.account import Account
from twotower.errors import InputError

DATE_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
MICROSECONDS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}
SECOND, YEAR = 1_000_000, 365 * 86_400 * 1_000_000

#: Smallest absolute value of each unit for times since 1973; smaller numbers, near 1970, fit every unit.
_BANDS = {"near 1970": 0.0, "seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}
#: Start and end, in seconds, of the year 9999, which means "never"; read as milliseconds, both would be about 1978.
_NEVER = (253_370_764_800, 253_402_300_800)
#: Values on both sides of a limit in `_BANDS` have different units if they differ by more than this factor; otherwise
#: all have the larger unit.
_GAP = 30.0
#: Number of digits of dates written as one number: 20240131, or with the hour, minute and second added in turn.
_DIGITS = (8, 10, 12, 14)
#: Microseconds per polars time unit; nanoseconds are divided by 1,000 instead.
_PER_UNIT = {"d": 86_400 * SECOND, "ms": 1_000, "us": 1}
_SAMPLE = 1_000_000
_FAR_YEARS = 20


def never(values: NDArray[Any]) -> NDArray[np.int64]:
    """Convert values in the year 9999, in any unit, to microseconds; return 0 for all other values."""
    found = np.zeros(len(values), dtype=np.int64)
    if not len(values) or float(values.max()) < _NEVER[0]:
        return found
    for scale in MICROSECONDS.values():
        per_second = SECOND // scale
        inside = (values >= _NEVER[0] * per_second) & (values < _NEVER[1] * per_second)
        found[inside] = np.asarray(values[inside], dtype=np.int64) * scale
    return found


def _compact(values: NDArray[np.int64], digits: int) -> tuple[NDArray[np.int64], bool]:
    """Convert numbers such as 20240131 to microseconds; also return whether all numbers are dates."""
    rest = np.asarray(values, dtype=np.int64)
    parts: list[NDArray[np.int64]] = []
    for _ in range((digits - 4) // 2):
        rest, part = np.divmod(rest, 100)
        parts.append(part)
    parts.reverse()
    month, day = parts[0], parts[1]
    clock = [*parts[2:], *[np.zeros_like(rest)] * 3][:3]
    years = ((rest >= 1900) & (rest <= 2100)) | (rest == 9999)
    if not bool((years & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all()):
        return rest, False
    if any(bool((part >= limit).any()) for part, limit in zip(clock, (24, 60, 60), strict=True)):
        return rest, False
    months = (rest - 1970) * 12 + (month - 1)
    days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + day - 1
    same = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) == months
    seconds = days * 86_400 + clock[0] * 3600 + clock[1] * 60 + clock[2]
    return seconds * SECOND, bool(same.all())


def _digits_of(values: NDArray[Any]) -> int:
    """Return 8, 10, 12 or 14 if all values are dates written with this number of digits; otherwise 0."""
    if not len(values) or values.dtype.kind != "i":
        return 0
    low, high = int(values.min()), int(values.max())
    for digits in _DIGITS:
        power = 10 ** (digits - 4)
        if 1900 * power <= low and high < 10_000 * power:
            return digits if _compact(values, digits)[1] else 0
    return 0


@dataclass
class TimeUnits:
    """The magnitudes of numeric timestamps, from which the unit is inferred after reading.

    Attributes:
        bands: count, smallest and largest absolute value of the values in the range of each unit.
        digits: the results of `_digits_of` for the chunks read so far.
    """

    bands: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    digits: set[int] = field(default_factory=set)

    def add(self, values: NDArray[Any]) -> None:
        """Add the values of one chunk."""
        if not len(values):
            return
        self.digits.add(_digits_of(values))
        sizes = np.abs(values.astype(np.float64))
        low, high = float(sizes.min()), float(sizes.max())
        limits = [*_BANDS.values(), np.inf]
        if high >= _NEVER[0]:
            sizes = sizes[never(values) == 0]
        for name, start, end in zip(_BANDS, limits[:-1], limits[1:], strict=True):
            if low >= end or high < start or not len(sizes):
                continue
            inside = sizes if start <= low and high < end else sizes[(sizes >= start) & (sizes < end)]
            if len(inside):
                self._merge(name, (len(inside), float(inside.min()), float(inside.max())))

    def _merge(self, name: str, band: tuple[int, float, float]) -> None:
        count, low, high = self.bands.get(name, (0, np.inf, 0.0))
        self.bands[name] = count + band[0], min(low, band[1]), max(high, band[2])

    def join(self, state: Mapping[str, Any]) -> None:
        """Add the state of another object, as returned by `to_dict`."""
        self.digits |= set(state["digits"])
        for name, band in state["bands"].items():
            self._merge(name, tuple(band))

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values for `join`."""
        return {"bands": {name: list(band) for name, band in self.bands.items()}, "digits": sorted(self.digits)}

    def unit(self, where: str) -> str:
        """Infer the unit: "seconds", "milliseconds", "microseconds", or "dates of N digits".

        Raises:
            InputError: the values have different units, or are too large for microseconds.
        """
        if len(self.digits) == 1 and (digits := next(iter(self.digits))):
            return f"dates of {digits} digits"
        units = [name for name in _BANDS if name in self.bands and name != "near 1970"]
        if len(self.digits - {0}) and len(self.digits) > 1 and "near 1970" in self.bands and units:
            raise InputError(
                f"{where}: timestamps such as {self.bands['near 1970'][1]:.0f} and {self.bands[units[0]][1]:.0f}: "
                "some look like dates written as numbers, others like unix time. Write all in one format."
            )
        if "nanoseconds" in units:
            raise InputError(
                f"{where}: timestamps up to {self.bands['nanoseconds'][2]:.3g}; expected unix seconds, milliseconds or "
                "microseconds. Divide nanoseconds by 1000."
            )
        for lower, upper in pairwise(units):
            if self.bands[upper][1] > _GAP * self.bands[lower][2]:
                raise InputError(
                    f"{where}: timestamps in two units: {self.bands[lower][0]:,} rows look like {lower}, such as "
                    f"{self.bands[lower][2]:.0f}, and {self.bands[upper][0]:,} like {upper}, such as "
                    f"{self.bands[upper][1]:.0f}; write all in one unit."
                )
        return units[-1] if units else "seconds"


def to_microseconds(values: NDArray[Any], unit: str) -> NDArray[np.int64]:
    """Convert numeric timestamps to microseconds since 1970; `unit` is the result of `TimeUnits.unit`."""
    if unit.startswith("dates of"):
        return _compact(values, int(unit.split()[2]))[0]
    scale = MICROSECONDS[unit]
    if values.dtype == np.int64:
        times: NDArray[np.int64] = values * np.int64(scale)
    else:
        times = np.asarray(np.rint(values * float(scale)), dtype=np.int64)
    if len(values) and float(values.max()) >= _NEVER[0]:
        ends = never(values)
        times = np.where(ends > 0, ends, times)
    return times


def unit_of(values: NDArray[Any], where: str) -> str:
    """Infer the unit of numeric timestamps without nulls: "seconds", "milliseconds" or "microseconds".

    Raises:
        InputError: the values have different units, or are too large for microseconds.
    """
    units = TimeUnits()
    units.add(values.astype(np.float64))
    return units.unit(where)


def parse_dates(series: pl.Series) -> pl.Series:
    """Parse dates in text, with or without a time zone, to Int64 microseconds; null where the text is not a date.

    Accepted formats are ISO 8601 with ``-``, ``/`` or ``.`` between year, month and day (in this order), ``T`` or a
    blank before the time, and an offset, ``Z``, ``UTC`` or ``GMT`` after the time.
    """
    text = series.str.strip_chars()
    spaced = text.str.replace(r"(\d)T(\d)", "${1} ${2}")
    parsed = _parse_plain(spaced)
    missing = parsed.is_null() & text.is_not_null()
    if missing.any():
        form = r"^(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})"
        other = spaced.filter(missing).str.replace(r"\s*(Z|UTC|GMT)$", "").str.replace(form, "${1}-${2}-${3}")
        parsed = parsed.scatter(missing.arg_true(), _parse_plain(other))
    return parsed


def _parse_plain(spaced: pl.Series) -> pl.Series:
    zoned = spaced.str.strptime(pl.Datetime("us", "UTC"), "%Y-%m-%d %H:%M:%S%.f%#z", strict=False)
    parsed = zoned.to_physical()
    for form in DATE_FORMATS:
        if not parsed.null_count():
            break
        kind = pl.Date if form == "%Y-%m-%d" else pl.Datetime("us")
        naive = spaced.str.strptime(kind, form, strict=False).cast(pl.Datetime("us")).to_physical()
        parsed = parsed.zip_with(parsed.is_not_null(), naive)
    return parsed


def date_microseconds(dates: pl.Series, error: Callable[[int, str, str], InputError]) -> pl.Series:
    """Convert dates or times to microseconds since 1970, Int64; null where missing.

    Args:
        dates: a column of type Date or Datetime.
        error: function that builds the error from a position, the expected value and the value found.

    Raises:
        InputError: a value is too large for microseconds; polars itself would fail an assertion.
    """
    values = dates.to_physical().cast(pl.Int64)
    unit: str = "d" if dates.dtype == pl.Date else dates.dtype.time_unit  # type: ignore[attr-defined]
    if unit == "ns":
        return values // 1_000
    outside = values.cast(pl.Float64).abs() * _PER_UNIT[unit] >= 2.0**63
    if outside.any():
        at = int(outside.arg_true()[0])
        raise error(at, "a date before the year 290,000", f"{values[at]} {unit} since 1970")
    return values * _PER_UNIT[unit]


def utc(microseconds: int) -> str:
    """Format a time in UTC, even if `datetime` does not support the year."""
    try:
        return datetime.fromtimestamp(microseconds // SECOND, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(np.datetime64(microseconds, "us").astype("datetime64[s]"))


def report_times(times: NDArray[np.int64], unit: str | None, units: TimeUnits, column: str, account: Account) -> None:
    """Add lines to the account about the first and last times, and about times that are probably wrong.

    Args:
        times: int64 [n] microseconds.
        unit: unit of the numbers; None if the column contains dates.
        units: magnitudes of the numbers.
        column: name of the column.
        account: receives the lines.
    """
    first, last = int(times.min()), int(times.max())
    how = "" if unit is None else f", {unit}" if unit.startswith("dates") else f", unix {unit}"
    account.add("time range", None, f"{utc(first)} to {utc(last)} (UTC{how})")
    middle = int(np.median(times[:: max(len(times) // _SAMPLE, 1)]))
    early = far = future = 0
    farthest, now = middle, int(datetime.now(tz=UTC).timestamp()) * SECOND
    if first < YEAR or last > now or max(last - middle, middle - first) > _FAR_YEARS * YEAR:
        for start in range(0, len(times), _SAMPLE):
            part = np.asarray(times[start : start + _SAMPLE])
            near = (part >= 0) & (part < YEAR)
            away = (np.abs(part - middle) > _FAR_YEARS * YEAR) & ~near
            early, far = early + int(near.sum()), far + int(away.sum())
            future += int((part > now + 86_400 * SECOND).sum())
            if away.any():
                far_part = part[away]
                most = int(far_part[np.argmax(np.abs(far_part - middle))])
                farthest = most if abs(most - middle) > abs(farthest - middle) else farthest
    if early:
        account.add("timestamps in 1970", early, _hint(unit, units, column))
    if far:
        account.add(
            "timestamps years apart", far,
            f"more than {_FAR_YEARS} years from the median {utc(middle)[:10]}, such as {utc(farthest)}; placeholders?",
        )  # fmt: skip
    if future:
        account.add("timestamps in the future", future, f"up to {utc(last)}")


def _hint(unit: str | None, units: TimeUnits, column: str) -> str:
    """Suggest what numbers near zero may be, if not unix time."""
    _, low, high = units.bands.get("near 1970", (0, 0.0, 0.0))
    if unit is None or unit.startswith("dates") or "near 1970" not in units.bands:
        return "placeholders for a missing time?"
    read = f"{column} {high:.0f} read as unix {unit} is {utc(int(to_microseconds(np.array([high]), unit)[0]))[:10]}"
    if set(units.bands) != {"near 1970"}:
        return f"{read}; the other rows are later: placeholders for a missing time?"
    for what, least, most, advice in (
        ("days of a month", 1, 31, "write complete dates, such as 2024-01-31"),
        ("days of a year", 1, 366, "write complete dates, such as 2024-01-31"),
        ("years", 1900, 2100, "write dates, such as 2024-01-31"),
        ("serial dates of a spreadsheet, or days since 1970", 10_000, 80_000, "write dates, such as 2024-01-31"),
        ("months", 190_001, 210_012, "write dates, such as 2024-01-31"),
        ("dates", 19_000_101, 99_991_231, "write them as 2024-01-31"),
    ):
        if least <= low and high <= most:
            return f"{read}; these look like {what}: {advice}"
    return f"{read}; write dates or unix time, or data.columns.timestamp=none if only the order is known"
