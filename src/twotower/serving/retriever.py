"""Retrieval from a trained model: items for a query, similar items, and explanations."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn import functional as F

from twotower.data import Holdout
from twotower.data.loading.histories import take_ranges
from twotower.errors import InputError, require_flags
from twotower.index import ApproximateIndex, Index
from twotower.index.popularity import checked_popularity
from twotower.serving.catalog_changes import CatalogChanges
from twotower.serving.events import with_event
from twotower.serving.explain import Explanation, explain
from twotower.serving.filters import Offer, allowed_items, both
from twotower.serving.live_catalog import LiveCatalog
from twotower.serving.model_folder import SavedModel, find_model
from twotower.serving.queries import QueryBatch, known_codes, require_something, stored_history
from twotower.serving.results import ResultTables
from twotower.serving.search import QueryEmbedder, Search
from twotower.serving.stored_index import load_stored_index
from twotower.serving.text_input import with_texts


class Retriever(QueryEmbedder):
    """A trained model for recommendations; it needs no training code.

    Items are added, changed and removed through `retriever.catalog`; see `LiveCatalog`.

    Args:
        artifact: the model, as read by `SavedModel.load`.
        index: an approximate index over the model's items, as built by `twotower index`; None for exact search.
        changes: items added, changed and removed since training; the index already includes them.

    Example:
        retriever = twotower.Retriever.load("model/")
        retriever.recommend(["196"], k=10, filter="year > 1990", popularity=0.5)
    """

    def __init__(
        self, artifact: SavedModel, index: ApproximateIndex | None = None, changes: CatalogChanges | None = None
    ) -> None:
        super().__init__(artifact)
        self.catalog = LiveCatalog(artifact, index, changes)

    @classmethod
    def load(cls, directory: str | Path, *, exact: bool = False) -> Retriever:
        """Read a model folder and its index, if `twotower index` has built one, and verify all checksums.

        Args:
            directory: a model folder, or the run folder that contains it.
            exact: ignore an approximate index and search exactly.

        Raises:
            InputError: as in `SavedModel.load`; or the index is damaged, or needs a package that is not installed.
        """
        folder = find_model(directory)
        artifact, changes = SavedModel.load(folder), CatalogChanges.read(folder)
        return cls(artifact, None if exact else load_stored_index(folder, artifact, changes), changes)

    @property
    def artifact(self) -> SavedModel:
        """The model with its current items."""
        return self.catalog.artifact

    @property
    def search(self) -> Search:
        """Search over the current catalog."""
        return self.catalog.search

    @property
    def _results(self) -> ResultTables:
        return ResultTables(self.artifact, self.search.alive)

    @property
    def index(self) -> Index:
        """The index that `recommend` searches; `rank` always searches exactly."""
        return self.search.index

    @property
    def title_column(self) -> str | None:
        """The column of the item table that results show as `title`."""
        return self._results.title_column

    @property
    def item_embeddings(self) -> torch.Tensor:
        """v(j) of every trained item, [N, D]; used to measure the diversity of lists."""
        return self.catalog.trained.directions

    def rank(
        self, holdout: Holdout, k: int, exclude_seen: bool, *, popularity: float = 1.0, width: int | None = None
    ) -> np.ndarray:
        """Rank items for an evaluation by the exact search of `recommend`, even if there is an index: int64 [E, k].

        Args:
            holdout: the queries.
            k: K, number of items per query.
            exclude_seen: exclude the items of a query's history.
            popularity: b, the setting of the popularity dial.
            width: rank by the first coordinates of the embeddings (`TwoTower.at_width`); None for all.
        """
        histories = (holdout.history_offsets, holdout.history_items)
        trained, count = len(self.catalog.trained.items), len(self.artifact.items)
        eligible = holdout.eligible
        if eligible is not None and count > trained:  # added items are not allowed below, so any rule will do for them
            codes = np.arange(count)
            eligible = eligible.select(torch.from_numpy(np.where(codes < trained, codes, 0)))
        embedded, search = self.embed_holdout(holdout), self.search
        if width is not None:
            towers = self.artifact.towers
            shortened = towers.at_width(self.artifact.item_embeddings, width)
            search = Search(replace(self.artifact, item_embeddings=shortened), alive=search.alive)
            embedded = towers.at_width(embedded, width)
        _, items = search.search(
            embedded,
            k,
            exclude=histories if exclude_seen else None,
            allowed=None if count == trained else np.arange(count) < trained,  # added items are in no holdout
            eligible=eligible,
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
        text: str | Sequence[str | None] | None = None,
        history_events: Sequence[Sequence[Any] | None] | None = None,
        event: str | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        filter: str | None = None,  # noqa: A002  # its name in requests
        allow: Sequence[Any] | None = None,
        deny: Sequence[Any] | None = None,
        popularity: float = 1.0,
        group: Any | Sequence[Any] | None = None,
        time: Any = None,
    ) -> pl.DataFrame:
        """Recommend the K best items for each query.

        Args:
            queries: ids of known queries; their whole history in the data is used, unless `histories` is given.
            histories: item ids of each query, oldest first; without `queries` the queries are new. Unknown items are
                left out. A model that reads no history only excludes these items from the result, and also needs
                `queries`, `features` or `context`.
            features: for each query a dict of the columns declared in query_tower.features; without `queries` the
                queries are new, described by their features and, if given, their histories. None instead of a dict
                uses the features known from training.
            context: for each query's request a dict of the columns declared in query_tower.context, or one dict for
                all. A missing column, None, and a value not seen in training count as unknown. A context alone is
                enough for a new query.
            times: timestamp of each item in `histories`: dates, ISO text or unix time. Used by a model that
                reads the gaps between items; a history without times is read without gaps.
            text: the words of the request, if the model has data.query_text: one text, or one for each query. If the
                texts are the queries, nothing else is needed, and the name of a query in the result is its text.
            history_events: event type of each item in `histories`, if the model has query_tower.history.event_weights;
                None for the default type.
            event: the event type to recommend for, if the model has data.events; None for the type in the context,
                or else the model's default.
            k: number of items per query; at most the whole catalog is returned.
            exclude_seen: leave out the items of the history.
            filter: a condition on the columns of the item table, such as `country = 'FR' and price < 20`.
            allow: the only item ids that may be recommended.
            deny: item ids that must not be recommended.
            popularity: b in [0, 2], the popularity dial: 1 as trained, 0 discovery; see `PopularityDial`.
            group: the group (market) of the requests, or a list with the group of each. Required if the model has
                groups (data.eligibility.item_groups): only items of the group are recommended.
            time: time of the requests, a date, ISO text or unix time; None for now. Only items available at this time
                are recommended, if the items of the model have availability intervals.

        Returns:
            Columns `query` (id, text, or position for other new queries), `rank` from 1, `item` (id), `score`
            (`<u, v> + (b - 1) T log p`), and `title` if the item table has one. A query with fewer than K items left
            has fewer rows.

        Raises:
            InputError: a query id is unknown; k < 1; no query is given; a query cannot be answered (its history has no
                known item, or the model reads no history, and no other input is given); a filter or list is invalid;
                the dial is out of range; a group is missing or unknown.
        """
        require_flags(exclude_seen=exclude_seen)
        features, context, texts = with_texts(
            self.text_input, text, queries=queries, histories=histories, features=features, context=context
        )
        batch = QueryBatch.of(
            self.artifact,
            queries,
            histories,
            features,
            context=self._for_event(context, event),
            times=times,
            history_events=history_events,
        )
        if texts is not None and queries is None and self.text_input is not None and self.text_input.is_query:
            batch = replace(batch, ids=pl.Series("query", texts, dtype=pl.String))
        return self.answer(
            batch,
            checked_k(k, self.artifact),
            exclude_seen=exclude_seen,
            allowed=allowed_items(
                self.artifact.items, self.artifact.item_table, condition=filter, allow=allow, deny=deny
            ),
            popularity=checked_popularity(popularity),
            offers=self._offers(group, time, len(batch.codes)),
        )

    def _offers(self, group: Any, time: Any, count: int) -> list[Offer] | None:
        """Return the checked group and time of each of `count` queries; None if the model has no eligibility rule."""
        rule = self.artifact.eligibility
        if not isinstance(group, list | tuple | pl.Series | np.ndarray):
            offer = Offer.of(rule, group, time)
            return None if offer is None else [offer] * count
        if len(group) != count:
            raise InputError(f"group: expected one group, or one for each query, {count}; found {len(group)}")
        moment = dt.datetime.now(dt.UTC) if time is None and rule is not None and rule.start is not None else time
        # An invalid group may be unhashable.
        distinct = {repr(one): one for one in group}
        found = {name: Offer.of(rule, one, moment) for name, one in distinct.items()}
        return [offer for one in group if (offer := found[repr(one)]) is not None]

    def similar(
        self,
        items: Sequence[Any],
        k: int = 10,
        *,
        filter: str | None = None,  # noqa: A002
        allow: Sequence[Any] | None = None,
        deny: Sequence[Any] | None = None,
        group: Any = None,
        time: Any = None,
    ) -> pl.DataFrame:
        """Find the K items nearest to each item, by cosine of the item embeddings, without the item itself.

        Args:
            items: item ids.
            k: number of similar items for each given item.
            filter: a condition on the item table that results must pass.
            allow: the only item ids that may be returned.
            deny: item ids that must not be returned.
            group: the group of the request, as in `recommend`.
            time: the time of the request, as in `recommend`.

        Returns:
            Columns `of` (the given item), `rank`, `item`, `score`, and `title` if the items have titles.

        Raises:
            InputError: an item id is unknown; k < 1; a filter, list, group or time is invalid.
        """
        # Copied: the codes of text ids are read-only memory of polars, and torch warns about read-only arrays.
        codes = known_codes(self.artifact.items, items, "item", self.artifact).copy()
        rule = self.artifact.eligibility
        offer = Offer.of(rule, group, time)
        allowed = both(
            None if rule is None or offer is None else offer.mask(rule),
            allowed_items(self.artifact.items, self.artifact.item_table, condition=filter, allow=allow, deny=deny),
        )
        vectors = F.normalize(self.artifact.directions[torch.from_numpy(codes)], dim=1)
        own = (np.arange(len(codes) + 1, dtype=np.int64), codes)
        scores, neighbours = self.search.neighbours.search(vectors, checked_k(k, self.artifact), own, allowed=allowed)
        return self._results.ranked("of", self.artifact.items.decode(codes), neighbours, scores)

    def explain(
        self,
        query: Any = None,
        *,
        item: Any,
        history: Sequence[Any] | None = None,
        context: Mapping[str, Any] | None = None,
        times: Sequence[Any] | None = None,
        history_events: Sequence[Any] | None = None,
        event: str | None = None,
        popularity: float = 1.0,
    ) -> Explanation:
        """Explain why an item is recommended for a query: by the items of its history, and by popularity.

        Args:
            query: id of a known query, or None for a new query.
            item: id of the item.
            history: item ids, oldest first; None for the query's history in the data.
            context: context of the request for which the item was recommended.
            times: timestamp of each item in `history`.
            history_events: event type of each item in `history`, as in `recommend`.
            event: the event type for which the item was recommended.
            popularity: setting of the popularity dial with which the item was recommended.

        Raises:
            InputError: a query or item is unknown; neither query, history nor context is given; a history alone is
                given and the model reads no history; the dial is out of range.
        """
        context = with_event(self.events, context, event)
        require_something({"query": query, "history": history, "context": context})
        batch = QueryBatch.of(
            self.artifact,
            None if query is None else [query],
            None if history is None else [history],
            context=context,
            times=None if times is None else [times],
            history_events=None if history_events is None else [history_events],
        )
        return explain(
            self._results,
            self.in_context(context),
            batch,
            int(known_codes(self.artifact.items, [item], "item", self.artifact)[0]),
            length=self.ranker.history_length,
            dial=self.search.dial,
            popularity=checked_popularity(popularity),
        )

    def _for_event(
        self, context: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None, event: str | None
    ) -> Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None:
        if event is None:
            return context
        if context is None or isinstance(context, Mapping):
            return with_event(self.events, context, event)
        if not all(row is None or isinstance(row, Mapping) for row in context):
            return context  # `QueryBatch` rejects it
        return [with_event(self.events, row, event) for row in context]

    def history(self, query: Any) -> pl.DataFrame:
        """List the history of a known query, oldest first: columns `item` and, if the items have titles, `title`."""
        codes = known_codes(self.artifact.queries, [query], "query", self.artifact)
        return self._results.items(stored_history(self.artifact, int(codes[0])))

    def describe(self, items: Sequence[Any]) -> pl.DataFrame:
        """Return everything known about items.

        Returns:
            Columns `item`, `title` if the items have titles, `interactions` in training, and the other columns of the
            item table.

        Raises:
            InputError: an item id is unknown.
        """
        return self._results.described(known_codes(self.artifact.items, items, "item", self.artifact))

    def search_titles(self, text: str, k: int = 10) -> pl.DataFrame:
        """Find items whose title contains `text`, ignoring case; search the ids if there are no titles.

        Returns:
            At most K rows: first the titles that begin with the text, then the others, both in descending order of
            training interactions. Columns `item`, `title` if the items have titles, and `interactions`.

        Raises:
            InputError: k < 1, or `text` is not text.
        """
        if not isinstance(text, str):
            raise InputError(f"text: expected text, found {text!r:.80}")
        table = self._results.described(self._results.titled(text, checked_k(k, self.artifact)))
        return table.select(name for name in ("item", "title", "interactions") if name in table.columns)

    def answer(
        self,
        batch: QueryBatch,
        k: int,
        *,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        popularity: float = 1.0,
        titles: bool = True,
        offers: Sequence[Offer] | None = None,
    ) -> pl.DataFrame:
        """Find the K best items for each query of a checked batch; `recommend` calls this.

        Args:
            batch: the queries.
            k: K, number of items per query, as returned by `checked_k`.
            exclude_seen: leave out the items of the histories.
            allowed: bool [N], as returned by `allowed_items`.
            popularity: b, the setting of the popularity dial.
            titles: add titles if the items have titles.
            offers: the group and time of each query; None for the present time, in a model without groups.

        Returns:
            A table as from `recommend`.

        Raises:
            InputError: the model has groups and `offers` is None.
        """
        embedded = self.embed(batch.codes, batch.histories, batch.features, context=batch.context, marks=batch.marks)
        exclude, rule = batch.histories if exclude_seen else None, self.artifact.eligibility
        if rule is None:
            scores, items = self.search.search(embedded, k, exclude=exclude, allowed=allowed, popularity=popularity)
            return self._results.ranked("query", batch.ids, items, scores, titles=titles)
        offers = self._offers(None, None, len(batch.codes)) if offers is None else offers
        assert offers is not None
        scores, items = torch.full((len(embedded), k), -torch.inf), torch.full((len(embedded), k), -1)
        for offer in dict.fromkeys(offers):
            rows = np.flatnonzero([one == offer for one in offers])
            chosen = torch.from_numpy(rows)
            scores[chosen], items[chosen] = self.search.search(
                embedded[chosen],
                k,
                exclude=None if exclude is None else rows_of(exclude, rows),
                allowed=both(offer.mask(rule), allowed),
                popularity=popularity,
            )
        return self._results.ranked("query", batch.ids, items, scores, titles=titles)


def rows_of(compressed: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Select some of the compressed rows."""
    offsets, items = compressed
    places, ends = take_ranges(offsets[rows], offsets[rows + 1])
    return ends, items[places]


def checked_k(k: Any, artifact: SavedModel) -> int:
    """Return K, reduced to the number of items in the catalog if it is larger.

    Raises:
        InputError: `k` is not an integer of at least 1.
    """
    if isinstance(k, bool | np.bool_) or not isinstance(k, Integral) or k < 1:
        raise InputError(f"k: expected an integer of at least 1, found {k!r:.80}")
    return min(int(k), max(len(artifact.items), 1))
