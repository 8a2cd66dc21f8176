"""What is asked: known queries and new ones, by ids, turned into codes and histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.gaps import given_gaps
from twotower.data.given import Given
from twotower.data.histories import take_ranges
from twotower.errors import InputError
from twotower.ids import HashedIds
from twotower.schema import Vocabulary, ids_of
from twotower.serving.artifact import Artifact

Codes = NDArray[np.int64]
Gaps = NDArray[np.int8]

#: Why a history alone is no question to a model whose query tower reads none.
NO_HISTORY = (
    "this model reads no history (query_tower.history: null), so nothing is known of this query; give the id of a "
    "known query, or features or context where the model takes them"
)


@dataclass(frozen=True)
class Questions:
    """Some queries, ready to be embedded.

    Attributes:
        ids: what an answer calls them: ids, or positions where only histories were given.
        codes: int64 [B], -1 for a query that training never saw.
        offsets, items: their histories in compressed rows, int64 [B+1] and item codes, oldest first.
        features: for each query what its declared columns hold, or None for what training knew of it; None for all.
        context: of each query's request, by column, or None for nothing known of it; None for all.
        gaps: int8, code of the gap before each of `items` (data/gaps.py); None where the tower reads none.
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
        """The histories as a compressed-row pair."""
        return self.offsets, self.items

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        queries: Sequence[Any] | None,
        histories: Sequence[Sequence[Any]] | None,
        features: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        context: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        times: Sequence[Sequence[Any] | None] | None = None,
    ) -> Questions:
        """From ids.

        Args:
            artifact: the model.
            queries: ids of known queries; their history in the data is taken unless `histories` is given.
            histories: item ids, oldest first; unknown items are left out. Where the query tower reads no history they
                only say which items were seen, and an answer may leave those out: good beside a query id, features or
                context, and refused alone, as such an answer would be the same for every history.
            features: what the columns declared in query_tower.features hold, for each query.
            context: what the columns declared in query_tower.context hold, for each query's request, or for all alike.
            times: when the items of `histories` were met, one for each; for a model that reads gaps.

        Raises:
            InputError: neither is given, a query is unknown, there is not one history for each query, or nothing that
                the query tower reads is known of a query.
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
        asked = cls(ids, codes, *found, features, context, gaps)
        asked.refuse_unknown(artifact)
        return asked

    def refuse_unknown(self, artifact: Artifact) -> None:
        """Refuse a query of which neither id nor features and context tell, with no history that is read.

        Raises:
            InputError: there is one.
        """
        nothing, read = ~told_by_id(artifact, self.codes), reads_history(artifact)
        if read:
            nothing &= np.diff(self.offsets) == 0
        for rows in (self.features, self.context):
            if rows is not None and not isinstance(rows, pl.DataFrame):
                nothing &= np.array([row is None for row in rows], dtype=np.bool_)
        if bool(nothing.any()):
            row = int(np.flatnonzero(nothing)[0])
            if self.codes[row] >= 0:
                raise InputError(f"query {self.ids[row]!r}: {no_training_row(artifact)}")
            if not read:
                raise InputError(f"history {row + 1}: {NO_HISTORY}")
            raise InputError(
                f"history {row + 1}: none of its items is in the catalog, so nothing is known of this query; "
                "give at least one known item id"
            )


def reads_history(artifact: Artifact) -> bool:
    """Whether the query tower looks at histories; where not, they only say which items were seen."""
    return artifact.config.query_tower.history is not None


def no_training_row(artifact: Artifact) -> str:
    """Why a query of the data is no question by its id alone, and what to give."""
    give = "give items that it has met" if reads_history(artifact) else "expected a query with a training row"
    more = "" if artifact.towers.context_features is None else ", or the context of the request"
    return f"it has no training row, so its id says nothing, and nothing else is known of it; {give}{more}"


def told_by_id(artifact: Artifact, codes: Codes) -> NDArray[np.bool_]:
    """Which queries their codes tell something of: by features that training knew, or by an id that was trained."""
    known = codes >= 0
    trained, tower = artifact.towers.trained_queries, artifact.towers.query_tower
    if trained is not None and tower.features is None:
        known &= trained.cpu().numpy()[np.maximum(codes, 0)]
    return known


def _count(*given: Sequence[Any] | Mapping[str, Any] | None) -> int:
    """How many new queries are asked for: as many as the first that is given for each of them; one for one context."""
    return next((1 if isinstance(rows, Mapping) else len(rows) for rows in given if rows is not None), 0)


def stored_histories(artifact: Artifact, codes: Codes) -> tuple[Codes, NDArray[np.int32]]:
    """The histories that the model folder holds for known queries."""
    offsets = artifact.history_offsets
    place, ends = take_ranges(offsets[codes], offsets[codes + 1])
    return ends, np.asarray(artifact.history_items[place], dtype=np.int32)


def stored_gaps(artifact: Artifact, codes: Codes) -> Gaps | None:
    """The gaps in the histories that the model folder holds for known queries; None where the tower reads none."""
    if artifact.history_gaps is None:
        return None
    offsets = artifact.history_offsets
    place, _ = take_ranges(offsets[codes], offsets[codes + 1])
    return np.asarray(artifact.history_gaps[place], dtype=np.int8)


def trained_only(
    histories: tuple[Codes, NDArray[np.int32]], gaps: Gaps | None, count: int
) -> tuple[tuple[Codes, NDArray[np.int32]], Gaps | None]:
    """Histories without items of codes from `count` on: they joined after training, and a tower has no row for them."""
    offsets, items = histories
    known = np.asarray(items) < count
    if bool(known.all()):
        return histories, gaps
    kept = np.concatenate([[0], np.cumsum(known)])[offsets].astype(np.int64), items[known]
    return kept, None if gaps is None else gaps[known]


def seen_codes(artifact: Artifact, codes: Codes) -> Codes:
    """Codes of queries, -1 for hashed ones whose row no id of the data has: every id has a row."""
    if not isinstance(artifact.queries, HashedIds):
        return codes
    at = np.maximum(codes, 0)
    return np.where(artifact.history_offsets[at + 1] > artifact.history_offsets[at], codes, -1)


def known_codes(vocabulary: Vocabulary, ids: Sequence[Any], side: str, artifact: Artifact) -> Codes:
    """Codes of ids that have to be known.

    Raises:
        InputError: one is not.
    """
    try:
        codes: Codes = vocabulary.encode(list(ids))
    except InputError:  # not even of the kind that the ids are
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
    """Histories that somebody gives, as codes in compressed rows, and the gaps in them where their times are given."""
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
