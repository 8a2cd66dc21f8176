"""A trained model that answers: items for a query, items like an item, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn import functional as F

from twotower.data import Holdout
from twotower.errors import InputError
from twotower.evaluation.towers import gaps_of
from twotower.index import ApproximateIndex, Index
from twotower.index.popularity import checked_popularity
from twotower.serving.answers import Answers
from twotower.serving.artifact import Artifact, find_model
from twotower.serving.changes import Changes
from twotower.serving.embedding import QueryEmbedder
from twotower.serving.explain import Explanation, explain
from twotower.serving.filters import allowed_items
from twotower.serving.live import LiveCatalog
from twotower.serving.questions import Questions, known_codes, stored_histories
from twotower.serving.search import Search
from twotower.serving.stored import load_stored_index


class Retriever(QueryEmbedder):
    """Answers queries from a model folder; needs no trainer.

    Items join, change and leave by `retriever.catalog`; see `LiveCatalog`.

    Args:
        artifact: what `Artifact.load` read.
        index: an approximate index over the model's items, as `twotower index` builds it; exact search where None.
        changes: items that joined, changed and left since training; the index has them already.

    Example:
        retriever = twotower.Retriever.load("model/")
        retriever.recommend(["196"], k=10, filter="year > 1990", popularity=0.5)
    """

    def __init__(
        self, artifact: Artifact, index: ApproximateIndex | None = None, changes: Changes | None = None
    ) -> None:
        super().__init__(artifact)
        self.catalog = LiveCatalog(artifact, index, changes)

    @classmethod
    def load(cls, directory: str | Path, *, exact: bool = False) -> Retriever:
        """Read a model folder and the index that `twotower index` has put into it, checksums verified.

        Args:
            directory: a model folder, or the run folder around it.
            exact: search exactly, whatever index is there.

        Raises:
            InputError: see `Artifact.load`; an index that is damaged, or needs what is not installed.
        """
        folder = find_model(directory)
        artifact, changes = Artifact.load(folder), Changes.read(folder)
        return cls(artifact, None if exact else load_stored_index(folder, artifact, changes), changes)

    @property
    def artifact(self) -> Artifact:
        """The model, with its items as they are now."""
        return self.catalog.artifact

    @property
    def search(self) -> Search:
        """Of the catalog as it is now."""
        return self.catalog.search

    @property
    def _answers(self) -> Answers:
        return Answers(self.artifact, self.search.alive)

    @property
    def index(self) -> Index:
        """What `recommend` searches; `rank` always searches exactly."""
        return self.search.index

    @property
    def title_column(self) -> str | None:
        """The column of the item table that answers show as `title`."""
        return self._answers.title_column

    @property
    def item_embeddings(self) -> torch.Tensor:
        """v(j) of every item of the training, [N, D], where the diversity of lists is measured."""
        return self.catalog.trained.item_embeddings

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool, *, popularity: float = 1.0) -> np.ndarray:
        """Rank for an evaluation, exactly: int64 [E, k]. The very search of `recommend`, unless that has an index."""
        histories = (holdout.history_offsets, holdout.history_items)
        trained, count = len(self.catalog.trained.items), len(self.artifact.items)
        _, items = self.search.search(
            self.embed(holdout.queries, histories, context=holdout.context, gaps=gaps_of(holdout)),
            k,
            exclude=histories if exclude_seen else None,
            allowed=None if self.catalog.is_as_trained else np.arange(count) < trained,  # others are in no holdout
            popularity=checked_popularity(popularity),
            exactly=True,
        )
        return items.cpu().numpy()

    def recommend(
        self,
        queries: Sequence[Any] | None = None,
        *,
        histories: Sequence[Sequence[Any]] | None = None,
        features: Sequence[Mapping[str, Any] | None] | None = None,
        context: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        times: Sequence[Sequence[Any] | None] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        filter: str | None = None,  # noqa: A002  # what a request calls it
        allow: Sequence[Any] | None = None,
        deny: Sequence[Any] | None = None,
        popularity: float = 1.0,
    ) -> pl.DataFrame:
        """The K best items for each query.

        Args:
            queries: ids of known queries; their whole history in the data is taken, unless `histories` is given.
            histories: item ids of each query, oldest first; without `queries` the queries are new ones. Unknown items
                are left out. A model that reads no history only leaves these items out of the answer: it needs
                `queries`, `features` or `context` beside them.
            features: for each query a dict of the columns declared in query_tower.features; without `queries` the
                queries are new ones, known by their features and, where given, their histories. None in the place of
                a dict: what training knew.
            context: for each query a dict of the columns declared in query_tower.context, as its request has them, or
                one dict for all. What is not there, None, and a value that training never saw are unknown. Context
                alone asks for somebody of whom nothing else is known.
            times: when the items of `histories` were met, one for each: dates, ISO text or unix time. For a model that
                reads the gaps between them; a history without times is read without gaps.
            k: how many items for each query.
            exclude_seen: leave out the items of the history.
            filter: a condition on the columns of the item table, such as `country = 'FR' and price < 20`.
            allow: the only item ids that may be recommended.
            deny: item ids that may not be.
            popularity: b in [0, 2], the popularity dial: 1 as trained, 0 discovery; see `PopularityDial`.

        Returns:
            Columns `query` (id, or position where only histories are given), `rank` from 1, `item` (id), `score`
            (`<u, v> + (b - 1) T log p`), and `title` where the item table has one. A query with fewer than K items
            left has fewer rows.

        Raises:
            InputError: a query id is unknown; k < 1; nothing asked; for a query of which nothing else is known, a
                history without any known item, or any history where the model reads none; a filter or list that
                cannot be understood; a dial out of range.
        """
        return self.answer(
            Questions.of(self.artifact, queries, histories, features, context=context, times=times),
            _positive(k),
            exclude_seen=exclude_seen,
            allowed=allowed_items(
                self.artifact.items, self.artifact.item_table, condition=filter, allow=allow, deny=deny
            ),
            popularity=checked_popularity(popularity),
        )

    def similar(
        self,
        items: Sequence[Any],
        k: int = 10,
        *,
        filter: str | None = None,  # noqa: A002
        allow: Sequence[Any] | None = None,
        deny: Sequence[Any] | None = None,
    ) -> pl.DataFrame:
        """The K items nearest to each item, by cosine of the item embeddings; the item itself is left out.

        Args:
            items: item ids.
            k: how many items for each.
            filter: a condition on the item table that the answers fulfil.
            allow: the only item ids that may come back.
            deny: item ids that may not.

        Returns:
            Columns `of` (the item asked about), `rank`, `item`, `score`, and `title` where there is one.

        Raises:
            InputError: an item id is unknown; k < 1; a filter or list that cannot be understood.
        """
        # A copy: the codes of text ids are memory of polars, and torch warns of what it may not write to.
        codes = known_codes(self.artifact.items, items, "item", self.artifact).copy()
        allowed = allowed_items(self.artifact.items, self.artifact.item_table, condition=filter, allow=allow, deny=deny)
        vectors = F.normalize(self.artifact.item_embeddings[torch.from_numpy(codes)], dim=1)
        own = (np.arange(len(codes) + 1, dtype=np.int64), codes)
        scores, found = self.search.neighbours.search(vectors, _positive(k), own, allowed=allowed)
        return self._answers.ranked("of", self.artifact.items.decode(codes), found, scores)

    def explain(
        self,
        query: Any = None,
        *,
        item: Any,
        history: Sequence[Any] | None = None,
        context: Mapping[str, Any] | None = None,
        times: Sequence[Any] | None = None,
        popularity: float = 1.0,
    ) -> Explanation:
        """What pulled an item up for a query: items of its history, and popularity.

        Args:
            query: id of a known query, or None for a new one.
            item: the item's id.
            history: item ids, oldest first; the query's own in the data where None.
            context: of the request that the item was recommended for.
            times: of the items of `history`.
            popularity: the setting of the dial that the item was recommended with.

        Raises:
            InputError: an unknown query or item, neither query, history nor context, a history alone where the model
                reads none, a dial out of range.
        """
        asked = Questions.of(
            self.artifact,
            None if query is None else [query],
            None if history is None else [history],
            context=context,
            times=None if times is None else [times],
        )
        return explain(
            self._answers,
            self.in_context(context),
            asked,
            int(known_codes(self.artifact.items, [item], "item", self.artifact)[0]),
            length=self.ranker.history_length,
            dial=self.search.dial,
            popularity=checked_popularity(popularity),
        )

    def history(self, query: Any) -> pl.DataFrame:
        """The items of a known query in the data, oldest first: columns `item`, and `title` where there is one."""
        codes = known_codes(self.artifact.queries, [query], "query", self.artifact)
        return self._answers.items(stored_histories(self.artifact, codes)[1].astype(np.int64))

    def describe(self, items: Sequence[Any]) -> pl.DataFrame:
        """What is known of some items.

        Returns:
            Columns `item`, `title` where there is one, `interactions` in training, and the item table's other columns.

        Raises:
            InputError: an item id is unknown.
        """
        return self._answers.described(known_codes(self.artifact.items, items, "item", self.artifact))

    def search_titles(self, text: str, k: int = 10) -> pl.DataFrame:
        """Items whose title contains `text`, whatever the case. Without titles, ids are searched.

        Returns:
            At most K rows, titles that begin with the text first, then by interactions in training; columns `item`,
            `title` where there is one, and `interactions`.

        Raises:
            InputError: k < 1.
        """
        found = self._answers.described(self._answers.titled(text, _positive(k)))
        return found.select(name for name in ("item", "title", "interactions") if name in found.columns)

    def answer(
        self,
        asked: Questions,
        k: int,
        *,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        popularity: float = 1.0,
        titles: bool = True,
    ) -> pl.DataFrame:
        """What `recommend` does after it has checked what it was given.

        Args:
            asked: queries as codes.
            k: K.
            exclude_seen: leave out the items of the histories.
            allowed: bool [N], as `allowed_items` gives it.
            popularity: b.
            titles: add titles where there are any.

        Returns:
            As `recommend`.
        """
        scores, items = self.search.search(
            self.embed(asked.codes, asked.histories, asked.features, context=asked.context, gaps=asked.gaps),
            k,
            exclude=asked.histories if exclude_seen else None,
            allowed=allowed,
            popularity=popularity,
        )
        return self._answers.ranked("query", asked.ids, items, scores, titles=titles)


def _positive(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k: expected at least 1, found {k}")
    return k
