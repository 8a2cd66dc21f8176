"""Slates: for each training row, the items that were shown to its query and passed over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from twotower.data.interactions import Interactions
from twotower.data.loading.histories import PAD, first_at
from twotower.data.loading.passed_over import PassedOver
from twotower.data.schema.vocabulary import texts_of
from twotower.errors import InputError, counted

Rows = NDArray[np.int64]

#: Separators of ids in a text column.
_SEPARATORS = r"[\s,|]+"


@dataclass(frozen=True, eq=False)
class Slates:
    """The slate of each training row.

    Attributes:
        items: int64 [m], items that were passed over.
        starts, ends: int64 [n]; the slate of row i is ``items[starts[i]:ends[i]]``, oldest first.
        length: S, the largest number of items in a slate; the newest are kept.
        weights: float32 [m], how much each item counts; None for 1 each.
        unknown: number of listed ids that are not in the catalog.
    """

    items: Rows
    starts: Rows
    ends: Rows
    length: int
    weights: NDArray[np.float32] | None = None
    unknown: int = 0

    @classmethod
    def of_negatives(
        cls, data: Interactions, *, length: int, window: int | None = None, request: str | None = None
    ) -> Slates:
        """Join the observed negatives to the rows with the same query, or the same query and request.

        A row at time t has the negatives in [t - window, t], never later ones. A negative without a label (an
        impression without an outcome) is left out if its item is a training item of its query.

        Args:
            data: the training interactions.
            length: the largest number of items in a slate.
            window: microseconds; None for all negatives up to the row.
            request: name of the context column with the request id, in both the rows and the negatives.

        Raises:
            InputError: there are no observed negatives or no request ids, or times are needed but missing.
        """
        below = data.negatives
        if below is None or not len(below):
            raise InputError(
                "objective.feedback: the training data has no items that were passed over; set data.positive_label, "
                "data.feedback.file or data.feedback.column"
            )
        untimed = [name for name, one in (("interactions", data), ("feedback", below)) if one.timestamps is None]
        if untimed and (window is not None or (request is None and len(untimed) == 1)):
            raise InputError(
                f"data.feedback: no timestamps in the {' and the '.join(untimed)}, so it is unknown what was shown "
                "before a row; name the timestamp column, or join by data.feedback.request without a window"
            )
        items, owners = np.asarray(below.item_codes).astype(np.int64), below.query_codes().astype(np.int64)
        kept = np.ones(len(items), dtype=np.bool_)
        if below.labels is None:
            kept = ~_are_pairs_of(data, owners, items)
        keys, of_negatives = data.query_codes().astype(np.int64), owners
        if request is not None:
            keys, of_negatives, joined = _request_keys(data, below, request)
            kept &= joined
        order = np.flatnonzero(kept)
        moments = np.zeros(len(items), dtype=np.int64) if below.timestamps is None else np.asarray(below.timestamps)
        order = order[np.lexsort((moments[order], of_negatives[order]))]
        ordered = of_negatives[order]
        starts, ends = np.searchsorted(ordered, keys), np.searchsorted(ordered, keys, side="right")
        if not untimed:
            now = np.asarray(data.timestamps)
            ends = first_at(moments[order], starts, ends, now + 1)
            if window is not None:
                starts = first_at(moments[order], starts, ends, now - window)
        weights = None if below.weights is None else np.asarray(below.weights)[order]
        return cls._bounded(items[order], starts, ends, length, weights)

    @classmethod
    def of_column(cls, data: Interactions, column: str, *, length: int) -> Slates:
        """Read the slates from a list column of the interactions: the items shown together with the positive.

        The lists contain ids, best position first; if a list is too long, the first ids are kept. Items that are not in
        the catalog, and training items of the query, are left out.

        Raises:
            InputError: the column was not read, or contains neither lists nor strings.
        """
        if data.context is None or column not in data.context.columns:
            raise InputError(
                f"data.feedback.column: {column!r} was not read with the interactions; in Python pass "
                f"context=[{column!r}] to Interactions.read or from_frame"
            )
        shown = data.context[column]
        if shown.dtype == pl.String:
            split = pl.col(column).str.strip_chars("[] ").str.replace_all(_SEPARATORS, ",").str.split(",")
            shown = data.context.select(split)[column]
        if not isinstance(shown.dtype, pl.List):
            raise InputError(
                f"data.feedback.column: {column!r} is {shown.dtype}; expected lists of ids, or strings of ids "
                "separated by spaces, commas or |"
            )
        sizes = shown.list.len().fill_null(0).to_numpy().astype(np.int64)
        ids = shown.list.reverse().explode(empty_as_null=False, keep_nulls=False)
        rows = np.repeat(np.arange(len(data)), sizes)
        items = _encoded(data, ids, column)
        queries = data.query_codes().astype(np.int64)[rows]
        kept = (items >= 0) & ~_are_pairs_of(data, queries, items)
        edges = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=len(data)))]).astype(np.int64)
        written = ids.is_not_null() if ids.dtype != pl.String else ids.str.len_bytes() > 0  # an empty string is no id
        unknown = int(((items < 0) & written.to_numpy()).sum())
        return cls._bounded(items[kept], edges[:-1], edges[1:], length, unknown=unknown)

    @classmethod
    def _bounded(
        cls,
        items: Rows,
        starts: Rows,
        ends: Rows,
        length: int,
        weights: NDArray[np.float32] | None = None,
        *,
        unknown: int = 0,
    ) -> Slates:
        longest = int((ends - starts).max()) if len(starts) else 0
        if not longest and unknown:
            raise InputError(
                f"data.feedback.column: no training row has an item that was passed over; {unknown:,} ids "
                "are not in the catalog (data.catalog=table adds the items of the item table)"
            )
        if not longest:
            raise InputError(
                "data.feedback: no training row has an item that was passed over before it; check the time window, the "
                "request ids and the times of the feedback, or remove objective.feedback"
            )
        return cls(items, starts, ends, min(length, longest), weights, unknown)

    def of(self, rows: Rows) -> PassedOver:
        """Gather the slates of rows, newest last."""
        at = self.ends[rows][:, None] - self.length + np.arange(self.length)
        is_empty = at < self.starts[rows][:, None]
        items = torch.from_numpy(np.where(is_empty, PAD, self.items.take(at, mode="clip")))
        if self.weights is None:
            return PassedOver(items)
        return PassedOver(items, torch.from_numpy(self.weights.take(at, mode="clip")))

    def __str__(self) -> str:
        """Return one line: the number of rows with a slate, the mean number of items, and the number of items cut."""
        sizes = self.ends - self.starts
        used = sizes[sizes > 0]
        cut = int(np.maximum(sizes - self.length, 0).sum())
        has = "has" if len(used) == 1 else "have"
        unknown = f"; {counted(self.unknown, 'listed id is', 'listed ids are')} not in the catalog"
        return (
            f"feedback: {len(used):,} of {counted(len(sizes), 'training row')} {has} items that were passed over, "
            f"{np.minimum(used, self.length).mean():.1f} each; {counted(cut, 'further item is', 'further items are')} "
            "cut (data.feedback.length)" + (unknown if self.unknown else "")
        )


def _are_pairs_of(data: Interactions, queries: Rows, items: Rows) -> NDArray[np.bool_]:
    """Return whether each (query, item) pair occurs in the interactions."""
    pairs = data.query_codes().astype(np.int64) * data.num_items + data.item_codes
    return np.isin(queries * data.num_items + items, pairs)


def _request_keys(data: Interactions, below: Interactions, request: str) -> tuple[Rows, Rows, NDArray[np.bool_]]:
    """Return a key for the query and request of each row and each negative, and which negatives have a request.

    A row without a request id has the key -1, which matches no negative: negatives without a request id are left out.
    """
    columns = []
    for name, rows in (("the interactions", data), ("the feedback", below)):
        if rows.context is None or request not in rows.context.columns:
            raise InputError(
                f"data.feedback.request: {request!r} was not read with {name}; name a column that both files have, or "
                "join by time with request: null"
            )
        columns.append(texts_of(rows.context[request], "data.feedback.request").str.strip_chars())
    ranks = pl.concat(columns).rank("dense").cast(pl.Int64).fill_null(-1).to_numpy()
    queries = np.concatenate([data.query_codes(), below.query_codes()]).astype(np.int64)
    keys = np.where(ranks < 0, -1, ranks * data.num_queries + queries)
    return keys[: len(data)], keys[len(data) :], ranks[len(data) :] >= 0


def _encoded(data: Interactions, ids: pl.Series, column: str) -> Rows:
    """Encode the ids of a list column; -1 where unknown."""
    if ids.dtype == pl.String and data.items.ids.dtype == pl.Int64:
        ids = ids.cast(pl.Int64, strict=False)
    try:
        return data.items.encode(ids)
    except InputError as error:
        raise InputError(f"data.feedback.column: {column!r}: {error}") from None
