"""Ready-made splits: training, validation and test in separate files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.interactions import ROW_FIELDS, ColumnsLike, Interactions
from twotower.data.io.feature_tables import FeatureTable, TableLike
from twotower.data.io.layout import combined
from twotower.data.prepare.request_context import ContextColumns, joined_context
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import Vocabulary
from twotower.data.splits.holdout import Holdout, Window, count_training, make_holdout
from twotower.data.splits.protocols import Cold, Split
from twotower.data.splits.row_order import without_item_order
from twotower.errors import InputError, counted

Part = Interactions | str | Path | Sequence[str | Path]


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a ready-made split, as read; `split` builds a `Split` from them.

    Attributes:
        train, validation, test: the interactions; `validation` may be None.
        items, queries: feature tables, or None.
        item_columns, query_columns: columns of these tables by role; see `Interactions.read`.
    """

    train: Interactions
    validation: Interactions | None
    test: Interactions
    items: TableLike | None = None
    queries: TableLike | None = None
    item_columns: Mapping[str, str] | None = None
    query_columns: Mapping[str, str] | None = None

    @property
    def account(self) -> Account:
        """The account of the training part."""
        return self.train.account

    @property
    def fingerprint(self) -> str:
        """The sha256 of the parts' fingerprints."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return combined({name: part.fingerprint for name, part in parts.items() if part is not None})

    def split(self) -> Split:
        """Build the split; its data gets the fingerprint of the parts."""
        made = from_parts(
            self.train,
            self.validation,
            self.test,
            items=self.items,
            queries=self.queries,
            item_columns=self.item_columns,
            query_columns=self.query_columns,
        )
        return replace(made, data=replace(made.data, account=self.account, known_fingerprint=self.fingerprint))


def from_parts(
    train: Part,
    validation: Part | None,
    test: Part,
    *,
    items: TableLike | None = None,
    queries: TableLike | None = None,
    columns: ColumnsLike = None,
    context: ContextColumns = None,
    cold: Cold = "keep",
    item_columns: Mapping[str, str] | None = None,
    query_columns: Mapping[str, str] | None = None,
) -> Split:
    """Build a `Split` from ready-made parts, with common vocabularies.

    The history of a test query is its training rows followed by its validation rows.

    Args:
        train: interactions, a file or several files; ``[train, validation]`` to train on both.
        validation: interactions, a file or several files; None for no validation.
        test: interactions, a file or several files.
        items: item features, joined by id.
        queries: query features, joined by id.
        columns: the column of each role in the files.
        context: context columns to read from the files; see `Interactions.read`.
        cold: "keep" targets whose item has no training row, as is usual for ready-made splits, or "drop" them.
        item_columns: columns of the item table by role; see `Interactions.read`.
        query_columns: columns of the query table by role.

    Returns:
        A split whose `data` contains all parts.

    Raises:
        InputError: a part cannot be read.
    """
    if cold not in ("drop", "keep"):
        raise InputError(f"split: cold={cold!r}; expected 'drop' or 'keep'.")
    account = Account()
    parts: dict[str, Interactions] = {}
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if part is None:
            continue
        if not isinstance(part, Interactions):
            part = Interactions.read(part, columns=columns, part=True, context=context)  # noqa: PLW2901
        parts[name] = part
        account.add(f"{name}: rows read", len(parts[name]), counted(parts[name].num_queries, "query", "queries"))
        if parts[name].negatives is not None:
            account.add(f"{name}: negatives", len(parts[name].negatives or ()), "not used in a ready-made split")
    stacked = _stack(list(parts.values()))
    rows = without_item_order(stacked.data, account, stacked.part)
    tables = {"item": (items, rows.items, item_columns), "query": (queries, rows.queries, query_columns)}
    for role, (table, vocabulary, named) in tables.items():
        if table is not None:
            joined = FeatureTable(table, role, role, named).join_to(vocabulary, account)
            setattr(rows, f"{role}_table", joined)
    ends = [rows.offsets[:-1] + before for before in stacked.rows_up_to]
    fitted = rows.select(stacked.part == 0)
    count_training(fitted, account)
    known_items = fitted.item_counts() > 0 if cold == "drop" else None
    made = {
        name: make_holdout(rows, name, Window(start, start, end), account, known_items=known_items)
        for name, start, end in zip(list(parts)[1:], ends[:-1], ends[1:], strict=True)
    }
    if validation is None:
        account.add("no validation given", None, "training runs all epochs; the baselines have fixed settings")
    new = np.diff(fitted.offsets)[made["test"].queries] == 0
    empty = int((np.diff(made["test"].history_offsets)[new] == 0).sum())
    if new.any():
        account.add(
            "test: queries without training rows", int(new.sum()), f"kept; {empty:,} of them have no history at all"
        )
    return Split(
        train=fitted,
        validation=made.get("validation", Holdout.empty("validation")),
        test=made["test"],
        account=account,
        name="from_parts",
        settings={"cold": cold, "fingerprints": {name: part.fingerprint for name, part in parts.items()}},
        data=_by_time(rows),
    )


@dataclass
class _Stacked:
    """All parts with common vocabularies; the rows of each query are ordered by part.

    Attributes:
        data: the rows.
        part: int8 [n], the part of each row.
        rows_up_to: one array per part, int64 [Q]: how many rows each query has in this part and the earlier ones.
    """

    data: Interactions
    part: NDArray[np.int8]
    rows_up_to: list[NDArray[np.int64]]


def _stack(parts: Sequence[Interactions]) -> _Stacked:
    queries = _union([p.queries for p in parts])
    items = _union([p.items for p in parts])
    codes = np.concatenate([queries.encode(p.queries.ids)[p.query_codes()] for p in parts])
    part = np.repeat(np.arange(len(parts), dtype=np.int8), [len(p) for p in parts])
    order = np.lexsort((part, codes))
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in parts])[order]
        for name in ROW_FIELDS
        if name not in ("item_codes", "groups") and all(getattr(p, name) is not None for p in parts)
    }
    item_codes = np.concatenate([items.encode(p.items.ids).astype(np.int32)[p.item_codes] for p in parts])[order]
    counts = [np.bincount(codes[part == k], minlength=len(queries)) for k in range(len(parts))]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sum(counts))])
    context = joined_context([p.context for p in parts], order)
    event, text = (parts[0].event, parts[0].query_text) if context is not None else (None, None)
    data = Interactions(queries, items, offsets, item_codes, context=context, event=event, query_text=text, **columns)
    return _Stacked(data, part[order], list(np.cumsum(counts, axis=0)))


def _union(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """Merge vocabularies; integer ids become text if another part has text ids, because CSV files have no types."""
    ids = [vocabulary.ids for vocabulary in vocabularies]
    if len({one.dtype for one in ids}) > 1:
        ids = [one.cast(pl.String) for one in ids]
    return Vocabulary(pl.concat(ids).unique().sort())


def _by_time(rows: Interactions) -> Interactions:
    """Sort the rows of each query by time, because the parts may overlap in time."""
    if rows.timestamps is None:
        return rows
    order = np.lexsort((rows.timestamps, rows.query_codes()))
    columns: dict[str, Any] = {n: getattr(rows, n)[order] for n in ROW_FIELDS if getattr(rows, n) is not None}
    columns["context"] = joined_context([rows.context], order)
    columns["event"], columns["query_text"] = rows.event, rows.query_text
    return Interactions(
        rows.queries, rows.items, rows.offsets, item_table=rows.item_table, query_table=rows.query_table, **columns
    )
