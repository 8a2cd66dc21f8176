"""The rows of the past and of the new data as one table with common codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.account import Account
from twotower.data.catalogs import item_map, union
from twotower.data.context import joined_context
from twotower.data.interactions import Interactions
from twotower.data.past import CARRIED, Past
from twotower.schema import Vocabulary

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Maps:
    """New code of each code of the past and of the new data, -1 where there is none."""

    past_queries: Codes
    past_items: Codes
    queries: Codes
    items: Codes


@dataclass(frozen=True)
class PastRows:
    """The rows of the past in new codes, without withdrawn items, sorted by new query code."""

    offsets: Codes
    items: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]]
    context: pl.DataFrame | None = None

    @classmethod
    def of(cls, past: Past, maps: Maps, num_queries: int) -> PastRows:
        """Recode the rows of a past."""
        sizes = np.diff(past.offsets)
        queries = np.repeat(maps.past_queries, sizes)
        place = np.arange(len(past.item_codes)) - np.repeat(past.offsets[:-1], sizes)
        learnt = place < np.repeat(past.learnt, sizes)
        items = maps.past_items[past.item_codes]
        # The order of the queries stays the same if the vocabularies are sorted, but they need not be.
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
class Joined:
    """The old and then the new rows of every query.

    Attributes:
        rows: all rows.
        trains: bool [n], the rows that training may use.
        learnt: bool [n], the rows that the parent was trained on.
    """

    rows: Interactions
    trains: NDArray[np.bool_]
    learnt: NDArray[np.bool_]

    @classmethod
    def of(
        cls, past: Past, fresh: Interactions, training: Codes, *, queries: Vocabulary, items: Vocabulary, maps: Maps
    ) -> Joined:
        """Join the rows of the past and of the new data.

        `training` [Q of fresh] is the number of training rows at the start of each query's new rows.
        """
        old = PastRows.of(past, maps, len(queries))
        sizes = np.diff(fresh.offsets)
        new_codes = maps.queries[fresh.query_codes()]
        place = np.arange(len(fresh)) - np.repeat(fresh.offsets[:-1], sizes)
        codes = np.concatenate([np.repeat(np.arange(len(queries)), np.diff(old.offsets)), new_codes])
        order = np.argsort(codes, kind="stable")  # stable: the past comes first, and each part keeps its order
        columns: dict[str, Any] = {}
        for name in CARRIED:
            before, after = old.columns.get(name), getattr(fresh, name)
            if name == "weights" and (before is None) != (after is None):
                # Rows without a weight have weight 1, as everywhere.
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
            **arrays,
        )
        trains = np.concatenate([np.ones(len(old.items), dtype=np.bool_), place < np.repeat(training, sizes)])[order]
        learnt = np.concatenate([old.learnt, np.zeros(len(fresh), dtype=np.bool_)])[order]
        return cls(rows, trains, learnt)
