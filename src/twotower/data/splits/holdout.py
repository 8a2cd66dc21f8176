"""`Holdout`: the queries of an evaluation, with their histories and targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.eligibility import Eligibility, EligibleRows
from twotower.data.interactions import EventColumn, Interactions
from twotower.data.loading.histories import take_ranges
from twotower.data.schema.account import Account
from twotower.errors import InputError, counted


@dataclass(frozen=True, eq=False)
class Holdout:
    """The histories and targets of held-out queries, as ragged arrays (values and offsets).

    Attributes:
        name: name in reports.
        queries: int64 [E], codes in the query vocabulary, ascending; if rows have event types or texts, a query occurs
            once for each type and text of its held-out rows.
        history_offsets: int64 [E+1], the offsets of each query's history in `history_items`.
        history_items: int32, the items of all histories, oldest first; only items before the first target.
        target_offsets: int64 [E+1], the offsets of each query's targets in `target_items`.
        target_items: int32, the targets of all queries, without duplicates within a query, oldest first.
        history_timestamps: int64 microseconds, parallel to `history_items`, or None.
        query_times: int64 [E] microseconds, the time of the first target of each query, or None.
        context: the context of each query, from the row of its first target, or None.
        query_groups: int64 [E], the group of each query, from the row of its first target, or None.
        eligibility: the rule for the items that may be ranked, or None for all items.
        event: the context column with the event type that is requested for each query, or None.
        query_text: the context column with the text of each query, or None.
        history_events: the event type of each of `history_items`, categorical, or None.
    """

    name: str
    queries: NDArray[np.int64]
    history_offsets: NDArray[np.int64]
    history_items: NDArray[np.int32]
    target_offsets: NDArray[np.int64]
    target_items: NDArray[np.int32]
    history_timestamps: NDArray[np.int64] | None = None
    query_times: NDArray[np.int64] | None = None
    context: pl.DataFrame | None = None
    query_groups: NDArray[np.int64] | None = None
    eligibility: Eligibility | None = None
    event: str | None = None
    query_text: str | None = None
    history_events: pl.Series | None = None

    @property
    def eligible(self) -> EligibleRows | None:
        """The items that may be ranked for each query, given its group and time; None for all items.

        Raises:
            InputError: the rule needs groups or times, but the queries have none.
        """
        if self.eligibility is None or not self.eligibility.governs_rows:
            return None
        return self.eligibility.rows(self.query_groups, self.query_times)

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return f"Holdout({self.name!r}, {len(self):,} queries, {len(self.target_items):,} targets)"

    @classmethod
    def empty(cls, name: str) -> Holdout:
        """Create a holdout without queries, for a split without this part."""
        zero, none = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32)
        return cls(name, none.astype(np.int64), zero, none, zero, none)


@dataclass(frozen=True)
class Window:
    """The rows of a holdout, as arrays of row numbers [Q], one entry per query.

    Attributes:
        history_end: the query's rows before this row are its history.
        start: the first row that may be a target.
        end: one past the last row that may be a target.
    """

    history_end: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]


def count_training(train: Interactions, account: Account) -> None:
    """Add the training rows, and how many queries have any, to the account of a split."""
    queries = int((np.diff(train.offsets) > 0).sum())
    account.add("training rows", len(train), f"of {counted(queries, 'query', 'queries')}")


def make_holdout(
    data: Interactions,
    name: str,
    window: Window,
    account: Account,
    *,
    known_items: NDArray[np.bool_] | None = None,
    known_queries: NDArray[np.bool_] | None = None,
) -> Holdout:
    """Build the holdout of a window of rows, and add its lines to the account.

    If rows have event types or texts, a query becomes one query per type and text, each with its own targets.

    Args:
        data: the interactions, oldest first within a query.
        name: name of the holdout.
        window: the rows of the holdout.
        account: receives the lines about rows held out and dropped.
        known_items: bool [N]; targets whose item is not known are cold and dropped. None keeps all targets.
        known_queries: bool [Q]; queries that are not known are cold and dropped. None keeps all queries.

    Raises:
        InputError: no query is left.
    """
    queries = np.flatnonzero(window.end > window.start)
    rows_before = int((window.end - window.start)[queries].sum())
    account.add(f"{name}: rows held out", rows_before, f"of {counted(len(queries), 'query', 'queries')}")
    if known_queries is not None:
        known = known_queries[queries]
        lost = int((window.end - window.start)[queries[~known]].sum())
        account.add(
            f"{name}: cold queries", int((~known).sum()), f"no usable earlier rows, dropped with {counted(lost, 'row')}"
        )
        queries = queries[known]
    rows, offsets = take_ranges(window.start[queries], window.end[queries])
    owner = np.repeat(np.arange(len(queries)), np.diff(offsets))
    items = np.asarray(data.item_codes[rows])
    if data.event is not None:
        types = _types(data, data.event, rows)
        account.add(f"{name}: rows of other events", int((types < 0).sum()), "their type is not data.events.held_out")
        rows, owner, items = rows[types >= 0], owner[types >= 0], items[types >= 0]
        types = types[types >= 0]
        rows, owner, items, queries = _divided(rows, owner, items, queries, by=types)
    if data.query_text is not None:
        assert data.context is not None
        texts = data.context[data.query_text][rows].rank("dense").fill_null(0).cast(pl.Int64).to_numpy()
        rows, owner, items, queries = _divided(rows, owner, items, queries, by=texts)
    if known_items is not None:
        warm = known_items[items]
        account.add(f"{name}: cold items", int((~warm).sum()), "rows whose item is not in training, dropped")
        rows, owner, items = rows[warm], owner[warm], items[warm]
    if data.eligibility is not None:
        fits = _askable(data, data.eligibility, rows, owner)
        account.add(f"{name}: targets not eligible", int((~fits).sum()), "for their query's group or time, dropped")
        rows, owner, items = rows[fits], owner[fits], items[fits]
    _, first = np.unique(owner * data.num_items + items, return_index=True)
    first.sort()
    if len(first) < len(rows):
        account.add(f"{name}: repeated targets", len(rows) - len(first), "an item counts once for a query")
    rows, owner, items = rows[first], owner[first], items[first]
    sizes = np.bincount(owner, minlength=len(queries))
    if bool((sizes == 0).any()):
        account.add(f"{name}: queries without targets", int((sizes == 0).sum()), "no target left, dropped")
    queries, sizes = queries[sizes > 0], sizes[sizes > 0]
    if not len(queries):
        raise InputError(
            f"split: {name} is empty (of {rows_before:,} rows held out, none is left after dropping cold queries, cold "
            f"items and targets that are not eligible); use a larger data.{name}, another data.split, or more data (in "
            "Python, cold='keep' keeps cold queries and items)."
        )
    history_rows, history_offsets = take_ranges(data.offsets[queries], window.history_end[queries])
    target_offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    account.add(f"{name}: targets", len(items), f"of {counted(len(queries), 'query', 'queries')}")
    times = data.timestamps
    return Holdout(
        name=name,
        queries=queries.astype(np.int64),
        history_offsets=history_offsets,
        history_items=np.asarray(data.item_codes[history_rows]),
        target_offsets=target_offsets,
        target_items=items,
        history_timestamps=None if times is None else np.asarray(times[history_rows]),
        query_times=None if times is None else np.asarray(times[rows[target_offsets[:-1]]]),
        context=None if data.context is None else data.context[rows[target_offsets[:-1]]],
        query_groups=None
        if data.groups is None
        else np.asarray(data.groups, dtype=np.int64)[rows[target_offsets[:-1]]],
        eligibility=data.eligibility,
        event=None if data.event is None else data.event.column,
        query_text=data.query_text,
        history_events=data.event_types(history_rows),
    )


def _divided(
    rows: NDArray[np.int64],
    owner: NDArray[np.int64],
    items: NDArray[np.int32],
    queries: NDArray[np.int64],
    *,
    by: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Split each query into one query per value, in the order of the values.

    Args:
        rows: the row of each target.
        items: the item of each target.
        owner: the query of each target, as a position in `queries`.
        queries: the query codes.
        by: the value of each target, 0 or more.

    Returns:
        `rows`, `owner`, `items` and `queries` for the new queries, in their order.
    """
    width = int(by.max(initial=0)) + 1
    keys, owner = np.unique(owner * width + by, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    return rows[order], owner[order], items[order], queries[keys // width]


def _askable(
    data: Interactions, rule: Eligibility, rows: NDArray[np.int64], owner: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which targets are in the group of their query's first target and eligible at its time, bool [n].

    Args:
        data: the interactions.
        rule: the eligibility rule of the interactions.
        rows: the row of each target.
        owner: the query of each target, ascending.
    """
    firsts = rows[np.searchsorted(owner, owner)]
    groups = times = None
    fits = np.ones(len(rows), dtype=np.bool_)
    if rule.member is not None and data.groups is not None:
        groups = np.asarray(data.groups)[firsts]
        fits &= np.asarray(data.groups)[rows] == groups
    if rule.start is not None and data.timestamps is not None:
        times = np.asarray(data.timestamps)[firsts]
    return fits & rule.allows(np.asarray(data.item_codes)[rows], groups, times)


def _types(data: Interactions, event: EventColumn, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a code for the event type of each row, in the order of the names; -1 for a type that is not held out."""
    assert data.context is not None
    types = data.context[event.column][rows]
    names = pl.Series([event.held_out]) if event.held_out is not None else types.unique().sort()
    codes = dict(zip(names.to_list(), range(len(names)), strict=True))
    found: NDArray[np.int64] = types.replace_strict(codes, default=-1, return_dtype=pl.Int64).to_numpy()
    return found
