"""Protocols that split data into training, validation and test, with an account of the rows dropped and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.interactions import Interactions
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import listed
from twotower.data.splits.holdout import Holdout, Window, count_training, make_holdout
from twotower.data.splits.row_order import in_order, sorted_by_item, without_item_order
from twotower.errors import InputError

ValidationQueries = int | float | str | Sequence[Any] | pl.Series | NDArray[Any] | None


def rows_before(data: Interactions, cut: int) -> NDArray[np.int64]:
    """Count the rows of each query before a timestamp, int64 [Q]."""
    assert data.timestamps is not None
    earlier = np.flatnonzero(np.asarray(data.timestamps) < cut)
    return np.diff(np.searchsorted(earlier, data.offsets)).astype(np.int64)


def training_rows(data: Interactions, ends: NDArray[np.int64], account: Account) -> Interactions:
    """Select each query's rows before a row number, given for each query in `ends` [Q].

    Raises:
        InputError: no rows are left.
    """
    steps = np.zeros(len(data) + 1, dtype=np.int8)  # +1 where a query's training rows begin, -1 after their end
    np.add.at(steps, data.offsets[:-1], 1)
    np.add.at(steps, ends, -1)
    mask = np.cumsum(steps[:-1], dtype=np.int8).astype(bool)
    del steps
    if not mask.any():
        raise InputError("split: training is empty; lower data.validation and data.test.")
    train = data.select(mask)
    count_training(train, account)
    return train


def training_negatives(
    data: Interactions, account: Account, *, before: int | None = None, train_end: NDArray[np.int64] | None = None
) -> Interactions | None:
    """Select the observed negatives for training: those before a time, or before the held-out rows of their query.

    Without `before`, a query without held-out rows keeps all of its negatives, and a query with held-out rows keeps
    none if it has no training rows, or if the interactions or negatives have no timestamps.

    Args:
        data: the interactions.
        account: receives a line with the numbers of negatives kept and dropped.
        before: the time, used if the negatives have timestamps.
        train_end: int64 [Q], one past the last training row of each query; needed without `before` or without
            timestamps of the negatives.
    """
    below = data.negatives
    if below is None:
        return None
    if before is not None and below.timestamps is not None:
        mask = np.asarray(below.timestamps) < before
    else:
        assert train_end is not None
        complete = train_end == data.offsets[1:]
        mask = complete[below.query_codes()]
        if data.timestamps is not None and below.timestamps is not None:
            # A query with held-out rows keeps the negatives before the first of them, if it has training rows.
            partly = ~complete & (train_end > data.offsets[:-1])
            cut = np.full(data.num_queries, np.iinfo(np.int64).min)
            cut[partly] = np.asarray(data.timestamps[train_end[partly]])
            mask |= np.asarray(below.timestamps) < cut[below.query_codes()]
    kept = below.select(mask)
    account.add("training negatives", len(kept), f"{len(below) - len(kept):,} dropped, held out or later")
    return kept if len(kept) else None


def validation_queries_of(
    data: Interactions, setting: ValidationQueries, eligible: NDArray[np.bool_], seed: int
) -> NDArray[np.bool_]:
    """Choose the queries whose second-to-last item is the validation target, bool [Q].

    Raises:
        InputError: the setting does not fit the data.
    """
    if setting is None:
        return eligible.copy()
    chosen = np.zeros(data.num_queries, dtype=bool)
    if isinstance(setting, str):
        table = data.query_table
        if table is None or setting not in table.columns or table.schema[setting] != pl.Boolean:
            found = listed([c for c in table.columns if table.schema[c] == pl.Boolean]) if table is not None else "none"
            raise InputError(
                f"split: validation_queries={setting!r} is not a boolean column of the query table; its boolean "
                f"columns: {found}."
            )
        chosen[table[setting].fill_null(False).to_numpy()] = True
    elif isinstance(setting, int | float):
        able = np.flatnonzero(eligible)
        count = round(setting * len(able)) if isinstance(setting, float) and setting < 1 else int(setting)
        if not 0 <= count <= len(able):
            raise InputError(f"split: validation_queries={setting}; {len(able):,} queries have 3 interactions or more.")
        chosen[np.random.default_rng(seed).choice(able, size=count, replace=False)] = True
    else:
        codes = data.queries.encode(setting)
        if (codes < 0).any():
            unknown = pl.Series("id", setting)[int(np.flatnonzero(codes < 0)[0])]
            raise InputError(f"split: validation_queries: query {unknown!r} is not in the data.")
        chosen[codes] = True
    return chosen & eligible


Cold = Literal["drop", "keep"]


@dataclass(frozen=True, eq=False)
class Split:
    """Training rows, validation holdout and test holdout.

    Attributes:
        train: the rows to train on, with the vocabularies of all the data.
        validation: holdout for model selection; empty for a split without validation.
        test: holdout for the final evaluation.
        account: the numbers of rows dropped, with the reasons.
        name: name of the protocol.
        settings: the protocol's arguments as JSON values.
        data: all interactions, which provide the histories of a model in production.
    """

    train: Interactions
    validation: Holdout
    test: Holdout
    account: Account
    name: str
    settings: dict[str, Any]
    data: Interactions

    def __repr__(self) -> str:
        return f"Split({self.name}, train={self.train!r}, validation={self.validation!r}, test={self.test!r})"


def by_time(
    data: Interactions,
    validation: float = 0.05,
    test: float = 0.1,
    *,
    cold: Cold = "drop",
    histories: bool = False,
    new_queries: bool = False,
) -> Split:
    """Split at two timestamps, the same for all queries: train on the past, predict the future.

    The last `test` fraction of all interactions is the test part, and the `validation` fraction before it is the
    validation part. Rows exactly at a cut belong to the later part. The history of a held-out query is all of its rows
    before the cut at which its part begins.

    Args:
        data: interactions with timestamps.
        validation: fraction of the rows, 0 for no validation.
        test: fraction of the rows, above 0.
        cold: "drop" targets whose item has no training row and queries without a training row, or "keep" them.
        histories: with cold="drop", keep test queries that have no training row but have validation rows as their
            history. For models that read histories.
        new_queries: with cold="drop", keep all queries without a training row. For queries that are texts.

    Raises:
        InputError: there are no timestamps, a fraction is invalid, or a part is empty.
    """
    _check_shares(validation, test, cold)
    times = data.timestamps
    if times is None:
        raise InputError(
            "split by time: the data has no timestamps; name the column with data.columns.timestamp, or use "
            "data.split=random, or data.split=leave-last-out if the rows of each query are in time order."
        )
    first_cut, second_cut = _quantiles(times, [1 - test - validation, 1 - test])
    if int(np.min(times)) == int(np.max(times)):
        raise InputError(
            f"split by time: every row has the same timestamp, {_utc(first_cut)}, so no row is before another; use "
            "data.split=random, or data.split=leave-last-out if the rows of each query are in time order."
        )
    settings = {"validation": validation, "test": test, "cold": cold, "histories": histories}
    if new_queries:
        settings["new_queries"] = True
    return _split_at(data, first_cut, second_cut, settings)


def rolling(
    data: Interactions,
    validation: float = 0.05,
    test: float = 0.1,
    *,
    windows: int = 3,
    cold: Cold = "drop",
    histories: bool = False,
    new_queries: bool = False,
) -> Iterator[Split]:
    """Split at consecutive test windows, oldest first; the last split equals the result of `by_time`.

    Each window has a fraction `test` of all rows. Its split contains no rows after the window. The validation part is a
    fraction `validation` of all rows, directly before the window, and the training rows are all earlier rows.

    Args:
        data: interactions with timestamps.
        validation: fraction of all rows, 0 for no validation.
        test: fraction of all rows in each window, above 0.
        windows: number of windows.
        cold: see `by_time`.
        histories: see `by_time`.
        new_queries: see `by_time`.

    Yields:
        A split for each window. The data of every window except the last is a copy of the rows before its end.

    Raises:
        InputError: see `by_time`; or the windows leave no rows for training.
    """
    if windows < 1 or validation + windows * test >= 1:
        raise InputError(
            f"split: {windows} windows of data.test={test}, and data.validation={validation}; expected at least 1 "
            "window, and a sum below 1, so that the first window has training rows."
        )
    whole = by_time(data, validation, test, cold=cold, histories=histories, new_queries=new_queries)
    times = data.timestamps
    assert times is not None
    for window in range(1, windows):
        later = (windows - window) * test
        cuts = _quantiles(times, [1 - later - test - validation, 1 - later - test, 1 - later])
        yield _split_at(data.select(np.asarray(times) < cuts[2]), cuts[0], cuts[1], whole.settings)
    yield whole


def _quantiles(times: NDArray[np.int64], shares: Sequence[float]) -> list[int]:
    """Return, for each share, the time before which this share of the rows lies."""
    at = [min(len(times) - 1, round(len(times) * share)) for share in shares]
    ordered = np.partition(times, at)
    return [int(ordered[place]) for place in at]


def _split_at(data: Interactions, first_cut: int, second_cut: int, settings: dict[str, Any]) -> Split:
    """Split at two timestamps: validation from the first, test from the second; `settings` as in `by_time`."""
    validation, cold, histories = settings["validation"], settings["cold"], settings["histories"]
    before_first, before_second = rows_before(data, first_cut), rows_before(data, second_cut)
    account = Account()
    account.add("split by time", len(data), f"validation from {_utc(first_cut)}, test from {_utc(second_cut)}")
    train = training_rows(data, data.offsets[:-1] + before_first, account)
    train = replace(train, negatives=training_negatives(data, account, before=first_cut))
    known_items = train.item_counts() > 0 if cold == "drop" else None
    known = {"validation": before_first > 0, "test": (before_second if histories else before_first) > 0}
    drops_new = cold == "drop" and not settings.get("new_queries")
    starts = data.offsets[:-1]
    windows = {
        "validation": Window(starts + before_first, starts + before_first, starts + before_second),
        "test": Window(starts + before_second, starts + before_second, data.offsets[1:]),
    }
    if validation and first_cut == second_cut:
        raise InputError(
            f"split by time: validation is empty, because too many rows have the timestamp {_utc(first_cut)}; "
            "use a larger data.validation, or data.split=random."
        )
    made = {
        name: make_holdout(
            data, name, window, account, known_items=known_items, known_queries=known[name] if drops_new else None
        )
        for name, window in windows.items()
        if name == "test" or validation
    }
    if cold == "drop" and (histories or not drops_new):
        new = before_first[made["test"].queries] == 0
        account.add(
            "test: queries without training rows",
            int(new.sum()),
            "kept, their history is in the validation rows" if drops_new else "kept, known by their text",
        )
    settings = {**settings, "cuts": [first_cut, second_cut]}
    return _split("by_time", train, made=made, account=account, settings=settings, data=data)


def leave_last_out(
    data: Interactions, validation_queries: ValidationQueries = None, *, cold: Cold = "keep", seed: int = 0
) -> Split:
    """Hold out the last item of every query for the test, and the second-to-last for validation.

    Much published work uses this protocol; it is provided for comparison. Training rows can be later than the test rows
    of other queries; `by_time` has no such leak. Queries with fewer than 3 interactions stay in training.

    Args:
        data: interactions; rows without timestamps are taken to be in time order.
        validation_queries: queries whose second-to-last item is the validation target: None for all, a number or
            fraction of queries to draw at random, a list of ids, or the name of a boolean column of the query table.
        cold: "keep" targets whose item has no training row, as the published protocols do, or "drop" them.
        seed: seed of the random draw.

    Raises:
        InputError: no query is long enough, the rows are sorted by item id instead of time, or `validation_queries`
            does not fit the data.
    """
    _check_cold(cold)
    if sorted_by_item(data):
        raise InputError(
            "split leave-last-out: the rows of each query are sorted by item id, so its last row is not its newest; "
            "use data.split=random, or name the timestamp column with data.columns.timestamp."
        )
    sizes = np.diff(data.offsets)
    eligible = sizes >= 3
    account = Account()
    if not eligible.any():
        raise InputError(
            "split leave-last-out: no query has 3 interactions or more; use data.split=time or data.split=random."
        )
    account.add("split leave-last-out", int(eligible.sum()), "queries whose last item is held out for the test")
    account.add(
        "leak through time",
        None,
        "some training rows are later than other queries' test rows; data.split=time avoids this",
    )
    short = (sizes < 3) & (sizes > 0)
    account.add("short queries", int(short.sum()), "fewer than 3 interactions, all in training")
    chosen = validation_queries_of(data, validation_queries, eligible, seed)
    ends = data.offsets[1:]
    last = np.where(eligible, ends - 1, ends)
    train_end = np.where(chosen, ends - 2, last)
    train = training_rows(data, train_end, account)
    train = replace(train, negatives=training_negatives(data, account, train_end=train_end))
    known_items = train.item_counts() > 0 if cold == "drop" else None
    made = {}
    if chosen.any():
        made["validation"] = make_holdout(
            data, "validation", Window(train_end, train_end, np.where(chosen, ends - 1, train_end)), account,
            known_items=known_items,
        )  # fmt: skip
    made["test"] = make_holdout(data, "test", Window(last, last, ends), account, known_items=known_items)
    setting = validation_queries if isinstance(validation_queries, int | float | str | None) else int(chosen.sum())
    settings = {"validation_queries": setting, "cold": cold, "seed": seed}
    return _split("leave_last_out", train, made=made, account=account, settings=settings, data=data)


def held_out_queries(
    data: Interactions,
    validation: float = 0.1,
    test: float = 0.1,
    *,
    fold_in: float = 0.8,
    seed: int = 0,
    cold: Cold = "drop",
) -> Split:
    """Hold out whole queries and train on the others; the first rows of a held-out query are its history.

    Args:
        data: interactions.
        validation: fraction of the queries, 0 for no validation.
        test: fraction of the queries, above 0.
        fold_in: fraction of a held-out query's rows in the history; both history and targets get at least one row. With
            0, all rows are targets: for query towers that need no history.
        seed: seed of the random draw.
        cold: "drop" targets whose item has no training row, or "keep" them.

    Raises:
        InputError: a fraction is invalid, or a part is empty.
    """
    _check_shares(validation, test, cold)
    if not 0 <= fold_in < 1:
        raise InputError(f"split: fold_in={fold_in}; expected a fraction of at least 0 and below 1.")
    sizes = np.diff(data.offsets)
    least = 2 if fold_in else 1
    able = np.flatnonzero(sizes >= least)
    wanted = {"validation": round(validation * len(able)), "test": round(test * len(able))}
    for name, count in wanted.items():
        if count == 0 and (name == "test" or validation):
            raise InputError(
                f"split held-out-queries: {name} is empty: {len(able)} queries have {least} rows or more; use a "
                f"larger data.{name}."
            )
    if sum(wanted.values()) >= int((sizes > 0).sum()):
        raise InputError("split held-out-queries: training is empty; lower data.validation and data.test.")
    account = Account()
    data = without_item_order(data, account)
    account.add("split by queries", sum(wanted.values()), "whole queries held out; training never sees them")
    if fold_in:
        account.add("short queries", int((sizes == 1).sum()), "one interaction, in training")
    drawn = np.random.default_rng(seed).permutation(able)
    starts, ends = data.offsets[:-1], data.offsets[1:]
    parts = {"validation": drawn[: wanted["validation"]], "test": drawn[wanted["validation"] :][: wanted["test"]]}
    train_end = ends.copy()
    for part in parts.values():
        train_end[part] = starts[part]
    train = training_rows(data, train_end, account)
    train = replace(train, negatives=training_negatives(data, account, train_end=train_end))
    known_items = train.item_counts() > 0 if cold == "drop" else None
    history = np.clip(np.floor(fold_in * sizes).astype(np.int64), 1, np.maximum(sizes - 1, 1))
    folded = starts + (history if fold_in else 0)
    made = {}
    for name, part in parts.items():
        if len(part):
            start, end = ends.copy(), ends.copy()
            start[part] = folded[part]
            made[name] = make_holdout(data, name, Window(start, start, end), account, known_items=known_items)
    settings = {"validation": validation, "test": test, "fold_in": fold_in, "seed": seed, "cold": cold}
    return _split("held_out_queries", train, made=made, account=account, settings=settings, data=data)


def random_rows(
    data: Interactions, validation: float = 0.05, test: float = 0.1, *, cold: Cold = "drop", seed: int = 0
) -> Split:
    """Hold out random items of each query, for data whose rows have no time order.

    The given fraction of a query's distinct items is held out, with their number rounded up or down at random so that
    the fraction holds over all queries. All rows of a held-out (query, item) pair are held out. Queries with fewer than
    3 distinct items stay in training, and every query keeps a training item. The history of a validation query is its
    training rows; the history of a test query is all of its rows outside the test part.

    Args:
        data: interactions.
        validation: fraction of each query's items, 0 for no validation.
        test: fraction of each query's items, above 0.
        cold: "drop" targets whose item has no training row, or "keep" them.
        seed: seed of the random draw.

    Raises:
        InputError: a fraction is invalid, or a part is empty.
    """
    _check_shares(validation, test, cold)
    account = Account()
    account.add("split by random rows", len(data), f"of each query {test:.0%} test, {validation:.0%} validation")
    data = without_item_order(data, account)
    part = _drawn_parts(data, validation, test, seed)
    short = np.bincount(data.query_codes()[part < 0], minlength=data.num_queries)
    account.add("short queries", int((short > 0).sum()), "fewer than 3 distinct items, all in training")
    part = np.maximum(part, 0)
    train = data.select(part == 0)
    if not len(train):
        raise InputError("split: training is empty; lower data.validation and data.test.")
    count_training(train, account)
    train = replace(train, negatives=_outside(data, part, account))
    known_items = train.item_counts() > 0 if cold == "drop" else None
    made = {
        # In each query, rows outside the holdout are placed first, in their original order: they are the history.
        name: _from_last(
            data if name == "test" else data.select(part < 2),
            part == 2 if name == "test" else part[part < 2] == 1,
            name,
            account,
            known_items,
        )
        for name in ("validation", "test")
        if name == "test" or validation
    }
    settings = {"validation": validation, "test": test, "cold": cold, "seed": seed}
    return _split("random_rows", train, made=made, account=account, settings=settings, data=data)


def _from_last(
    data: Interactions,
    held: NDArray[np.bool_],
    name: str,
    account: Account,
    known_items: NDArray[np.bool_] | None,
) -> Holdout:
    """Build the holdout of the rows marked in `held` [n]; the history of a query is its other rows."""
    codes = data.query_codes()
    laid = in_order(data, np.lexsort((held, codes)))  # a stable sort
    start = laid.offsets[1:] - np.bincount(codes[held], minlength=data.num_queries)
    return make_holdout(laid, name, Window(start, start, laid.offsets[1:]), account, known_items=known_items)


def _drawn_parts(data: Interactions, validation: float, test: float, seed: int) -> NDArray[np.int8]:
    """Draw the part of each row, int8 [n]: 0 training, 1 validation, 2 test, -1 training because the query is short."""
    random = np.random.default_rng(seed)
    pairs, pair_of_row = np.unique(
        data.query_codes().astype(np.int64) * data.num_items + data.item_codes, return_inverse=True
    )
    query = pairs // data.num_items
    sizes = np.bincount(query, minlength=data.num_queries)
    counts: list[NDArray[np.int64]] = []
    for share in (test, validation):
        count = np.floor(share * sizes + random.random(len(sizes))).astype(np.int64)
        counts.append(np.where(sizes < 3, 0, np.minimum(count, np.maximum(sizes - 1 - sum(counts), 0))))
    order = np.lexsort((random.random(len(pairs)), query))
    place = np.empty(len(pairs), dtype=np.int64)
    place[order] = np.arange(len(pairs)) - (np.cumsum(sizes) - sizes)[query]
    part = np.where(place < counts[0][query], 2, np.where(place < (counts[0] + counts[1])[query], 1, 0))
    part[sizes[query] < 3] = -1
    return part.astype(np.int8)[pair_of_row]


def _outside(data: Interactions, part: NDArray[np.int8], account: Account) -> Interactions | None:
    """Select the observed negatives whose (query, item) pair is not held out."""
    below = data.negatives
    if below is None:
        return None
    held = part > 0
    pairs = data.query_codes()[held].astype(np.int64) * data.num_items + data.item_codes[held]
    kept = below.select(~np.isin(below.query_codes().astype(np.int64) * data.num_items + below.item_codes, pairs))
    account.add("training negatives", len(kept), f"{len(below) - len(kept):,} dropped, held out")
    return kept if len(kept) else None


def _split(
    name: str,
    train: Interactions,
    *,
    made: dict[str, Holdout],
    account: Account,
    settings: dict[str, Any],
    data: Interactions,
) -> Split:
    return Split(
        train, made.get("validation", Holdout.empty("validation")), made["test"], account, name, settings, data
    )


def _check_cold(cold: str) -> None:
    if cold not in ("drop", "keep"):
        raise InputError(f"split: cold={cold!r}; expected 'drop' or 'keep'.")


def _check_shares(validation: float, test: float, cold: str) -> None:
    _check_cold(cold)
    if not (0 <= validation < 1 and 0 < test < 1 and validation + test < 1):
        raise InputError(
            f"split: data.validation={validation}, data.test={test}; expected data.validation of at least 0 and "
            "data.test above 0, together below 1."
        )


def _utc(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
