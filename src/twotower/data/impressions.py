"""Impression files: items shown for queries; those that were passed over become observed negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from twotower.data.interactions import Interactions
from twotower.data.io.layout import combined
from twotower.data.schema.account import Account
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import texts_of
from twotower.errors import InputError


def with_impressions(
    data: Interactions,
    file: str | Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    passed_over: float | list[str] | dict[str, float] = 1.0,
    request: str | None = None,
) -> Interactions:
    """Read a table of impressions, and store the passed-over ones as the observed negatives of the interactions.

    Args:
        data: the interactions, without observed negatives.
        file: the table, with one row per item shown; it is read in the same way as by `Interactions.read`.
        columns: the table's column for each role: query, item, timestamp, label (the outcome), and weight (of a
            negative). If `passed_over` is a number and there is no label column, every row counts as passed over, and
            `negatives.labels` is None.
        passed_over: the outcomes that count as passed over: all below a number, all in a list, or the keys of a dict
            whose values are the weights. A list or a dict needs a label column.
        request: column with the id of the request; it becomes the context of the negatives.

    Returns:
        The interactions with `negatives`. Rows with an unknown query or item are left out; the account counts them. The
        fingerprint covers both the interactions and the impressions.

    Raises:
        InputError: the file or a column cannot be read, only the interactions have timestamps, `passed_over` needs a
            label column, no row with a known query and item was passed over, or the interactions already have observed
            negatives.
    """
    if data.negatives is not None:
        raise InputError(
            "data.feedback.file: the interactions already have observed negatives (data.positive_label); use only the "
            "file, or only the rows below data.positive_label"
        )
    roles, outcome = dict(columns or {}), None
    if isinstance(passed_over, list | dict):
        outcome = roles.pop("label", None)
        if outcome is None:
            raise InputError(
                "data.feedback.passed_over: outcomes need a column; name it with data.feedback.columns.label"
            )
        roles["label"] = "none"
    read = [name for name in (request, outcome) if name is not None]
    shown = Interactions.read(file, columns=ColumnRoles.of(roles), part=True, context=read or None)
    if data.timestamps is not None and shown.timestamps is None:
        raise InputError(
            f"{file}: no timestamps, so impressions later than the training rows cannot be left out; name the column "
            "with data.feedback.columns.timestamp"
        )
    skipped, labels = np.ones(len(shown), dtype=np.bool_), None
    weights = None if shown.weights is None else np.asarray(shown.weights)
    if isinstance(passed_over, list | dict):
        assert outcome is not None and shown.context is not None
        values = texts_of(shown.context[outcome], str(file))
        each = passed_over if isinstance(passed_over, dict) else dict.fromkeys(passed_over, 1.0)
        of_values = values.replace_strict(each, default=None, return_dtype=pl.Float64)
        skipped, labels = of_values.is_not_null().to_numpy(), np.zeros(len(shown), dtype=np.float32)
        if isinstance(passed_over, dict):
            weights = of_values.fill_null(0.0).to_numpy().astype(np.float32) * (1.0 if weights is None else weights)
    elif shown.labels is not None:
        labels = np.asarray(shown.labels)
        skipped = labels < passed_over
    queries = data.queries.encode(shown.queries.ids)[shown.query_codes()]
    items = data.items.encode(shown.items.ids)[shown.item_codes]
    known = (queries >= 0) & (items >= 0)
    kept = np.flatnonzero(skipped & known)
    account = Account(list(data.account.lines))
    account.add("impressions read", len(shown), f"{Path(file).name}, {int((~skipped).sum()):,} with another outcome")
    account.add("impressions: unknown ids", int((skipped & ~known).sum()), "query or item not in the data, left out")
    account.add("impressions passed over", len(kept), "stored as observed negatives")
    if not len(kept):
        raise InputError(
            f"{file}: none of the {len(shown):,} impressions is a passed-over item of a query of the data "
            f"({int(skipped.sum()):,} passed over, {int((skipped & ~known).sum()):,} of them with an unknown query or "
            "item); check data.feedback.columns and data.feedback.passed_over"
        )
    order = kept[np.argsort(queries[kept], kind="stable")]  # stable: keeps a query's rows in time order
    below = Interactions(
        data.queries,
        data.items,
        np.searchsorted(queries[order], np.arange(data.num_queries + 1)).astype(np.int64),
        items[order].astype(np.int32),
        timestamps=None if shown.timestamps is None else np.asarray(shown.timestamps)[order],
        weights=None if weights is None else weights[order],
        labels=None if labels is None else labels[order],
        context=None if request is None or shown.context is None else shown.context.select(request)[order],
    )
    fingerprint = combined({"interactions": data.fingerprint, "impressions": shown.fingerprint})
    return replace(data, negatives=below, account=account, known_fingerprint=fingerprint)
