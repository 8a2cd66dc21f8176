"""Rows of a past and of new days as one table under common codes."""

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
    """New codes of old codes, -1 where there is none."""

    past_queries: Codes
    past_items: Codes
    queries: Codes
    items: Codes


@dataclass(frozen=True)
class PastRows:
    """The past's rows in new codes, without withdrawn items, by new query code."""

    offsets: Codes
    items: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]]
    context: pl.DataFrame | None = None

    @classmethod
    def of(cls, past: Past, maps: Maps, num_queries: int) -> PastRows:
        """From a past and the maps of its codes."""
        sizes = np.diff(past.offsets)
        queries = np.repeat(maps.past_queries, sizes)
        place = np.arange(len(past.item_codes)) - np.repeat(past.offsets[:-1], sizes)
        learnt = place < np.repeat(past.learnt, sizes)
        items = maps.past_items[past.item_codes]
        # Sorted vocabularies keep the order of the queries, others may not.
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
    """Old rows, then new ones, of every query.

    Attributes:
        rows: all of them.
        trains: bool [n], those that training may know.
        learnt: bool [n], those that the parent was trained on.
    """

    rows: Interactions
    trains: NDArray[np.bool_]
    learnt: NDArray[np.bool_]

    @classmethod
    def of(
        cls, past: Past, fresh: Interactions, training: Codes, *, queries: Vocabulary, items: Vocabulary, maps: Maps
    ) -> Joined:
        """`training` [Q of fresh]: how many new rows of each query, from the first, are training rows."""
        old = PastRows.of(past, maps, len(queries))
        sizes = np.diff(fresh.offsets)
        new_codes = maps.queries[fresh.query_codes()]
        place = np.arange(len(fresh)) - np.repeat(fresh.offsets[:-1], sizes)
        codes = np.concatenate([np.repeat(np.arange(len(queries)), np.diff(old.offsets)), new_codes])
        order = np.argsort(codes, kind="stable")  # stable: the past stands first, and each part in its own order
        columns: dict[str, Any] = {}
        for name in CARRIED:
            theirs, ours = old.columns.get(name), getattr(fresh, name)
            if name == "weights" and (theirs is None) != (ours is None):
                # Rows without a weight weigh 1, as everywhere.
                theirs = np.ones(len(old.items), dtype=np.float32) if theirs is None else theirs
                ours = np.ones(len(fresh), dtype=np.float32) if ours is None else ours
            if theirs is not None and ours is not None:
                columns[name] = (theirs, np.asarray(ours))
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
