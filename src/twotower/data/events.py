"""The event type of each row, such as click, cart or purchase: a context column that determines the row's weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import polars as pl

from twotower.data.interactions import EventColumn, Interactions
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import listed, texts_of
from twotower.errors import InputError, counted


def with_events(
    data: Interactions, column: str, weights: Mapping[str, float] | None = None, *, held_out: str | None = None
) -> Interactions:
    """Multiply the weight of each row by the weight of its type, and make splits divide held-out queries by type.

    Args:
        data: the interactions, read with this context column.
        column: name of the column.
        weights: weight of each type, above 0; None for the types in the data, each with weight 1.
        held_out: the only type of the validation and test rows; None for all types, with a separate query for each.

    Returns:
        The interactions with new weights, and with the types as text in the context.

    Raises:
        InputError: the column was not read, the rows already have types, a row has no type or a type without a weight,
            or `held_out` has no row.
    """
    if data.context is None or column not in data.context.columns:
        raise InputError(
            f"data.events: column {column!r} was not read with the interactions; in Python pass context=[{column!r}] "
            "to Interactions.read or from_frame"
        )
    if data.event is not None:
        raise InputError(
            f"data.events: these rows are already weighted by their types, in {data.event.column!r}; pass the rows as "
            "they were read, or remove data.events"
        )
    types = texts_of(data.context[column], "data.events")
    counts = {name: count for name, count in types.value_counts().sort(column).rows() if name is not None}
    if types.null_count():
        raise InputError(
            f"data.events: column {column!r} is empty in {counted(types.null_count(), 'row')}; "
            "expected a type in every row"
        )
    factors = dict.fromkeys(counts, 1.0) if weights is None else dict(weights)
    for name, count in counts.items():
        if name not in factors:
            raise InputError(
                f"data.events: column {column!r} has {name!r} in {counted(count, 'row')}; expected "
                f"{listed(list(factors))}; add its weight to data.events.weights, or remove these rows"
            )
    if held_out is not None and held_out not in counts:
        raise InputError(f"data.events.held_out: {held_out!r}; expected a type in the data, {listed(list(counts))}")
    account = Account(list(data.account.lines))
    for name, count in counts.items():
        account.add(f"events {name}", count, f"weight {factors[name]:g}")
    row_weights = data.weights
    if any(factor != 1.0 for factor in factors.values()):  # even if no row here has such a type: another part may
        by_row = types.replace_strict(factors, return_dtype=pl.Float32).to_numpy()
        row_weights = by_row if row_weights is None else np.asarray(row_weights) * by_row
    return replace(
        data,
        weights=row_weights,
        context=data.context.with_columns(types),
        event=EventColumn(column, held_out),
        account=account,
    )
