"""Resolution, fitting and encoding of the features that a configuration declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import AnyFeature, CategoricalFeature, DenseFeature, Features, TextFeature
from twotower.config.run import Config, EventsConfig
from twotower.data.interactions import Interactions
from twotower.data.loading.batches import RepeatedRows
from twotower.data.prepare.request_context import ContextColumns, RowQueries
from twotower.data.schema.columns import title_column
from twotower.data.schema.vocabulary import Vocabulary, listed
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable, FeatureSet
from twotower.features.parsing import ErrorLocation, as_text
from twotower.features.suggest import features_of, propose, propose_context
from twotower.features.text import TextEncoder
from twotower.features.tokens import TokenEncoder


def with_features(config: Config, train: Interactions) -> Config:
    """Replace `auto` in the feature settings with the proposed features, and declare the event type and query text."""
    changed = {}
    for side, features, table in _declared(config, train):
        if features == "auto":
            section = f"{side}_tower"
            found = [] if table is None else features_of(propose(table))
            if side == "query" and config.data.texts_are_queries:
                found = _with_text(found, config.data.query_text)
            update: dict[str, Any] = {"features": found or "none"}
            if side == "item" and not found:
                update["id_dropout"] = 0.0  # no feature could replace the id
            changed[section] = getattr(config, section).model_copy(update=update)
    events, context = config.data.events, config.query_tower.context
    if context == "auto":
        proposed = [] if train.context is None else features_of(propose_context(train))
        known_otherwise = {*config.row_columns, *exposure_columns(config), None if events is None else events.column}
        context = [one for one in proposed if one.column not in known_otherwise] or "none"
        if config.data.query_text is not None and not config.data.texts_are_queries:
            context = _with_text([] if context == "none" else context, config.data.query_text)
    if events is not None:
        context = _with_event(context, events)
    if context != config.query_tower.context:
        section = changed.get("query_tower", config.query_tower)
        changed["query_tower"] = section.model_copy(update={"context": context})
    return config.model_copy(update=changed)


def _with_event(context: Features, events: EventsConfig) -> Features:
    """Add the event type to the declared features of a request.

    Raises:
        InputError: its column is already declared, as something other than a category, or with buckets or a `min_count`
            above 1.
    """
    declared = [] if isinstance(context, str) else list(context)
    own = [one for one in declared if one.column == events.column]
    for one in own:
        if not isinstance(one, CategoricalFeature):
            raise InputError(
                f"query_tower.context: column {one.column!r} is the event type of data.events and always a categorical "
                f"feature, found {one.kind}; remove it here"
            )
        if one.buckets is not None or one.min_count > 1:
            raise InputError(
                f"query_tower.context: column {one.column!r} is the event type of data.events, and each type needs its "
                "own value; remove buckets and min_count here, or the whole column"
            )
    assert events.column is not None
    return declared if own else [*declared, CategoricalFeature(column=events.column)]


def _with_text(declared: Sequence[AnyFeature], column: str | None) -> list[AnyFeature]:
    """Declare the column of the query text, as learned words, unless it is already declared as text."""
    assert column is not None
    own = any(one.column == column and isinstance(one, TextFeature) for one in declared)
    return [*declared, *([] if own else [TextFeature(column=column)])]


def fit_features(config: Config, train: Interactions) -> dict[str, FeatureSet]:
    """Fit the declared features of each side on the table rows that occur in training; omit sides without features.

    Raises:
        InputError: a table or column is missing, or a value has the wrong type.
    """
    fitted = {
        side: FeatureSet.fit(side, features, table, ids=_ids(train, side).ids, known=in_training(train, side))
        for side, features, table in _declared(config, train)
        if not isinstance(features, str) and features
    }
    context = config.query_tower.context
    if not isinstance(context, str) and context:
        fitted["context"] = FeatureSet.fit_rows("context", context, context_frame(context, train), context_place(train))
    return fitted


def encode_features(config: Config, train: Interactions) -> dict[str, EncodedTable]:
    """Fit as in `fit_features`, then encode the whole tables; the context belongs to rows, so it has no table."""
    tables = {"item": train.item_table, "query": train.query_table}
    return {
        side: EncodedTable.of_requests(fitted)
        if side == "context"
        else EncodedTable(fitted, fitted.encode_table(tables[side], _ids(train, side).ids))
        for side, fitted in fit_features(config, train).items()
    }


def context_to_read(config: Config) -> ContextColumns:
    """Return the columns to read with the interactions: context, query text, event type, feedback, weights, exposure.

    "all" if the context is `auto`; None if no column is needed.
    """
    declared = config.query_tower.context
    if declared == "auto":
        return "all"
    columns = [] if isinstance(declared, str) else [one.column for one in declared]
    if config.data.query_text is not None and not config.data.texts_are_queries:
        columns.append(config.data.query_text)
    if config.data.events is not None and config.data.events.column is not None:
        columns.append(config.data.events.column)
    return tuple(dict.fromkeys((*columns, *config.row_columns, *exposure_columns(config)))) or None


def exposure_columns(config: Config) -> tuple[str, ...]:
    """Return the columns of the log that only the evaluation reads, because a request does not have their values."""
    exposure = config.evaluation.exposure
    if exposure is None:
        return ()
    return tuple(name for name in (exposure.propensity, exposure.position, exposure.reward) if name is not None)


def encode_context(features: FeatureSet, data: Interactions) -> list[NDArray[Any] | RepeatedRows]:
    """Encode the context of every interaction as for a request; return arrays with one row per interaction.

    The embedding or the tokens of a text are hundreds of numbers, and many rows share a text, so each distinct text is
    encoded and stored once.

    Raises:
        InputError: a declared column was not read, or a value has the wrong type.
    """
    frame, place = context_frame(features.declared, data), context_place(data)
    found: list[NDArray[Any] | RepeatedRows] = []
    for one, encoder in zip(features.declared, features.encoders, strict=True):
        column = frame[one.column]
        if isinstance(encoder, TextEncoder | TokenEncoder) and not column.dtype.is_nested():
            texts = as_text(column, place)
            distinct = texts.drop_nulls().unique().sort()
            # A missing text has code -1, which indexes the last row.
            whole = pl.concat([distinct, pl.Series(distinct.name, [None], dtype=pl.String)])
            codes = Vocabulary(distinct).encode(texts).astype(np.int32)
            found.append(RepeatedRows(encoder.encode(whole, place), codes))
            continue
        encoded = encoder.encode(column, place)
        # int32 codes save memory, because there is one per interaction.
        found.append(encoded.astype(np.int32) if encoded.dtype == np.int64 else encoded)
    return found


def context_frame(declared: Sequence[AnyFeature], data: Interactions) -> pl.DataFrame:
    """Return the context of the interactions after checking that it has the declared columns.

    Raises:
        InputError: a declared column was not read, or comes from a file, which contains one vector per id.
    """
    for one in declared:
        if isinstance(one, DenseFeature) and one.file is not None:
            raise InputError(
                f"query_tower.context: {one.column!r}: a file has vectors for ids, not for requests; expected a column"
            )
        if data.context is None or one.column not in data.context.columns:
            raise InputError(
                f"query_tower.context: column {one.column!r} was not read with the interactions; in Python pass "
                f"context=[{one.column!r}] to Interactions.read or from_frame"
            )
    assert data.context is not None
    return data.context


def context_place(data: Interactions) -> ErrorLocation:
    """Return the location of the context rows for error messages."""
    return ErrorLocation("context of the interactions", RowQueries(data.offsets, data.queries), "query")


def unused_tables(config: Config, train: Interactions) -> list[str]:
    """Return a hint for each table with usable but unused features, and a hint if the items have no titles."""
    lines, rule = [], config.data.eligibility
    of_rule = [] if rule is None else rule.columns
    for side, features, table in _declared(config, train):
        found = [] if table is None else [one.column for one in features_of(propose(table))]
        columns = ", ".join(name for name in found if side == "query" or name not in of_rule)
        if features == "none" and columns:
            lines.append(
                f"{side} table: not used as features: {columns}; set {side}_tower.features=auto to use them "
                "(`twotower features` shows the proposed declarations)"
            )
    table = train.item_table
    if table is not None and title_column(table) is None:
        texts = [
            name
            for name in table.columns
            if table.schema[name] == pl.String and name not in of_rule and not table[name].equals(train.items.ids)
        ]
        if texts:
            lines.append(
                "item table: no text column is named title, name or description, so items are shown by their ids; "
                f"rename the human-readable column among {listed(texts)}"
            )
    return lines


def in_training(train: Interactions, side: str) -> NDArray[np.bool_]:
    """Return which ids of a side have a training row, bool [ids]."""
    return train.item_counts() > 0 if side == "item" else np.diff(train.offsets) > 0


def _ids(train: Interactions, side: str) -> Vocabulary:
    return train.items if side == "item" else train.queries


def _declared(config: Config, train: Interactions) -> list[tuple[str, Features, pl.DataFrame | None]]:
    return [
        ("item", config.item_tower.features, train.item_table),
        ("query", config.query_tower.features, train.query_table),
    ]
