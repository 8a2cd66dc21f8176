"""What is asked: known queries and new ones, by ids, turned into codes and histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.histories import take_ranges
from twotower.errors import InputError
from twotower.schema import Vocabulary
from twotower.serving.artifact import Artifact

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Questions:
    """Some queries, ready to be embedded.

    Attributes:
        ids: what an answer calls them: ids, or positions where only histories were given.
        codes: int64 [B], -1 for a query that training never saw.
        offsets, items: their histories in compressed rows, int64 [B+1] and item codes, oldest first.
        features: for each query what its declared columns hold, or None for what training knew of it; None for all.
    """

    ids: pl.Series
    codes: Codes
    offsets: Codes
    items: NDArray[np.int32]
    features: Sequence[Mapping[str, Any] | None] | None = None

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
    ) -> Questions:
        """From ids.

        Args:
            artifact: the model.
            queries: ids of known queries; their history in the data is taken unless `histories` is given.
            histories: item ids, oldest first; unknown items are left out.
            features: what the columns declared in query_tower.features hold, for each query.

        Raises:
            InputError: neither is given, a query is unknown, there is not one history for each query, or nothing is
                known of a query.
        """
        if queries is None and histories is None and features is None:
            raise InputError("recommend: expected query ids, histories or features, found none of them")
        if queries is not None:
            codes = known_codes(artifact.queries, queries, "query", artifact)
            ids = artifact.queries.decode(codes)
        else:
            codes = np.full(len(features or [] if histories is None else histories), -1, dtype=np.int64)
            ids = pl.Series("query", range(len(codes)), dtype=pl.Int64)
        if features is not None and len(features) != len(codes):
            raise InputError(f"features: expected one row for each query, {len(codes)}; found {len(features)}")
        if histories is not None:
            found = _given(artifact.items, histories, len(codes))
        elif queries is not None:
            found = stored_histories(artifact, codes)
        else:
            found = np.zeros(len(codes) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32)
        asked = cls(ids, codes, *found, features)
        asked.refuse_unknown()
        return asked

    def refuse_unknown(self) -> None:
        """Refuse a new query without features whose history holds no item of the catalog.

        Raises:
            InputError: there is one.
        """
        nothing = (self.codes < 0) & (np.diff(self.offsets) == 0)
        if self.features is not None:
            nothing &= np.array([row is None for row in self.features], dtype=np.bool_)
        if bool(nothing.any()):
            row = int(np.flatnonzero(nothing)[0])
            raise InputError(
                f"history {row + 1}: none of its items is in the catalog, so nothing is known of this query; "
                "give at least one known item id"
            )


def stored_histories(artifact: Artifact, codes: Codes) -> tuple[Codes, NDArray[np.int32]]:
    """The histories that the model folder holds for known queries."""
    offsets = artifact.history_offsets
    place, ends = take_ranges(offsets[codes], offsets[codes + 1])
    return ends, np.asarray(artifact.history_items[place], dtype=np.int32)


def trained_only(histories: tuple[Codes, NDArray[np.int32]], count: int) -> tuple[Codes, NDArray[np.int32]]:
    """Histories without items of codes from `count` on: they joined after training, and a tower has no row for them."""
    offsets, items = histories
    known = np.asarray(items) < count
    if bool(known.all()):
        return histories
    return np.concatenate([[0], np.cumsum(known)])[offsets].astype(np.int64), items[known]


def known_codes(vocabulary: Vocabulary, ids: Sequence[Any], side: str, artifact: Artifact) -> Codes:
    """Codes of ids that have to be known.

    Raises:
        InputError: one is not.
    """
    try:
        codes: Codes = vocabulary.encode(list(ids))
    except InputError:  # not even of the kind that the ids are
        codes = np.full(len(ids), -1, dtype=np.int64)
    if bool((codes < 0).any()):
        unknown = list(ids)[int(np.flatnonzero(codes < 0)[0])]
        example = vocabulary.decode([0])[0]
        where = artifact.metadata.get("data", {}).get("source", "the training data")
        raise InputError(f"{side} {unknown!r}: not in {where}; expected an id such as {example!r}")
    return codes


def _given(items: Vocabulary, histories: Sequence[Sequence[Any]], count: int) -> tuple[Codes, NDArray[np.int32]]:
    if len(histories) != count:
        raise InputError(f"histories: expected one for each query, {count}; found {len(histories)}")
    known = [_known(items, history) for history in histories]
    offsets = np.concatenate([[0], np.cumsum([len(codes) for codes in known])]).astype(np.int64)
    return offsets, np.concatenate([*known, np.empty(0, dtype=np.int64)]).astype(np.int32)


def _known(items: Vocabulary, history: Sequence[Any]) -> Codes:
    codes = items.encode(list(history)) if len(history) else np.empty(0, dtype=np.int64)
    return codes[codes >= 0]
