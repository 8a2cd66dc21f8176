"""Known and new queries: conversion of ids to codes and histories, and the rule that decides which can be answered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import compress
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.loading.histories import take_ranges
from twotower.data.schema.vocabulary import CodedIds, Codes, HashedIds, Vocabulary, ids_of
from twotower.errors import InputError
from twotower.features.requests import ContextRows, given_gaps
from twotower.serving.events import EventTypes
from twotower.serving.model_folder import SavedModel

Marks = NDArray[np.int8]

Mask = NDArray[np.bool_]

#: Why an id is rejected.
UNKNOWN_ID = "unknown to this model"

#: Why a query whose history has no item of the catalog is rejected.
NO_KNOWN_ITEM = (
    "none of its items is in the catalog, so nothing is known about this query; give at least one known item id"
)

#: Why a query whose features and context have no value is rejected.
NO_VALUE = (
    "no value is given, so nothing is known about this query; give a query id, a text, a history, features or a context"
)

#: Why a model whose query tower reads no history cannot answer a query given by a history alone.
NO_HISTORY = (
    "this model reads no history (query_tower.history: null), so nothing is known about this query; give the id of a "
    "known query, or features or context if the model takes them"
)

#: Maximum number of values in a list, and of characters in a text, in a column of features or of a context.
LONGEST_LIST, LONGEST_TEXT = 5000, 20_000

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = 2**63 - 1


class UnknownIdError(InputError):
    """Raised if an id that a request needs does not exist in this model; the service responds with 404, not 422."""


class ResolvedQuery(NamedTuple):
    """One query as codes.

    Attributes:
        code: code of the query, -1 for a new query.
        items: item codes of its history, oldest first.
        marks: int8, gap code or event type of each of these items; see `QueryBatch.marks`.
    """

    code: int
    items: Codes
    marks: Marks


@dataclass(frozen=True)
class QueryBatch:
    """A batch of queries, ready to be embedded.

    Attributes:
        ids: names of the queries in results: ids, or positions if no ids were given.
        codes: int64 [B], -1 for a query that is not in the training data.
        offsets, items: histories in compressed rows, int64 [B+1] and item codes, oldest first.
        features: declared columns of each query; None, for one query or all, to use the features known from training.
        context: declared columns of each query's request; None, for one query or all, if the context is unknown.
        marks: int8, for each of `items` the code of the gap before it (data/loading/gaps.py) or its event type as an
            index into `TwoTower.event_types`, whichever the tower reads; None if unknown.
    """

    ids: pl.Series
    codes: Codes
    offsets: Codes
    items: NDArray[np.int32]
    features: Sequence[Mapping[str, Any] | None] | None = None
    context: ContextRows | None = None
    marks: Marks | None = None

    @property
    def histories(self) -> tuple[Codes, NDArray[np.int32]]:
        """The histories as a pair of offsets and items."""
        return self.offsets, self.items

    @classmethod
    def of(
        cls,
        artifact: SavedModel,
        queries: Sequence[Any] | None,
        histories: Sequence[Sequence[Any]] | None,
        features: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        context: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        times: Sequence[Sequence[Any] | None] | None = None,
        history_events: Sequence[Sequence[Any] | None] | None = None,
    ) -> QueryBatch:
        """Make a batch from ids.

        Args:
            artifact: the model.
            queries: ids of known queries; their history in the data is used unless `histories` is given.
            histories: item ids, oldest first; unknown items are left out. If the query tower reads no history,
                histories are used only to exclude seen items. A history alone is then rejected, because the result
                would be the same for every history.
            features: for each query, the columns declared in query_tower.features.
            context: for each query's request, the columns declared in query_tower.context; or one mapping for all.
            times: timestamp of each item in `histories`, for a model that reads gaps.
            history_events: event type of each item in `histories`, for a model that reads them. None, for one query or
                all, means the default type of requests.

        Raises:
            InputError: no query is given, a query is unknown, the numbers of rows differ, or a query cannot be answered
                (see `answerable`).
        """
        require_something(
            {"query ids": queries, "text": None, "histories": histories, "features": features, "context": context}
        )
        if queries is not None:
            queries = id_list(queries, "queries")
            codes = known_codes(artifact.queries, queries, "query", artifact)
            hashed = isinstance(artifact.queries, HashedIds)
            ids = ids_of(queries, "queries") if hashed else artifact.queries.decode(codes)
        else:
            codes = np.full(_count(histories, features, context), -1, dtype=np.int64)
            ids = pl.Series("query", range(len(codes)), dtype=pl.Int64)
        features = _rows_of(features, "features", len(codes))
        contexts = [context] * len(codes) if isinstance(context, Mapping) else context
        contexts = _rows_of(contexts, "context", len(codes))
        marks: Marks | None = None
        for name, given in (("times", times), ("history_events", history_events)):
            if given is not None and (histories is None or not is_list(given) or len(given) != len(histories)):
                raise InputError(f"{name}: expected one row of {name} for each history")
        if histories is not None:
            compressed, marks = _encode_histories(artifact, histories, len(codes), times, history_events)
        elif queries is not None:
            compressed, marks = stored_histories(artifact, codes), stored_marks(artifact, codes)
        else:
            compressed = np.zeros(len(codes) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32)
        batch = cls(ids, codes, *compressed, features, contexts, marks)
        unknown = np.flatnonzero(~batch.answerable(artifact))
        if len(unknown):
            row = int(unknown[0])
            new = "query" if histories is None else "history"
            subject = f"query {ids[row]!r}" if codes[row] >= 0 else f"{new} {row + 1}"
            raise InputError(f"{subject}: {unanswerable(artifact, int(codes[row]), has_history=histories is not None)}")
        return batch

    def answerable(self, artifact: SavedModel) -> Mask:
        """Mark the queries that the model can answer; see the function `answerable`."""
        return answerable(artifact, self.codes, np.diff(self.offsets), self.features, self.context)

    def select(self, chosen: Mask) -> QueryBatch:
        """Return some of the queries, given as bool [B]."""
        sizes, context = np.diff(self.offsets), self.context
        of_items = np.repeat(chosen, sizes)
        mask = pl.Series(chosen, dtype=pl.Boolean)
        return QueryBatch(
            self.ids.filter(mask),
            self.codes[chosen],
            np.concatenate([[0], np.cumsum(sizes[chosen])]).astype(np.int64),
            self.items[of_items],
            None if self.features is None else list(compress(self.features, chosen)),
            context.filter(mask)
            if isinstance(context, pl.DataFrame)
            else None
            if context is None
            else list(compress(context, chosen)),
            None if self.marks is None else self.marks[of_items],
        )


def answerable(
    artifact: SavedModel,
    codes: Codes,
    sizes: Codes,
    features: Sequence[Mapping[str, Any] | None] | None = None,
    context: ContextRows | None = None,
) -> Mask:
    """Mark the queries that a model can answer, bool [B]: some input that its query tower reads is known.

    Such an input is an id with a training row or with features from training; a history with an item of the catalog, if
    the tower reads histories; features; or a context with a value other than the event type. Whether the model has
    features or a context is checked when they are encoded.

    Args:
        artifact: the model.
        codes: int64 [B], -1 for a new query.
        sizes: int64 [B], number of catalog items in the history of each query.
        features: features of each query; None, for one query or all, if not given.
        context: context of each query's request; None, for one query or all, if not given.
    """
    known = known_from_training(artifact, codes)
    if reads_history(artifact):
        known |= sizes > 0
    if features is not None:
        known |= np.array([row is not None for row in features], dtype=np.bool_)
    events = artifact.config.data.events
    own = None if events is None else events.column  # it says what is requested, but nothing about the query
    if isinstance(context, pl.DataFrame):
        columns = [name for name in context.columns if name != own]
        if columns:
            known |= context.select(pl.any_horizontal(pl.col(columns).is_not_null())).to_series().to_numpy()
    elif context is not None:
        given = [row is not None and any(v is not None for name, v in row.items() if name != own) for row in context]
        known |= np.array(given, np.bool_)
    return known


def unanswerable(artifact: SavedModel, code: int, *, has_history: bool) -> str:
    """Explain why a query that is not `answerable` cannot be answered, and what to give instead.

    Args:
        artifact: the model.
        code: code of the query, -1 for a new query.
        has_history: True if the request had a history.
    """
    if code < 0 and not has_history:
        return NO_VALUE
    if code < 0:
        return NO_KNOWN_ITEM if reads_history(artifact) else NO_HISTORY
    instead = "give its history" if reads_history(artifact) else "expected a query with a training row"
    context = "" if artifact.towers.context_features is None else ", or the context of the request"
    return "it has no training row, so its id was not trained, and nothing else is known about it; " + instead + context


def require_something(inputs: Mapping[str, Any]) -> None:
    """Check that a request describes its query.

    Args:
        inputs: name of each input that can describe a query -> its value, or None.

    Raises:
        InputError: none of the inputs is given.
    """
    if all(value is None for value in inputs.values()):
        *others, last = inputs
        raise InputError(f"expected {', '.join(others)} or {last}; found none of them")


def resolve(
    artifact: SavedModel,
    query: Any,
    history: Sequence[Any] | None,
    times: Sequence[Any] | None,
    history_events: Sequence[Any] | None = None,
) -> ResolvedQuery:
    """Turn the id and history of one request into codes and marks; `answerable` tests whether it can be answered.

    Args:
        artifact: the model.
        query: id of a known query, or None.
        history: item ids, oldest first; None for the history of the query in the data.
        times: timestamp of each item in `history`, or None.
        history_events: event type of each item in `history`, or None for the default type.

    Raises:
        UnknownIdError: the query id is unknown.
        InputError: the times or types do not match the history.
    """
    code = -1
    if query is not None:
        code = int(seen_codes(artifact, codes_of(artifact.queries, [query]))[0])
        if code < 0:
            raise UnknownIdError(f"query_id: {UNKNOWN_ID}")
    if history is not None:
        codes = codes_of(artifact.items, history)
        marks = given_marks(artifact, len(codes), times, history_events)
        return ResolvedQuery(code, codes[codes >= 0], marks[codes >= 0])
    for name, given in (("times", times), ("history_events", history_events)):
        if given is not None:
            raise InputError(f"{name}: expected together with history, one for each of its items")
    items = stored_history(artifact, code)
    stored = artifact.history_marks
    marks = (
        np.zeros(len(items), dtype=np.int8) if stored is None or code < 0 else np.array(stored[_span(artifact, code)])
    )
    return ResolvedQuery(code, items, marks)


def reads_history(artifact: SavedModel) -> bool:
    """Return whether the query tower reads histories; otherwise they are used only to exclude seen items."""
    return artifact.config.query_tower.history is not None


def known_from_training(artifact: SavedModel, codes: Codes) -> Mask:
    """Mark the queries for which the code is enough, bool [B]: features from training or a trained id exist."""
    known = codes >= 0
    trained, tower = artifact.towers.trained_queries, artifact.towers.query_tower
    if trained is not None and tower.features is None:
        known &= trained.cpu().numpy()[np.maximum(codes, 0)]
    return known


def _count(*given: Sequence[Any] | Mapping[str, Any] | None) -> int:
    """Count new queries: the length of the first argument that is given, or 1 for a single context."""
    rows = next(rows for rows in given if rows is not None)
    return len(rows) if is_list(rows) else 1


def is_list(value: Any) -> bool:
    """Return whether a value is a list, as opposed to text, a mapping, an iterator or a zero-dimensional array."""
    if isinstance(value, str | bytes | Mapping) or getattr(value, "ndim", 1) == 0:
        return False
    return hasattr(value, "__iter__") and hasattr(value, "__len__")


def stored_history(artifact: SavedModel, code: int) -> Codes:
    """Return the item codes of the history of one query, oldest first; empty for code -1."""
    if code < 0:
        return np.empty(0, dtype=np.int64)
    return np.asarray(artifact.history_items[_span(artifact, code)], dtype=np.int64)


def _span(artifact: SavedModel, code: int) -> slice:
    return slice(int(artifact.history_offsets[code]), int(artifact.history_offsets[code + 1]))


def stored_histories(artifact: SavedModel, codes: Codes) -> tuple[Codes, NDArray[np.int32]]:
    """Return the histories of known queries from the model folder, in compressed rows."""
    offsets = artifact.history_offsets
    place, ends = take_ranges(offsets[codes], offsets[codes + 1])
    return ends, np.asarray(artifact.history_items[place], dtype=np.int32)


def stored_marks(artifact: SavedModel, codes: Codes) -> Marks | None:
    """Return the marks of the histories of known queries (`QueryBatch.marks`); None if the tower reads none."""
    if artifact.history_marks is None:
        return None
    offsets = artifact.history_offsets
    place, _ = take_ranges(offsets[codes], offsets[codes + 1])
    return np.asarray(artifact.history_marks[place], dtype=np.int8)


def trained_only(
    histories: tuple[Codes, NDArray[np.int32]], marks: Marks | None, count: int
) -> tuple[tuple[Codes, NDArray[np.int32]], Marks | None]:
    """Drop items with codes of `count` and above: they were added after training, so the tower has no row for them."""
    offsets, items = histories
    known = np.asarray(items) < count
    if bool(known.all()):
        return histories, marks
    kept = np.concatenate([[0], np.cumsum(known)])[offsets].astype(np.int64), items[known]
    return kept, None if marks is None else marks[known]


def seen_codes(artifact: SavedModel, codes: Codes) -> Codes:
    """Replace codes of hashed queries with -1 if no id in the data hashes to their row: every id hashes to some row."""
    if not isinstance(artifact.queries, HashedIds):
        return codes
    at = np.maximum(codes, 0)
    return np.where(artifact.history_offsets[at + 1] > artifact.history_offsets[at], codes, -1)


def codes_of(vocabulary: Vocabulary, ids: Sequence[Any]) -> Codes:
    """Return the codes of ids, each an integer or text; -1 for an id that is not in the vocabulary."""
    if isinstance(vocabulary, HashedIds):
        return vocabulary.encode(_texts(ids))
    if isinstance(vocabulary, CodedIds) or vocabulary.ids.dtype == pl.Int64:
        known = [_integer(one) for one in ids]
        codes = vocabulary.encode(np.array([0 if one is None else one for one in known], dtype=np.int64))
        return np.where([one is None for one in known], -1, codes) if known else codes
    return vocabulary.encode(_texts(ids))


def _texts(ids: Sequence[Any]) -> pl.Series:
    """Convert ids to text; null, which matches no id, for invalid Unicode, such as raw bytes from a command line."""
    texts = [str(one) for one in ids]
    valid = [one if one.isascii() or one == one.encode("utf-8", "replace").decode() else None for one in texts]
    return pl.Series("id", valid, dtype=pl.String)


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        if not _INTEGER.fullmatch(value):
            return None
        value = int(value)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if whole and -_INT64 <= value <= _INT64 else None


def known_codes(vocabulary: Vocabulary, ids: Sequence[Any], side: str, artifact: SavedModel) -> Codes:
    """Return the codes of ids that must be known.

    Raises:
        InputError: an id is unknown, or `ids` is not a list.
    """
    ids = id_list(ids, "queries" if side == "query" else "items")
    try:
        codes: Codes = vocabulary.encode(ids)
    except InputError:  # the ids have a different type, or several types
        codes = codes_of(vocabulary, ids)
    if vocabulary is artifact.queries:
        codes = seen_codes(artifact, codes)
    if bool((codes < 0).any()):
        unknown = ids[int(np.flatnonzero(codes < 0)[0])]
        example = "" if isinstance(vocabulary, HashedIds) else f"; expected an id such as {vocabulary.decode([0])[0]!r}"
        source = artifact.metadata.get("data", {}).get("source")
        trained = "" if source is None else f" (it was trained on {source})"
        raise InputError(f"{side} {unknown!r}: {UNKNOWN_ID}{trained}{example}")
    return codes


def id_list(ids: Any, name: str) -> list[Any]:
    """Return ids as a list.

    Raises:
        InputError: `ids` is a single value; text would be split into characters.
    """
    if not is_list(ids):
        raise InputError(f"{name}: expected a list of ids, found {ids!r:.80}; write [{ids!r:.80}]")
    return list(ids)


def require_flat(row: Any, name: str) -> None:
    """Check that the values of features or of a context are scalars or flat lists, all of bounded length.

    Args:
        row: a mapping from column to value.
        name: "features" or "context", for errors.

    Raises:
        InputError: the row is not a mapping, or a value is nested, too long, or an integer beyond 64 bits.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{name}: expected columns and values, found {type(row).__name__}")
    for column, value in row.items():
        where = f"{name}: column {str(column)[:80]!r}: "
        several = isinstance(value, list | tuple | pl.Series | np.ndarray)
        if several and len(value) > LONGEST_LIST:
            raise InputError(f"{where}expected at most {LONGEST_LIST:,} values, found {len(value):,}")
        for one in value if several else (value,):
            if not isinstance(one, _SCALARS):
                raise InputError(
                    f"{where}expected a number, text, true, false, null or a flat list of these, found "
                    f"{type(one).__name__}{' in a list' if several else ''}"
                )
            if isinstance(one, str) and len(one) > LONGEST_TEXT:
                raise InputError(f"{where}expected text of at most {LONGEST_TEXT:,} characters, found {len(one):,}")
            if isinstance(one, Decimal) and not one.is_finite():
                raise InputError(f"{where}expected a finite number, found {one}")
            if isinstance(one, int) and abs(one) > _INT64:
                raise InputError(f"{where}expected an integer of at most 64 bits, found a larger one")


_SCALARS = (type(None), bool, int, float, str, date, time, timedelta, Decimal, np.generic)


def _rows_of(rows: Any, name: str, count: int) -> Any:
    """Check that there is one valid row of values for each query; None stays None."""
    if rows is None:
        return None
    if not is_list(rows):
        raise InputError(f"{name}: expected a list with one dict for each query, found {type(rows).__name__}")
    if len(rows) != count:
        raise InputError(f"{name}: expected one row for each query, {count}; found {len(rows)}")
    for row in rows:
        if row is not None:
            require_flat(row, name)
    return rows


def _encode_histories(
    artifact: SavedModel,
    histories: Sequence[Sequence[Any]],
    count: int,
    times: Sequence[Sequence[Any] | None] | None,
    events: Sequence[Sequence[Any] | None] | None,
) -> tuple[tuple[Codes, NDArray[np.int32]], Marks | None]:
    """Encode given histories as codes in compressed rows, with the marks of their items."""
    if not is_list(histories):
        raise InputError(f"histories: expected a list of lists of item ids, found {histories!r:.80}")
    if len(histories) != count:
        raise InputError(f"histories: expected one for each query, {count}; found {len(histories)}")
    lists = [id_list(history, "histories") for history in histories]
    encoded = [artifact.items.encode(history) if len(history) else np.empty(0, dtype=np.int64) for history in lists]
    known = [codes[codes >= 0] for codes in encoded]
    offsets = np.concatenate([[0], np.cumsum([len(codes) for codes in known])]).astype(np.int64)
    flat = np.concatenate([*known, np.empty(0, dtype=np.int64)]).astype(np.int32)
    if times is None and events is None and artifact.towers.history_marks != "events":
        return (offsets, flat), None
    nothing: list[None] = [None] * count
    marks = [
        given_marks(artifact, len(codes), of_times, of_events)[codes >= 0]
        for codes, of_times, of_events in zip(encoded, times or nothing, events or nothing, strict=True)
    ]
    return (offsets, flat), np.concatenate([*marks, np.empty(0, dtype=np.int8)])


def given_marks(
    artifact: SavedModel, count: int, times: Sequence[Any] | None = None, events: Sequence[Any] | None = None
) -> Marks:
    """Return the marks of the items of a history given in a request, int8 [count]; see `QueryBatch.marks`.

    Args:
        artifact: the model.
        count: the number of items.
        times: timestamps of the items; None if unknown.
        events: event types of the items; None for the default type of requests.

    Raises:
        InputError: the numbers of items and times or types differ, a time or type is invalid, or the model does not
            read types.
    """
    known = EventTypes.of(artifact.config.data.events)
    if artifact.towers.history_marks != "events" or known is None:
        if events is not None:
            raise InputError(
                "history_events: this model does not read the event types of a history; leave them out, or train with "
                "data.events and query_tower.history.event_weights: true"
            )
        if times is not None and not is_list(times):
            raise InputError(f"times: expected a list of times, one per item of the history, found {times!r:.80}")
        return given_gaps(times, count)
    if events is None:
        return np.full(count, known.names.index(known.default), dtype=np.int8)
    if not is_list(events) or len(events) != count:
        found = f"{len(events)}" if is_list(events) else f"{events!r:.80}"
        raise InputError(
            f"history_events: expected a list with one type per item of the history, {count}; found {found}"
        )
    return np.array([known.names.index(known.check(name, "history_events")) for name in events], dtype=np.int8)
