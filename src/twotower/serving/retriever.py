"""A trained model that answers: items for a query, items like an item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn import functional as F

from twotower.data import Holdout
from twotower.errors import InputError
from twotower.evaluation.towers import TowerRanker
from twotower.index import ExactIndex
from twotower.schema import title_column
from twotower.serving.artifact import Artifact


class Retriever:
    """Answers queries from a model folder; needs no trainer.

    Args:
        artifact: what `Artifact.load` read.

    Example:
        retriever = twotower.Retriever.load("model/")
        retriever.recommend(["196"], k=10)
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        history = artifact.config.query_tower.history
        self.ranker = TowerRanker(artifact.towers, history.length if history else 0, artifact.item_embeddings)
        column = None if artifact.item_table is None else title_column(artifact.item_table)
        self.title_column = column
        self._neighbours: ExactIndex | None = None

    @classmethod
    def load(cls, directory: str | Path) -> Retriever:
        """Read a model folder, checksums verified.

        Raises:
            InputError: see `Artifact.load`.
        """
        return cls(Artifact.load(directory))

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray:
        """Rank for an evaluation: int64 [E, k]. The very search that `recommend` uses."""
        return self.ranker.rank(holdout, k, exclude_seen)

    def recommend(
        self,
        queries: Sequence[Any] | None = None,
        *,
        histories: Sequence[Sequence[Any]] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
    ) -> pl.DataFrame:
        """The K best items for each query.

        Args:
            queries: ids of known queries; their whole history in the data is taken, unless `histories` is given.
            histories: item ids of each query, oldest first; without `queries` the queries are new ones. Unknown items
                are left out.
            k: how many items for each query.
            exclude_seen: leave out the items of the history.

        Returns:
            Columns `query` (id, or position where only histories are given), `rank` from 1, `item` (id), `score`, and
            `title` where the item table has one. A query with fewer than K items left has fewer rows.

        Raises:
            InputError: a query id is unknown; k < 1; nothing asked; a history without any known item for a model that
                knows queries by their history alone.
        """
        if k < 1:
            raise InputError(f"k: expected at least 1, found {k}")
        if queries is None and histories is None:
            raise InputError("recommend: expected query ids or histories, found neither")
        codes = self._query_codes(queries) if queries is not None else np.full(len(histories or []), -1)
        rows = self._known_histories(codes) if histories is None else self._given_histories(histories, len(codes))
        self._refuse_empty(codes, rows[0])
        scores, items = self.ranker.search(codes, rows, k, exclude=rows if exclude_seen else None)
        asked = pl.Series(range(len(codes))) if queries is None else self.artifact.queries.decode(codes)
        return self._frame("query", asked, items, scores)

    def similar(self, items: Sequence[Any], k: int = 10) -> pl.DataFrame:
        """The K items nearest to each item, by cosine of the item embeddings; the item itself is left out.

        Returns:
            Columns `of` (the item asked about), `rank`, `item`, `score`, and `title` where there is one.

        Raises:
            InputError: an item id is unknown; k < 1.
        """
        if k < 1:
            raise InputError(f"k: expected at least 1, found {k}")
        codes = self._item_codes(items)
        if self._neighbours is None:
            self._neighbours = ExactIndex(F.normalize(self.artifact.item_embeddings, dim=1))
        vectors = F.normalize(self.artifact.item_embeddings[torch.from_numpy(codes)], dim=1)
        own = (np.arange(len(codes) + 1, dtype=np.int64), codes)
        scores, found = self._neighbours.search(vectors, k, own)
        return self._frame("of", self.artifact.items.decode(codes), found, scores)

    def history(self, query: Any) -> pl.DataFrame:
        """The items of a known query in the data, oldest first: columns `item`, and `title` where there is one."""
        offsets, items = self._known_histories(self._query_codes([query]))
        del offsets
        return self._items_frame(items.astype(np.int64))

    def _frame(self, name: str, asked: pl.Series, items: torch.Tensor, scores: torch.Tensor) -> pl.DataFrame:
        count, k = items.shape
        codes = items.cpu().numpy().reshape(-1)
        found = codes >= 0
        # A few rows each: repeating ids as Series keeps their type.
        asked_rows = np.repeat(np.arange(count), k)[found]
        ranks = np.tile(np.arange(1, k + 1), count)[found]
        described = self._items_frame(codes[found])
        frame = pl.DataFrame(
            {
                name: asked.gather(asked_rows),
                "rank": ranks,
                "item": described["item"],
                "score": scores.cpu().numpy().reshape(-1)[found],
            }
        )
        return frame if "title" not in described.columns else frame.with_columns(described["title"])

    def _items_frame(self, codes: np.ndarray) -> pl.DataFrame:
        frame = pl.DataFrame({"item": self.artifact.items.decode(codes)})
        table = self.artifact.item_table
        if table is None or self.title_column is None:
            return frame
        return frame.with_columns(table[self.title_column].gather(codes).alias("title"))

    def _query_codes(self, queries: Sequence[Any]) -> np.ndarray:
        return _encode(self.artifact.queries, queries, "query", self.artifact.metadata)

    def _item_codes(self, items: Sequence[Any]) -> np.ndarray:
        return _encode(self.artifact.items, items, "item", self.artifact.metadata)

    def _known_histories(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets, items = self.artifact.history_offsets, self.artifact.history_items
        lengths = offsets[codes + 1] - offsets[codes]
        ends = np.cumsum(lengths)
        # Place of every item: the start of its row in the store, plus how far into the row it stands.
        place = np.repeat(offsets[codes] - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)
        return np.concatenate([[0], ends]).astype(np.int64), items[place]

    def _given_histories(self, histories: Sequence[Sequence[Any]], count: int) -> tuple[np.ndarray, np.ndarray]:
        if len(histories) != count:
            raise InputError(f"histories: expected one for each query, {count}; found {len(histories)}")
        known = [self._known_items(history) for history in histories]
        offsets = np.concatenate([[0], np.cumsum([len(codes) for codes in known])]).astype(np.int64)
        return offsets, np.concatenate([*known, np.empty(0, dtype=np.int64)]).astype(np.int32)

    def _known_items(self, history: Sequence[Any]) -> np.ndarray:
        codes = self.artifact.items.encode(list(history)) if len(history) else np.empty(0, dtype=np.int64)
        return codes[codes >= 0]

    def _refuse_empty(self, codes: np.ndarray, offsets: np.ndarray) -> None:
        nothing = (codes < 0) & (np.diff(offsets) == 0)
        if bool(nothing.any()):
            row = int(np.flatnonzero(nothing)[0])
            raise InputError(
                f"history {row + 1}: none of its items is in the catalog, so nothing is known of this query; "
                "give at least one known item id"
            )


def _encode(vocabulary: Any, ids: Sequence[Any], side: str, metadata: dict[str, Any]) -> np.ndarray:
    try:
        codes: np.ndarray = vocabulary.encode(list(ids))
    except InputError:  # not even of the kind that the ids are
        codes = np.full(len(ids), -1, dtype=np.int64)
    if bool((codes < 0).any()):
        unknown = list(ids)[int(np.flatnonzero(codes < 0)[0])]
        example = vocabulary.decode([0])[0]
        where = metadata.get("data", {}).get("source", "the training data")
        raise InputError(f"{side} {unknown!r}: not in {where}; expected an id such as {example!r}")
    return codes
