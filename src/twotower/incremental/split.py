"""Split of the new data for continuing a model, joined with past rows under common vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.run import EligibilityConfig
from twotower.data.eligibility import Eligibility
from twotower.data.interactions import Interactions
from twotower.data.loading.histories import take_ranges
from twotower.data.prepare.request_context import joined_context
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import Codes, IdValues, Vocabulary
from twotower.data.splits.holdout import Holdout
from twotower.data.splits.protocols import Split
from twotower.errors import InputError, counted
from twotower.incremental.vocabularies import item_map, joined_table, union

#: Row columns that are kept if both the past and the new data have them.
CARRIED = ("timestamps", "weights", "groups")


@dataclass(frozen=True, eq=False)
class PastData:
    """The training data of a model, as stored in the model folder.

    Attributes:
        queries, items: the vocabularies.
        offsets, item_codes: all rows, including held-out rows: int64 [Q+1], int32 [n], oldest first within a query.
        learnt: int64 [Q]; for each query, how many of its rows, counted from the first, the model was trained on.
        columns: `timestamps`, `weights` and `groups` of the rows, if known.
        group_names: the group vocabulary, or None.
        item_table: one row per item code, or None.
        fingerprint: fingerprint of the data.
        last: timestamp of the newest row, microseconds since 1970; None if there are no timestamps.
        context: the context of each row, or None.
    """

    queries: Vocabulary
    items: Vocabulary
    offsets: Codes
    item_codes: NDArray[np.int32]
    learnt: Codes
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    group_names: Vocabulary | None = None
    item_table: pl.DataFrame | None = None
    fingerprint: str = ""
    last: int | None = None
    context: pl.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class ContinuedSplit(Split):
    """A split of the new data, joined with the past under common vocabularies.

    `train` contains all rows that training may use: the past, including the parent's held-out rows, and the training
    rows of the new data. `data` also contains the held-out rows of the new data.

    Attributes:
        learnt: bool [rows of train], marks the rows that the parent was trained on.
        query_map, item_map: the new code of each of the parent's codes, int64; -1 for a withdrawn item.
        parent: fingerprint of the parent's data.
        new_item_table: item features from the new data only, in code order; `data.item_table` also contains the
            parent's features.
        dates: first and last timestamps of the new rows, in microseconds; or None.
    """

    learnt: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    query_map: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    item_map: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parent: str = ""
    dates: tuple[int, int] | None = None
    new_item_table: pl.DataFrame | None = None

    def rows_to_learn(self, replay: float, seed: int, *, whole: bool = False) -> Codes:
        """Choose the rows of `train` for a training run: all new rows and a sample of the parent's rows.

        The sample is drawn once, without replacement, so that the frequency of items in the batches can be counted.

        Args:
            replay: number of parent rows per new row; fewer if the parent has too few rows.
            seed: seed of the random draw.
            whole: whether to choose whole queries, for towers that learn from whole sequences: first all queries with a
                new row, whose old rows count as replayed, then more queries until there are enough rows.
        """
        known, new = np.flatnonzero(self.learnt), np.flatnonzero(~self.learnt)
        size = min(round(replay * len(new)), len(known))
        draw = np.random.default_rng(seed)
        if not whole:
            drawn = draw.choice(known, size=size, replace=False) if size else known[:0]
            return np.sort(np.concatenate([new, drawn])).astype(np.int64)
        owner = self.train.query_codes()
        taken = np.zeros(self.train.num_queries, dtype=np.bool_)
        taken[owner[new]] = True
        sizes = np.diff(self.train.offsets)
        missing = size - int(taken[owner[known]].sum())
        if missing > 0:
            others = draw.permutation(np.flatnonzero(~taken & (sizes > 0)))
            taken[others[: int(np.searchsorted(np.cumsum(sizes[others]), missing)) + 1]] = True
        return np.flatnonzero(taken[owner]).astype(np.int64)


@dataclass(frozen=True)
class JoinedCodes:
    """The joined code of each code of the past and of the new data; -1 for an id that the joined data lacks."""

    past_queries: Codes
    past_items: Codes
    queries: Codes
    items: Codes


@dataclass(frozen=True)
class PastRows:
    """The past rows in new codes, without withdrawn items, sorted by new query code."""

    offsets: Codes
    items: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]]
    context: pl.DataFrame | None = None

    @classmethod
    def of(cls, past: PastData, maps: JoinedCodes, num_queries: int) -> PastRows:
        """Recode the rows of past data."""
        sizes = np.diff(past.offsets)
        queries = np.repeat(maps.past_queries, sizes)
        place = np.arange(len(past.item_codes)) - np.repeat(past.offsets[:-1], sizes)
        learnt = place < np.repeat(past.learnt, sizes)
        items = maps.past_items[past.item_codes]
        # The order of queries is unchanged if the vocabularies are sorted, but they may be unsorted.
        order = np.argsort(queries, kind="stable")
        order = order[items[order] >= 0]
        counts = np.bincount(queries[order], minlength=num_queries)
        return cls(
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
            items[order].astype(np.int32),
            learnt[order],
            {name: np.asarray(values)[order] for name, values in past.columns.items()},
            joined_context([past.context], order),
        )


@dataclass(frozen=True)
class JoinedRows:
    """The rows of every query, first the old rows, then the new rows.

    Attributes:
        rows: all rows.
        trains: bool [n], marks the rows that training may use.
        learnt: bool [n], marks the rows that the parent was trained on.
    """

    rows: Interactions
    trains: NDArray[np.bool_]
    learnt: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        past: PastData,
        fresh: Interactions,
        training: Codes,
        *,
        queries: Vocabulary,
        items: Vocabulary,
        maps: JoinedCodes,
    ) -> JoinedRows:
        """Join the past rows and the new rows.

        `training` contains, for each query of `fresh`, how many of its rows, counted from the first, are training rows.
        """
        old = PastRows.of(past, maps, len(queries))
        sizes = np.diff(fresh.offsets)
        new_codes = maps.queries[fresh.query_codes()]
        place = np.arange(len(fresh)) - np.repeat(fresh.offsets[:-1], sizes)
        codes = np.concatenate([np.repeat(np.arange(len(queries)), np.diff(old.offsets)), new_codes])
        order = np.argsort(codes, kind="stable")  # stable: the past is first, and each part keeps its order
        columns: dict[str, Any] = {}
        for name in CARRIED:
            before, after = old.columns.get(name), getattr(fresh, name)
            if name == "weights" and (before is None) != (after is None):
                # As everywhere, rows without a weight have weight 1.
                before = np.ones(len(old.items), dtype=np.float32) if before is None else before
                after = np.ones(len(fresh), dtype=np.float32) if after is None else after
            if before is not None and after is not None:
                columns[name] = (before, np.asarray(after))
        names = None
        if "groups" in columns and past.group_names is not None and fresh.group_names is not None:
            names = union(past.group_names.ids, fresh.group_names.ids, "group")
            maps_ = item_map(past.group_names, names), item_map(fresh.group_names, names)
            columns["groups"] = tuple(
                m[np.asarray(c)].astype(np.int32) for m, c in zip(maps_, columns["groups"], strict=True)
            )
        else:
            columns.pop("groups", None)
        arrays: dict[str, Any] = {name: np.concatenate(both)[order] for name, both in columns.items()}
        rows = Interactions(
            queries,
            items,
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(codes, minlength=len(queries)))]),
            np.concatenate([old.items, maps.items[fresh.item_codes].astype(np.int32)])[order],
            group_names=names,
            account=Account(list(fresh.account.lines)),
            context=joined_context([old.context, fresh.context], order),
            event=fresh.event,
            query_text=fresh.query_text,
            **arrays,
        )
        trains = np.concatenate([np.ones(len(old.items), dtype=np.bool_), place < np.repeat(training, sizes)])[order]
        learnt = np.concatenate([old.learnt, np.zeros(len(fresh), dtype=np.bool_)])[order]
        return cls(rows, trains, learnt)


def continued(
    past: PastData,
    data: Interactions,
    split: Callable[[Interactions], Split],
    *,
    withdrawn: IdValues | None = None,
    catalog: Literal["interactions", "table"] = "interactions",
    cold: Literal["drop", "keep"] = "drop",
) -> ContinuedSplit:
    """Join new data to the past.

    Rows up to the past's last timestamp are omitted, so `data` may contain only new rows or the whole log. In every
    history, old rows precede new rows. The parent's held-out rows become training rows. Only the new rows are split, so
    validation and test consist of new data.

    Args:
        past: the training data of the model.
        data: the new data; if read with `catalog="table"`, it may have items without rows.
        split: function that splits the new data and keeps cold targets.
        withdrawn: item ids to remove from the catalog.
        catalog: "table" also removes the parent's items that are neither in the new rows nor in the item table.
        cold: "drop" or "keep" targets whose query or item has neither old nor new training rows.

    Raises:
        InputError: there are no new rows, id types differ, a holdout is empty, or none of the withdrawn ids is known.
    """
    account = Account()
    past, data = _same_id_types(past, data, account)
    gone = _withdrawn(past, data, withdrawn)
    fresh = _new_rows(past, data, gone, account)
    made = split(fresh)
    fresh = made.data  # the rows of a query may have been shuffled
    account.extend(made.account)
    new_items = fresh.item_counts() > 0
    if fresh.negatives is not None:
        new_items |= fresh.negatives.item_counts() > 0
    kept = ~_among(past.items, gone)
    if catalog == "table":  # the new data then has the items of its rows and of its item table
        kept &= item_map(past.items, data.items) >= 0
    if catalog == "table":
        new_items |= ~_among(data.items, gone)
    items = union(past.items.ids.filter(pl.Series(kept)), data.items.ids.filter(pl.Series(new_items)), "item")
    new_queries = np.diff(fresh.offsets) > 0
    queries = union(past.queries.ids, data.queries.ids.filter(pl.Series(new_queries)), "query")
    maps = JoinedCodes(
        past_queries=item_map(past.queries, queries),
        past_items=np.where(kept, item_map(past.items, items), -1),
        queries=item_map(data.queries, queries),
        items=item_map(data.items, items),
    )
    account.add("withdrawn items", int((~kept).sum()), "removed from the catalog and the histories")
    account.add("new items", len(items) - int(kept.sum()), f"of {len(items):,}")
    account.add("new queries", len(queries) - len(past.queries), f"of {len(queries):,}")
    joined = JoinedRows.of(past, fresh, np.diff(made.train.offsets), queries=queries, items=items, maps=maps)
    rows = joined.rows
    rows.item_table = joined_table(past.item_table, past.items, data.item_table, data.items, items)
    rows.query_table = joined_table(None, past.queries, data.query_table, data.queries, queries)
    if data.eligibility is not None:
        rows.eligibility = _joined_rule(data.eligibility.settings, rows, account)
    train = rows.select(joined.trains)
    if made.train.negatives is not None:
        train = replace(train, negatives=_recode_observed(made.train.negatives, queries, items, maps))
    learnt = joined.learnt[joined.trains]
    account.add(
        "rows to learn", int((~learnt).sum()), f"in addition to {int(learnt.sum()):,} that the parent was trained on"
    )
    warm_items = train.item_counts() > 0 if cold == "drop" else None
    warm_queries = np.diff(train.offsets) > 0 if cold == "drop" and made.name == "by_time" else None
    before = PastRows.of(past, maps, len(queries))
    histories = bool(made.settings.get("histories"))
    holdouts = {
        name: _continued_holdout(
            getattr(made, name),
            before,
            maps,
            rows,
            account=account,
            fresh_names=fresh.group_names,
            warm=(warm_items, warm_queries),
            histories=histories,
        )
        for name in ("validation", "test")
    }
    times = fresh.timestamps
    return ContinuedSplit(
        train=train,
        validation=holdouts["validation"],
        test=holdouts["test"],
        account=account,
        name=made.name,
        settings={**made.settings, "cold": cold, "continues": past.fingerprint},
        data=rows,
        learnt=learnt,
        query_map=maps.past_queries,
        item_map=maps.past_items,
        parent=past.fingerprint,
        new_item_table=joined_table(None, past.items, data.item_table, data.items, items),
        dates=None if times is None else (int(np.min(times)), int(np.max(times))),
    )


def _joined_rule(settings: EligibilityConfig, rows: Interactions, account: Account) -> Eligibility:
    """Apply the rule of the new data to the joined item table.

    The item table has the current groups and intervals. Past rows that contradict it are kept: their item was offered
    at the time.

    Raises:
        InputError: the rule needs groups or times, and the rows of the model's data have none.
    """
    if settings.item_groups is not None and rows.group_names is None:
        raise InputError(
            "data.eligibility.item_groups: the model to continue has no groups for its rows; remove the rule, or train "
            "a new model on all rows"
        )
    rule = Eligibility.of_table(settings, rows.item_table, rows.num_items, rows.group_names)
    groups, times = rows.groups, rows.timestamps
    rule.rows(groups, times)
    fits = rule.allows(np.asarray(rows.item_codes), groups, times)
    account.add("rows no longer eligible", int((~fits).sum()), "of the joined data, kept: their item was offered then")
    return rule


def _same_id_types(past: PastData, data: Interactions, account: Account) -> tuple[PastData, Interactions]:
    """Convert the ids of the new data to the model's id types, because a CSV file has no types.

    If the model has integer ids and the new data has an id that is not an integer, such as "guest-1", the model's ids
    are converted to text instead.
    """
    change: dict[str, Any]
    for side in ("queries", "items"):
        old, new = getattr(past, side), getattr(data, side)
        if old.ids.dtype == new.ids.dtype:
            continue
        if old.ids.dtype == pl.String:
            changed = new.ids.cast(pl.String)
        else:
            numbers = new.ids.cast(pl.Int64, strict=False)
            other = ~(numbers.cast(pl.String) == new.ids).fill_null(value=False)
            if other.any():
                change = {side: Vocabulary(old.ids.cast(pl.String))}
                past = replace(past, **change)
                account.add(
                    f"{side} now text", len(old),
                    f"ids were integers in the model; the new data has {new.ids.filter(other)[0]!r}",
                )  # fmt: skip
                continue
            changed = numbers
        below = data.negatives
        change = {side: Vocabulary(changed)}
        data = replace(data, **change)
        if below is not None:
            data = replace(data, negatives=replace(below, **change))
    return past, data


def _withdrawn(past: PastData, data: Interactions, ids: IdValues | None) -> Vocabulary | None:
    if ids is None or not len(ids):
        return None
    values = ids if isinstance(ids, pl.Series) else pl.Series("id", ids)
    found = Vocabulary(values.unique().drop_nulls())
    if (past.items.encode(found.ids) < 0).all() and (data.items.encode(found.ids) < 0).all():
        raise InputError(
            f"withdrawn: none of the {len(found):,} ids is in the catalog; expected ids such as {past.items.ids[0]!r}"
        )
    return found


def _among(items: Vocabulary, ids: Vocabulary | None) -> NDArray[np.bool_]:
    mask = np.zeros(len(items), dtype=np.bool_)
    if ids is not None:
        codes = items.encode(ids.ids)
        mask[codes[codes >= 0]] = True
    return mask


def _new_rows(past: PastData, data: Interactions, gone: Vocabulary | None, account: Account) -> Interactions:
    """Select the rows that are newer than the past, without withdrawn items."""
    rows = np.ones(len(data), dtype=np.bool_)
    if past.last is not None and data.timestamps is None:
        raise InputError(
            "the model's data has timestamps and the new data has none, so new rows cannot be identified; name the "
            "column with data.columns.timestamp"
        )
    if past.last is not None and data.timestamps is not None:
        rows = np.asarray(data.timestamps) > past.last
        account.add("known rows", int((~rows).sum()), "up to the last timestamp of the model's data, left out")
    leaving = _among(data.items, gone)[data.item_codes] & rows
    if gone is not None:
        account.add("rows of withdrawn items", int(leaving.sum()), "left out")
    rows &= ~leaving
    if not rows.any():
        raise InputError(
            "nothing to train on: the new data has no row after the last timestamp of the model's data"
            if past.last is not None
            else "nothing to train on: every row has a withdrawn item"
        )
    fresh = data.select(rows)
    below = data.negatives
    if below is not None:
        after = np.ones(len(below), dtype=np.bool_)
        if past.last is not None and below.timestamps is not None:
            after = np.asarray(below.timestamps) > past.last
        after &= ~_among(data.items, gone)[below.item_codes]
        fresh = replace(fresh, negatives=below.select(after) if after.any() else None)
    account.add("new rows", len(fresh))
    return replace(fresh, labels=None)


def _recode_observed(
    below: Interactions, queries: Vocabulary, items: Vocabulary, maps: JoinedCodes
) -> Interactions | None:
    """Recode observed negatives, and drop negatives of withdrawn items."""
    codes, found = maps.queries[below.query_codes()], maps.items[below.item_codes]
    known = np.flatnonzero((codes >= 0) & (found >= 0))
    if not len(known):
        return None
    order = known[np.argsort(codes[known], kind="stable")]
    counts = np.bincount(codes[order], minlength=len(queries))
    return Interactions(
        queries,
        items,
        np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
        found[order].astype(np.int32),
        timestamps=None if below.timestamps is None else np.asarray(below.timestamps)[order],
    )


def _continued_holdout(
    holdout: Holdout,
    before: PastRows,
    maps: JoinedCodes,
    whole: Interactions,
    *,
    account: Account,
    fresh_names: Vocabulary | None,
    warm: tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None],
    histories: bool,
) -> Holdout:
    """Recode a holdout of the new data, prepend the past to the histories, and drop cold targets.

    With `histories`, queries without a training row are kept if they have a history.
    """
    if not len(holdout):
        return holdout
    queries = maps.queries[holdout.queries]
    sizes = np.diff(holdout.target_offsets)
    owner = np.repeat(np.arange(len(queries)), sizes)
    targets = maps.items[holdout.target_items]
    warm_items, warm_queries = warm
    keep = np.ones(len(targets), dtype=np.bool_)
    if warm_items is not None:
        keep &= warm_items[targets]
    if warm_queries is not None:
        keep &= (warm_queries[queries] | (histories & (np.diff(holdout.history_offsets) > 0)))[owner]
    if not keep.all():
        account.add(f"{holdout.name}: cold targets", int((~keep).sum()), "query or item without a training row")
    owner, targets = owner[keep], targets[keep]
    chosen = np.unique(owner)
    if not len(chosen):
        raise InputError(
            f"split: {holdout.name} is empty: every held-out row of the new data has a query or an item without a "
            "training row; hold out more, or use more data"
        )
    # Sorted by query code, like every holdout.
    chosen = chosen[np.argsort(queries[chosen], kind="stable")]
    rank = np.full(len(queries), -1)
    rank[chosen] = np.arange(len(chosen))
    order = np.argsort(rank[owner], kind="stable")
    # A history consists of the first rows of its query: all past rows, and the new rows that the protocol includes.
    starts = whole.offsets[queries[chosen]]
    lengths = np.diff(before.offsets)[queries[chosen]] + np.diff(holdout.history_offsets)[chosen]
    rows, history_offsets = take_ranges(starts, starts + lengths)
    account.add(
        f"{holdout.name}: targets, cold ones left out", len(targets), f"of {counted(len(chosen), 'query', 'queries')}"
    )
    return Holdout(
        name=holdout.name,
        queries=queries[chosen],
        history_offsets=history_offsets,
        history_items=np.asarray(whole.item_codes[rows]),
        target_offsets=np.concatenate([[0], np.cumsum(np.bincount(rank[owner], minlength=len(chosen)))]).astype(
            np.int64
        ),
        target_items=targets[order].astype(np.int32),
        history_timestamps=None if whole.timestamps is None else np.asarray(whole.timestamps[rows]),
        history_events=whole.event_types(rows),
        query_times=None if holdout.query_times is None else holdout.query_times[chosen],
        context=None if holdout.context is None else holdout.context[chosen],
        query_groups=_recode_groups(holdout, whole, fresh_names, chosen),
        eligibility=whole.eligibility,
        event=holdout.event,
        query_text=holdout.query_text,
    )


def _recode_groups(
    holdout: Holdout, whole: Interactions, names: Vocabulary | None, chosen: Codes
) -> NDArray[np.int64] | None:
    """Recode the groups of the chosen queries of a holdout, from codes of `names` to codes of the joined data."""
    if holdout.query_groups is None or names is None or whole.group_names is None:
        return None
    return item_map(names, whole.group_names)[holdout.query_groups[chosen]]
