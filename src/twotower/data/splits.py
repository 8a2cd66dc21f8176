"""Splits into training, validation and test, each with an account of what was dropped and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from twotower.data.account import Account
from twotower.data.holdouts import Holdout, Window, make_holdout
from twotower.data.interactions import Interactions
from twotower.data.training_rows import (
    ValidationQueries,
    rows_before,
    training_negatives,
    training_rows,
    validation_queries_of,
)
from twotower.errors import InputError

Cold = Literal["drop", "keep"]


@dataclass(frozen=True, eq=False)
class Split:
    """Training rows, and what is asked for validation and test.

    Attributes:
        train: the rows to fit on, with the vocabularies of all the data.
        validation: for choosing; empty where the split was told to make none.
        test: for the report.
        account: what was dropped and why.
        name: of the protocol.
        settings: its arguments, JSON-ready.
        data: all interactions, which a served model takes its histories from.
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


def by_time(data: Interactions, validation: float = 0.05, test: float = 0.1, *, cold: Cold = "drop") -> Split:
    """Split at two moments for all queries: train on the past, ask about the future.

    The last `test` share of all interactions is the test, the `validation` share before it the validation; rows of
    the very moment of a cut go to the later part. The history of a test query is everything of it before the cut.

    Args:
        data: interactions with timestamps.
        validation: share of rows, 0 for none.
        test: share of rows, above 0.
        cold: "drop" targets whose item, and queries that themselves, have no training row; or "keep" them.

    Raises:
        InputError: no timestamps, impossible shares, or an empty part.
    """
    _check_shares(validation, test, cold)
    times = data.timestamps
    if times is None:
        raise InputError(
            "split by_time: the data has no timestamps; name the column (columns={'timestamp': ...}), or use "
            "leave_last_out, for which the order of rows is enough."
        )
    n = len(data)
    at = [min(n - 1, round(n * (1 - test - validation))), min(n - 1, round(n * (1 - test)))]
    ordered = np.partition(times, at)
    first_cut, second_cut = int(ordered[at[0]]), int(ordered[at[1]])
    del ordered
    before_first, before_second = rows_before(data, first_cut), rows_before(data, second_cut)
    account = Account()
    account.add("split by time", len(data), f"validation from {_moment(first_cut)}, test from {_moment(second_cut)}")
    train = training_rows(data, data.offsets[:-1] + before_first, account)
    train = replace(train, negatives=training_negatives(data, account, before=first_cut))
    known_items = train.item_counts() > 0 if cold == "drop" else None
    known_queries = np.diff(train.offsets) > 0 if cold == "drop" else None
    starts = data.offsets[:-1]
    windows = {
        "validation": Window(starts + before_first, starts + before_first, starts + before_second),
        "test": Window(starts + before_second, starts + before_second, data.offsets[1:]),
    }
    if validation and first_cut == second_cut:
        raise InputError(
            f"split by_time: validation is empty, since too many rows share the moment {_moment(first_cut)}; "
            "give a larger validation share, or validation=0."
        )
    made = {
        name: make_holdout(data, name, window, account, known_items=known_items, known_queries=known_queries)
        for name, window in windows.items()
        if name == "test" or validation
    }
    settings = {"validation": validation, "test": test, "cold": cold, "cuts": [first_cut, second_cut]}
    return _split("by_time", train, made=made, account=account, settings=settings, data=data)


def leave_last_out(
    data: Interactions, validation_queries: ValidationQueries = None, *, cold: Cold = "keep", seed: int = 0
) -> Split:
    """Hold out the last item of every query for the test, and the second last for validation.

    The protocol of much published work, kept to compare with it: it trains on rows later than other queries' test
    rows. `by_time` does not. Queries with fewer than 3 interactions stay in training.

    Args:
        data: interactions; without timestamps the order of rows decides.
        validation_queries: whose second last item is validation: all (None), a number or a share of queries
            drawn with `seed`, ids, or the name of a boolean column of the query table.
        cold: "keep" targets without a training row, as the published protocols do, or "drop" them.
        seed: of the draw.

    Raises:
        InputError: no query is long enough, or `validation_queries` does not fit.
    """
    _check_cold(cold)
    sizes = np.diff(data.offsets)
    eligible = sizes >= 3
    account = Account()
    if not eligible.any():
        raise InputError("split leave_last_out: no query has 3 interactions or more; use by_time or held_out_queries.")
    account.add("split leave-last-out", int(eligible.sum()), "queries whose last item is the test")
    account.add("leak through time", None, "training holds rows later than other queries' tests; by_time does not")
    short = (sizes < 3) & (sizes > 0)
    account.add("short queries", int(short.sum()), "fewer than 3 interactions, wholly in training")
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
    told = validation_queries if isinstance(validation_queries, int | float | str | None) else int(chosen.sum())
    settings = {"validation_queries": told, "cold": cold, "seed": seed}
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
    """Hold out whole queries: fit on the others, fold in the first rows of these and ask for the rest.

    Args:
        data: interactions.
        validation: share of queries, 0 for none.
        test: share of queries, above 0.
        fold_in: share of a held-out query's rows that are its history; at least one row on each side.
        seed: of the draw.
        cold: "drop" targets whose item has no training row, or "keep" them.

    Raises:
        InputError: impossible shares, or an empty part.
    """
    _check_shares(validation, test, cold)
    if not 0 < fold_in < 1:
        raise InputError(f"split: fold_in={fold_in}; expected a share between 0 and 1.")
    sizes = np.diff(data.offsets)
    able = np.flatnonzero(sizes >= 2)
    wanted = {"validation": round(validation * len(able)), "test": round(test * len(able))}
    for name, count in wanted.items():
        if count == 0 and (name == "test" or validation):
            raise InputError(
                f"split held_out_queries: {name} is empty, {len(able)} queries have 2 rows; hold out more."
            )
    if sum(wanted.values()) >= int((sizes > 0).sum()):
        raise InputError("split held_out_queries: training is empty; hold out a smaller share of the queries.")
    account = Account()
    account.add("split by queries", sum(wanted.values()), "queries held out whole; training never sees them")
    account.add("short queries", int((sizes == 1).sum()), "one interaction, wholly in training")
    drawn = np.random.default_rng(seed).permutation(able)
    starts, ends = data.offsets[:-1], data.offsets[1:]
    parts = {"validation": drawn[: wanted["validation"]], "test": drawn[wanted["validation"] :][: wanted["test"]]}
    train_end = ends.copy()
    for part in parts.values():
        train_end[part] = starts[part]
    train = training_rows(data, train_end, account)
    train = replace(train, negatives=training_negatives(data, account, train_end=train_end))
    known_items = train.item_counts() > 0 if cold == "drop" else None
    folded = starts + np.clip(np.floor(fold_in * sizes).astype(np.int64), 1, np.maximum(sizes - 1, 1))
    made = {}
    for name, part in parts.items():
        if len(part):
            start, end = ends.copy(), ends.copy()
            start[part] = folded[part]
            made[name] = make_holdout(data, name, Window(start, start, end), account, known_items=known_items)
    settings = {"validation": validation, "test": test, "fold_in": fold_in, "seed": seed, "cold": cold}
    return _split("held_out_queries", train, made=made, account=account, settings=settings, data=data)


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
            f"split: validation={validation}, test={test}; expected shares of at least 0 and above 0, together below 1."
        )


def _moment(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
