"""Eligibility of items: an item may be offered to its groups (markets, languages) while it is available.

One rule governs the training rows, the candidates of a row, the rankings of an evaluation and the results of a served
model. The rule is computed from columns of the item table; this table is saved in the model folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.config.run import EligibilityConfig
from twotower.data.io.timestamps import date_microseconds, parse_dates, to_microseconds, unit_of
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import Vocabulary, listed
from twotower.errors import InputError

Mask = NDArray[np.bool_]
Times = NDArray[np.int64]

_LIMITS = np.iinfo(np.int64)
#: Maximum number of (group, item) pairs, one byte each.
MOST_PAIRS = 1 << 32
#: Separator of an item's groups in a text column.
SEPARATOR = "|"


@dataclass(frozen=True, eq=False)
class Eligibility:
    """The groups and the availability interval of every item.

    Item j is eligible in group g at time t if

        g is one of the groups of j,   and   available_from_j <= t < available_until_j.

    A null means no restriction: an item without groups is in every group, and an open end is never reached. An empty
    list of groups means no group. The stock is known only for the present: it limits the results of requests (`mask`),
    but not the items that are eligible for rows of the data or queries of an evaluation (`allows`, `rows`).

    Attributes:
        names: the vocabulary of the groups; None if items have no groups.
        member: bool [G, N], whether an item is in a group; None if items have no groups.
        start: int64 [N], first microsecond since 1970 at which an item is available; None if items have no interval.
        end: int64 [N], first microsecond at which it is no longer available; None if items have no interval.
        settings: the names of the columns of the rule.
        in_stock: bool [N], whether an item is in stock now; None if the stock is not known.
    """

    names: Vocabulary | None
    member: Mask | None
    start: Times | None
    end: Times | None
    settings: EligibilityConfig
    in_stock: Mask | None = None

    @classmethod
    def of_table(
        cls, settings: EligibilityConfig, table: pl.DataFrame | None, num_items: int, names: Vocabulary | None
    ) -> Eligibility:
        """Read the rule from the columns of an item table.

        Args:
            settings: the names of the columns.
            table: the item table, with one row for each item code; None if the data has no item table.
            num_items: N.
            names: the groups that a row or a request can have; None if `settings` has no column of groups.

        Raises:
            InputError: there is no table, a column does not exist or has the wrong type, a time cannot be read, the
                rule needs groups and `names` is None, or there are too many pairs of group and item.
        """
        if table is None:
            raise InputError("data.eligibility: the data has no item table; pass it with --items FILE (data.items)")
        member = start = end = in_stock = None
        if settings.item_groups is not None:
            if names is None:
                raise InputError("data.eligibility.item_groups: the rows have no groups")
            if len(names) * num_items > MOST_PAIRS:
                raise InputError(
                    f"data.eligibility.item_groups: {len(names):,} groups and {num_items:,} items; expected at most "
                    f"{MOST_PAIRS:,} pairs of group and item; use fewer, larger groups"
                )
            member = np.zeros((len(names), num_items), dtype=np.bool_)
            column = column_of(table, settings.item_groups, "item_groups")
            items, values = memberships(column)
            codes = names.encode(as_group_ids(values, names.ids.dtype, column.name))
            member[codes[codes >= 0], items[codes >= 0]] = True
            member[:, column.is_null().to_numpy()] = True
        if settings.has_interval:
            start = _times(table, settings.available_from, "available_from", _LIMITS.min, num_items)
            end = _times(table, settings.available_until, "available_until", _LIMITS.max, num_items)
        if settings.stock is not None:
            in_stock = _in_stock(column_of(table, settings.stock, "stock"))
        return cls(names if member is not None else None, member, start, end, settings, in_stock)

    @property
    def governs_rows(self) -> bool:
        """Whether the rule limits the items that are eligible for a row; a rule with only a stock column does not."""
        return self.member is not None or self.start is not None

    def allows(self, items: NDArray[Any], groups: NDArray[Any] | None, times: NDArray[Any] | None) -> Mask:
        """Return whether items are eligible in groups at times, bool; the arguments are broadcast."""
        shapes = [np.shape(one) for one in (items, groups, times) if one is not None]
        allowed = np.ones(np.broadcast_shapes(*shapes), dtype=np.bool_)
        if self.member is not None:
            allowed &= self.member[groups, items]
        if self.start is not None and self.end is not None:
            assert times is not None
            allowed &= (self.start[items] <= times) & (times < self.end[items])
        return allowed

    def mask(self, group: int | None, time: int | None) -> Mask:
        """Return which items may be returned for a request, bool [N]: eligible in its group at its time, and in stock.

        Args:
            group: code of the group; None if items have no groups.
            time: microseconds since 1970; None if items have no interval.
        """
        if not self.governs_rows:
            assert self.in_stock is not None
            return self.in_stock
        num_items = len(self.start) if self.start is not None else self._members().shape[1]
        mask = self.allows(np.arange(num_items), None if group is None else np.asarray(group), _scalar(time))
        return mask if self.in_stock is None else mask & self.in_stock

    def last_change(self, time: int) -> int:
        """Return the last time, at or before `time`, at which any item became available or unavailable.

        If there is none, the result is the smallest int64. Two times with the same result have the same eligible items.
        """
        at = int(np.searchsorted(self._changes, time, side="right"))
        return int(self._changes[at - 1]) if at else _LIMITS.min

    @cached_property
    def _changes(self) -> Times:
        """The distinct times at which an item becomes available or unavailable, ascending."""
        if self.start is None or self.end is None:
            return np.empty(0, dtype=np.int64)
        return np.unique(np.concatenate([self.start, self.end]))

    def select(self, items: NDArray[np.int64]) -> Eligibility:
        """Return the rule for some of the items, renumbered 0, 1, ..."""
        return replace(
            self,
            member=None if self.member is None else self.member[:, items],
            start=None if self.start is None else self.start[items],
            end=None if self.end is None else self.end[items],
            in_stock=None if self.in_stock is None else self.in_stock[items],
        )

    def rows(self, groups: NDArray[Any] | Tensor | None, times: NDArray[Any] | Tensor | None) -> EligibleRows:
        """Return the eligibility of all items for rows with these groups and times.

        Raises:
            InputError: the rule needs groups or times, but the rows have none.
        """
        if self.member is not None and groups is None:
            raise InputError(
                f"data.eligibility.item_groups: {self.settings.item_groups!r} needs the group of each row; name the "
                "column with data.columns.group, or with data.eligibility.query_group if it is in the query table"
            )
        if self.start is not None and times is None:
            raise InputError(
                "data.eligibility: available_from and available_until need the time of each row; name the column with "
                "data.columns.timestamp"
            )
        return EligibleRows(
            groups=None if self.member is None else _tensor(groups),
            times=None if self.start is None else _tensor(times),
            member=None if self.member is None else torch.from_numpy(self.member),
            start=None if self.start is None else torch.from_numpy(self.start),
            end=None if self.end is None else torch.from_numpy(self.end),
        )

    def code(self, group: Any) -> int:
        """Return the code of a group that a request names.

        Raises:
            InputError: the group is unknown.
        """
        assert self.names is not None
        if isinstance(group, bool) or not isinstance(group, str | int | np.integer):
            raise InputError(f"group: expected text or an integer, found {type(group).__name__}")
        try:
            code = int(self.names.encode([group])[0])
        except InputError:
            code = -1
        if code < 0:
            raise InputError(
                f"group: {str(group)[:80]!r} is not a group of this model; expected one of {self.known_groups()}"
            )
        return code

    def known_groups(self) -> str:
        """List the first 12 groups, for a message."""
        assert self.names is not None
        return listed([str(name) for name in self.names.ids.head(12).to_list()])

    def report(self, account: Account) -> None:
        """Add lines about the number of groups, and of items in every or no group, never available or out of stock."""
        if self.member is not None:
            counts = self.member.sum(0)
            account.add("groups", len(self.member), f"in {self.settings.item_groups}; each has its own eligible items")
            everywhere = counts == len(self.member)
            account.add("items in every group", int(everywhere.sum()), "including items whose groups are not given")
            account.add("items in no group", int((counts == 0).sum()), "never eligible")
        if self.start is not None and self.end is not None:
            account.add("items never available", int((self.start >= self.end).sum()), "their interval is empty")
        if self.in_stock is not None:
            account.add("items out of stock", int((~self.in_stock).sum()), "in training, but not recommended")

    def _members(self) -> Mask:
        assert self.member is not None
        return self.member


@dataclass(frozen=True, eq=False)
class EligibleRows:
    """Eligibility of M items, as columns, for B rows that each have a group and a time.

    Attributes:
        groups: int64 [B], the group code of each row; None if items have no groups.
        times: int64 [B], the time of each row in microseconds since 1970; None if items have no interval.
        member: bool [G, M], as in `Eligibility`; None if items have no groups.
        start, end: int64 [M], as in `Eligibility`; None if items have no interval.
    """

    groups: Tensor | None
    times: Tensor | None
    member: Tensor | None
    start: Tensor | None
    end: Tensor | None

    def blocked(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Return which of these items (columns) are not eligible for each of these rows, bool [rows, columns].

        No shape in the computation depends on the data, so an accelerator never waits for a size.
        """
        blocked: Tensor | None = None
        if self.member is not None and self.groups is not None:
            blocked = ~self.member[:, columns].index_select(0, self.groups[rows])
        if self.times is not None and self.start is not None and self.end is not None:
            times = self.times[rows, None]
            outside = (times < self.start[columns]) | (times >= self.end[columns])
            blocked = outside if blocked is None else blocked | outside
        assert blocked is not None
        return blocked

    def blocked_of_rows(self, items: Tensor) -> Tensor:
        """Return which of the items [B, R] are not eligible for their row, bool [B, R]; False for items below 0."""
        places = items.clamp(min=0)
        blocked = torch.zeros_like(items, dtype=torch.bool)
        if self.member is not None and self.groups is not None:
            blocked |= ~self.member[self.groups[:, None], places]
        if self.times is not None and self.start is not None and self.end is not None:
            times = self.times[:, None]
            blocked |= (times < self.start[places]) | (times >= self.end[places])
        return blocked & (items >= 0)

    def select(self, columns: Tensor) -> EligibleRows:
        """Return the same rows with only some of the items, given by their columns, int64 [M']."""
        return replace(
            self,
            member=None if self.member is None else self.member[:, columns],
            start=None if self.start is None else self.start[columns],
            end=None if self.end is None else self.end[columns],
        )

    def of_rows(self, rows: slice | Tensor) -> EligibleRows:
        """Return some of the rows with the same items."""
        return replace(
            self,
            groups=None if self.groups is None else self.groups[rows],
            times=None if self.times is None else self.times[rows],
        )

    def to(self, device: torch.device | str) -> EligibleRows:
        """Return a copy on another device."""
        names = ("groups", "times", "member", "start", "end")
        moved: dict[str, Any] = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **moved)


def column_of(table: pl.DataFrame, name: str, setting: str, where: str = "item table") -> pl.Series:
    """Return the column that a setting of `data.eligibility` names.

    Raises:
        InputError: the table has no such column.
    """
    if name not in table.columns:
        raise InputError(
            f"data.eligibility.{setting}: no column {name!r} in the {where}; columns found: {listed(table.columns)}"
        )
    return table[name]


def memberships(column: pl.Series) -> tuple[NDArray[np.int64], pl.Series]:
    """Return the item and the group of each membership: a cell may be a list, text with several groups, or one group.

    Raises:
        InputError: the values are neither text nor integers.
    """
    if column.dtype == pl.String:
        column = column.str.split(SEPARATOR)
    items, values = np.arange(len(column)), column
    if isinstance(column.dtype, pl.List):
        sizes = column.list.len().fill_null(0).cast(pl.Int64).to_numpy()
        items, values = np.repeat(items, sizes), column.filter(pl.Series(sizes > 0)).explode()
    if values.dtype == pl.String:
        values = values.str.strip_chars()
    elif values.dtype.is_integer():
        values = values.cast(pl.Int64)
    elif isinstance(values.dtype, pl.Categorical | pl.Enum):
        values = values.cast(pl.String)
    elif len(values):
        raise InputError(
            f"data.eligibility.item_groups: column {column.name!r} has values of type {values.dtype}; expected text, "
            f"integers, or lists of these (in text, several groups are separated by {SEPARATOR})"
        )
    known = values.is_not_null().to_numpy()
    if values.dtype == pl.String:
        known &= (values != "").fill_null(value=False).to_numpy()
    return items[known], values.filter(pl.Series(known))


def as_group_ids(values: pl.Series, dtype: Any, name: str) -> pl.Series:
    """Convert the groups of items, in the column `name`, to the type of the groups of rows.

    Raises:
        InputError: the groups of rows are integers and a value is not an integer.
    """
    if values.dtype == dtype:
        return values
    found = values.cast(dtype, strict=False)
    if found.null_count() > values.null_count():
        wrong = values.filter(found.is_null() & values.is_not_null())[0]
        raise InputError(
            f"data.eligibility.item_groups: column {name!r} has {wrong!r}, but the groups of the rows are integers; "
            "use one type for both"
        )
    return found


def _in_stock(column: pl.Series) -> Mask:
    """Return which items are in stock: true (also as text, because CSV files have no types), a number above 0, or null.

    Raises:
        InputError: the column contains NaN, or neither numbers nor true and false.
    """
    if column.dtype == pl.String:
        words = column.str.strip_chars().str.to_lowercase()
        found = words.replace_strict({"true": True, "false": False}, default=None, return_dtype=pl.Boolean)
        if found.null_count() == column.null_count():
            column = found
    if column.dtype != pl.Boolean and not column.dtype.is_numeric() and column.dtype != pl.Null:
        raise InputError(
            f"data.eligibility.stock: column {column.name!r} has values of type {column.dtype}; expected a number, or "
            "true and false"
        )
    if column.dtype.is_float() and column.is_nan().any():
        raise InputError(f"data.eligibility.stock: column {column.name!r} has NaN; leave unknown values empty")
    in_stock: Mask = (column.cast(pl.Float64).fill_null(1.0) > 0).to_numpy()
    return in_stock


def _times(table: pl.DataFrame, name: str | None, setting: str, missing: int, count: int) -> Times:
    """Read a column of times as microseconds since 1970; nulls become `missing`."""
    if name is None:
        return np.full(count, missing, dtype=np.int64)
    return times_of(column_of(table, name, setting), f"data.eligibility.{setting}: column {name!r}", missing)


def times_of(column: pl.Series, where: str, missing: int) -> Times:
    """Convert dates, ISO text or unix time to microseconds since 1970, int64; nulls become `missing`.

    Raises:
        InputError: a value is not a time.
    """
    dtype = column.dtype
    if dtype == pl.Null:
        return np.full(len(column), missing, dtype=np.int64)
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        times = date_microseconds(
            column, lambda row, expected, found: InputError(f"{where}, row {row + 1}: {found}; expected {expected}")
        )
    elif dtype == pl.String:
        times = parse_dates(column)
        if times.null_count() > column.null_count():
            wrong = column.filter(times.is_null() & column.is_not_null())[0]
            raise InputError(f"{where}: {wrong[:80]!r}; expected a date, ISO text or unix time")
    elif dtype.is_integer() or dtype.is_float():
        column = column.fill_nan(None) if dtype.is_float() else column
        known = column.drop_nulls().to_numpy()
        if not np.isfinite(known).all():
            raise InputError(f"{where}: an infinite number; expected a date, ISO text or unix time")
        found = np.full(len(column), missing, dtype=np.int64)
        if len(known):
            found[column.is_not_null().to_numpy()] = to_microseconds(known, unit_of(known, where))
        return found
    else:
        raise InputError(f"{where}: values of type {dtype}; expected dates, ISO text or unix time")
    return np.array(times.fill_null(missing))  # a writable copy, because torch warns about read-only arrays


def _tensor(values: NDArray[Any] | Tensor | None) -> Tensor | None:
    if values is None or isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _scalar(value: int | None) -> NDArray[np.int64] | None:
    return None if value is None else np.asarray(value, dtype=np.int64)
