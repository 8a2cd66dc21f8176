"""Batches of queries, known or new: ids turned into codes and histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.loading.histories import take_ranges
from twotower.data.schema.vocabulary import Codes, HashedIds, Vocabulary, ids_of
from twotower.errors import InputError
from twotower.features.requests import Given, given_gaps
from twotower.serving.model_folder import SavedModel

Gaps = NDArray[np.int8]

#: Why a model whose query tower reads no history cannot answer a query given by a history alone.
NO_HISTORY = (
    "this model reads no history (query_tower.history: null), so nothing is known of this query; give the id of a "
    "known query, or features or context if the model takes them"
)


@dataclass(frozen=True)
class QueryBatch:
    """A batch of queries, ready to be embedded.

    Attributes:
        ids: names of the queries in results: ids, or positions if only histories were given.
        codes: int64 [B], -1 for a query that is not in the training data.
        offsets, items: histories in compressed rows, int64 [B+1] and item codes, oldest first.
        features: declared columns of each query; None in a row, or for all, to use the features known from training.
        context: declared columns of each query's request; None in a row, or for all, if the context is unknown.
        gaps: int8, code of the gap before each of `items` (data/gaps.py); None if the tower reads no gaps.
    """

    ids: pl.Series
    codes: Codes
    offsets: Codes
    items: NDArray[np.int32]
    features: Sequence[Mapping[str, Any] | None] | None = None
    context: Given | None = None
    gaps: Gaps | None = None

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
    ) -> QueryBatch:
        """Make a batch from ids.

        Args:
            artifact: the model.
            queries: ids of known queries; their history in the data is used unless `histories` is given.
            histories: item ids, oldest first; unknown items are left out. If the query tower reads no history, they
                only say which items were seen, so that results can leave these out. A history alone is then refused,
                because the result would be the same for every history.
            features: for each query, the columns declared in query_tower.features.
            context: for each query's request, the columns declared in query_tower.context; or one mapping for all.
            times: timestamps of the items of `histories`, one for each; for a model that reads gaps.

        Raises:
            InputError: nothing is given, a query is unknown, the numbers of rows differ, or nothing that the query
                tower reads is known of a query.
        """
        if queries is None and histories is None and features is None and context is None:
            raise InputError("recommend: expected query ids, histories or features, found none of them")
        if queries is not None:
            codes = known_codes(artifact.queries, queries, "query", artifact)
            hashed = isinstance(artifact.queries, HashedIds)
            ids = ids_of(list(queries), "queries") if hashed else artifact.queries.decode(codes)
        else:
            codes = np.full(_count(histories, features, context), -1, dtype=np.int64)
            ids = pl.Series("query", range(len(codes)), dtype=pl.Int64)
        if features is not None and len(features) != len(codes):
            raise InputError(f"features: expected one row for each query, {len(codes)}; found {len(features)}")
        if isinstance(context, Mapping):
            context = [context] * len(codes)
        if context is not None and len(context) != len(codes):
            raise InputError(f"context: expected one row for each query, {len(codes)}; found {len(context)}")
        gaps = None
        if times is not None and (histories is None or len(times) != len(histories)):
            raise InputError("times: expected one row of times for each of histories")
        if histories is not None:
            found, gaps = _given(artifact.items, histories, len(codes), times)
        elif queries is not None:
            found, gaps = stored_histories(artifact, codes), stored_gaps(artifact, codes)
        else:
            found = np.zeros(len(codes) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32)
        batch = cls(ids, codes, *found, features, context, gaps)
        batch.refuse_unknown(artifact)
        return batch

    def refuse_unknown(self, artifact: SavedModel) -> None:
        """Refuse queries of which nothing that the query tower reads is known: id, features, context or history.

        Raises:
            InputError: there is such a query.
        """
        unknown, read = ~told_by_id(artifact, self.codes), reads_history(artifact)
        if read:
            unknown &= np.diff(self.offsets) == 0
        for rows in (self.features, self.context):
            if rows is not None and not isinstance(rows, pl.DataFrame):
                unknown &= np.array([row is None for row in rows], dtype=np.bool_)
        if bool(unknown.any()):
            row = int(np.flatnonzero(unknown)[0])
            if self.codes[row] >= 0:
                raise InputError(f"query {self.ids[row]!r}: {no_training_row(artifact)}")
            if not read:
                raise InputError(f"history {row + 1}: {NO_HISTORY}")
            raise InputError(
                f"history {row + 1}: none of its items is in the catalog, so nothing is known of this query; "
                "give at least one known item id"
            )


def reads_history(artifact: SavedModel) -> bool:
    """True if the query tower reads histories; otherwise they only say which items were seen."""
    return artifact.config.query_tower.history is not None


def no_training_row(artifact: SavedModel) -> str:
    """Explain why the id alone is not enough for a query without a training row, and what to give instead."""
    give = "give its history" if reads_history(artifact) else "expected a query with a training row"
    more = "" if artifact.towers.context_features is None else ", or the context of the request"
    return f"it has no training row, so its id was not trained, and nothing else is known of it; {give}{more}"


def told_by_id(artifact: SavedModel, codes: Codes) -> NDArray[np.bool_]:
    """Mark the queries known by their code, bool [B]: by features from training, or by a trained id."""
    known = codes >= 0
    trained, tower = artifact.towers.trained_queries, artifact.towers.query_tower
    if trained is not None and tower.features is None:
        known &= trained.cpu().numpy()[np.maximum(codes, 0)]
    return known


def _count(*given: Sequence[Any] | Mapping[str, Any] | None) -> int:
    """Count new queries: the rows of the first argument given, or 1 for a single context."""
    return next((1 if isinstance(rows, Mapping) else len(rows) for rows in given if rows is not None), 0)


def stored_histories(artifact: SavedModel, codes: Codes) -> tuple[Codes, NDArray[np.int32]]:
    """Return the histories of known queries from the model folder, in compressed rows."""
    offsets = artifact.history_offsets
    place, ends = take_ranges(offsets[codes], offsets[codes + 1])
    return ends, np.asarray(artifact.history_items[place], dtype=np.int32)


def stored_gaps(artifact: SavedModel, codes: Codes) -> Gaps | None:
    """Return the gaps in the histories of known queries; None if the tower reads no gaps."""
    if artifact.history_gaps is None:
        return None
    offsets = artifact.history_offsets
    place, _ = take_ranges(offsets[codes], offsets[codes + 1])
    return np.asarray(artifact.history_gaps[place], dtype=np.int8)


def trained_only(
    histories: tuple[Codes, NDArray[np.int32]], gaps: Gaps | None, count: int
) -> tuple[tuple[Codes, NDArray[np.int32]], Gaps | None]:
    """Drop items with codes from `count` on: they were added after training, and the tower has no row for them."""
    offsets, items = histories
    known = np.asarray(items) < count
    if bool(known.all()):
        return histories, gaps
    kept = np.concatenate([[0], np.cumsum(known)])[offsets].astype(np.int64), items[known]
    return kept, None if gaps is None else gaps[known]


def seen_codes(artifact: SavedModel, codes: Codes) -> Codes:
    """Replace codes of hashed queries by -1 if no id of the data has their row: every id hashes to some row."""
    if not isinstance(artifact.queries, HashedIds):
        return codes
    at = np.maximum(codes, 0)
    return np.where(artifact.history_offsets[at + 1] > artifact.history_offsets[at], codes, -1)


def known_codes(vocabulary: Vocabulary, ids: Sequence[Any], side: str, artifact: SavedModel) -> Codes:
    """Return the codes of ids that must be known.

    Raises:
        InputError: an id is unknown.
    """
    try:
        codes: Codes = vocabulary.encode(list(ids))
    except InputError:  # not of the type of the ids
        codes = np.full(len(ids), -1, dtype=np.int64)
    if vocabulary is artifact.queries:
        codes = seen_codes(artifact, codes)
    if bool((codes < 0).any()):
        unknown = list(ids)[int(np.flatnonzero(codes < 0)[0])]
        hashed = isinstance(vocabulary, HashedIds)
        example = "the data has" if hashed else f"{vocabulary.decode([0])[0]!r}"
        where = artifact.metadata.get("data", {}).get("source", "the training data")
        raise InputError(f"{side} {unknown!r}: not in {where}; expected an id such as {example}")
    return codes


def _given(
    items: Vocabulary, histories: Sequence[Sequence[Any]], count: int, times: Sequence[Sequence[Any] | None] | None
) -> tuple[tuple[Codes, NDArray[np.int32]], Gaps | None]:
    """Encode given histories as codes in compressed rows, with the gaps in them if `times` is given."""
    if len(histories) != count:
        raise InputError(f"histories: expected one for each query, {count}; found {len(histories)}")
    found = [items.encode(list(history)) if len(history) else np.empty(0, dtype=np.int64) for history in histories]
    known = [codes[codes >= 0] for codes in found]
    offsets = np.concatenate([[0], np.cumsum([len(codes) for codes in known])]).astype(np.int64)
    flat = np.concatenate([*known, np.empty(0, dtype=np.int64)]).astype(np.int32)
    if times is None:
        return (offsets, flat), None
    gaps = [given_gaps(row, len(codes))[codes >= 0] for row, codes in zip(times, found, strict=True)]
    return (offsets, flat), np.concatenate([*gaps, np.empty(0, dtype=np.int8)])
