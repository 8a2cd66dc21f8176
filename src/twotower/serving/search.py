"""Embedding of queries and search over the items of a served model, with filters and the popularity dial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.data import Holdout
from twotower.errors import InputError
from twotower.features.requests import ContextRows, EncodedContext
from twotower.index import ApproximateIndex, ExactCatalog, Exclusion, Index, PopularityDial
from twotower.index.catalog import Mask
from twotower.index.topk import RowFilter
from twotower.ranking.tower_ranker import TowerRanker, holdout_marks
from twotower.serving.events import EventTypes
from twotower.serving.explain import Embed
from twotower.serving.model_folder import SavedModel
from twotower.serving.queries import trained_only
from twotower.serving.text_input import TextInput


def ranker_of(artifact: SavedModel) -> TowerRanker:
    """Build the ranker of a model: its towers with its exact index."""
    history = artifact.config.query_tower.history
    return TowerRanker(artifact.towers, history.length if history else 0, artifact.item_embeddings, progress=True)


def dial_of(artifact: SavedModel) -> PopularityDial:
    """Build the popularity dial from the model's training counts and temperature."""
    trained = artifact.towers.item_tower.num_items
    return PopularityDial(artifact.item_counts, float(artifact.towers.temperature.detach()), trained)


class QueryEmbedder:
    """A query tower that embeds queries as u(x).

    Args:
        artifact: the model as it was trained.

    Attributes:
        ranker: the towers as a ranker.
        num_trained: number of trained items, the only ones that the query tower knows.
        events: the event types that a request can name; None if the model has none.
        text_input: where the text of a request enters the query tower; None if the model reads none.
    """

    def __init__(self, artifact: SavedModel) -> None:
        self.ranker = ranker_of(artifact)
        self.num_trained = len(artifact.items)
        self.events = EventTypes.of(artifact.config.data.events)
        self.text_input = TextInput.of(artifact)

    def embed(
        self,
        queries: np.ndarray,
        histories: tuple[np.ndarray, np.ndarray],
        features: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        context: ContextRows | EncodedContext | None = None,
        marks: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Embed queries given by codes, histories, features and contexts: u(x), [E, D]; see `TowerRanker.embed`.

        Items added after training are left out of the histories. A context without an event type gets the default.
        """
        known, between = trained_only(histories, marks, self.num_trained)
        if self.events is not None and not isinstance(context, EncodedContext):
            context = self.events.completed(context, len(queries))
        return self.ranker.embed(queries, known, features, context=context, marks=between)

    def embed_holdout(self, holdout: Holdout) -> torch.Tensor:
        """Embed every query of a holdout, u(x), [E, D]; see `embed`."""
        histories = (holdout.history_offsets, holdout.history_items)
        marks = holdout_marks(holdout, self.ranker.towers)
        return self.embed(holdout.queries, histories, context=holdout.context, marks=marks)

    def in_context(self, context: Mapping[str, Any] | None) -> Embed:
        """Return a version of `embed` for queries that share one context, which is encoded once, here.

        Raises:
            InputError: as in `encode_context`.
        """
        one = None if context is None else self.encode_context([context])

        def embed(
            queries: np.ndarray, histories: tuple[np.ndarray, np.ndarray], marks: np.ndarray | None
        ) -> torch.Tensor:
            repeated = None if one is None else one.repeated(len(queries))
            return self.embed(queries, histories, context=repeated, marks=marks)

        return embed

    @property
    def context_columns(self) -> list[str]:
        """The columns declared in query_tower.context; empty if the query tower reads no context."""
        features = self.ranker.towers.context_features
        return [] if features is None else list(features.columns)

    def encode_context(self, rows: Sequence[Mapping[str, Any] | None]) -> EncodedContext:
        """Encode the context of requests for `embed`; None for a request without context.

        Raises:
            InputError: the query tower has no context, or a column is unknown or has the wrong type.
        """
        complete = rows if self.events is None else self.events.completed(rows, len(rows))
        return EncodedContext.of(self.ranker.context_features(), complete)

    def check_features(self, features: Mapping[str, Any]) -> None:
        """Check features of a query before `embed`, so that one bad request does not fail its batch.

        Raises:
            InputError: the query tower has no features, or a column is missing or has the wrong type.
        """
        inputs = getattr(self.ranker.towers.query_tower, "features", None)
        if inputs is None:
            raise InputError("features: the query tower of this model takes no features; give a query id or a history")
        text = self.text_input
        if text is not None and text.is_query and isinstance(features.get(text.column), str):
            features = {**features, text.column: None}  # every text is valid, and a sentence model is slow
        inputs.encode([features])


class Search:
    """Search over one catalog, for any setting of the popularity dial.

    Args:
        artifact: the model.
        approximate: an index over the embeddings with the popularity coordinate, D + 1 wide; None for exact search.
        alive: bool [N], False for removed items; None if no item was removed.
    """

    def __init__(
        self, artifact: SavedModel, approximate: ApproximateIndex | None = None, alive: Mask | None = None
    ) -> None:
        self.artifact = artifact
        self.dial = dial_of(artifact)
        self.approximate = approximate
        self.alive = alive
        self._turned: tuple[float, ExactCatalog] | None = None

    @property
    def index(self) -> Index:
        """The approximate index, or else the exact catalog for the dial at 1."""
        return self.plain if self.approximate is None else self.approximate

    @cached_property
    def plain(self) -> ExactCatalog:
        """The exact catalog, built on first use."""
        return ExactCatalog(self.artifact.item_embeddings, alive=self.alive)

    @cached_property
    def neighbours(self) -> ExactCatalog:
        """The catalog for cosine similarity; the same as `plain` if the embeddings already have length 1."""
        directions = self.artifact.directions
        if self.artifact.config.objective.similarity == "cosine" and directions.shape == self.plain.vectors.items.shape:
            return self.plain
        return ExactCatalog(F.normalize(directions, dim=1), alive=self.alive)

    @torch.no_grad()
    def search(
        self,
        embedded: Tensor,
        k: int,
        *,
        exclude: Exclusion | None = None,
        allowed: Mask | None = None,
        eligible: RowFilter | None = None,
        popularity: float = 1.0,
        exactly: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Find the K items with the highest `<u, v> + (b - 1) T log p`.

        Args:
            embedded: u(x), [B, D].
            k: K, number of items per query.
            exclude: item codes to leave out for each query, in compressed rows.
            allowed: bool [N], the only items that may be returned.
            eligible: the items that may be returned for each query; requires the exact search.
            popularity: b, the setting of the dial.
            exactly: search every item, even if there is an approximate index.

        Returns:
            Scores and item codes, [B, K] each.
        """
        if self.approximate is not None and not exactly:
            assert eligible is None
            queries = self.dial.queries(embedded, popularity)
            scores, items = self.approximate.search(queries, k, exclude, allowed=allowed)
            return scores + self.dial.offset(popularity), items
        if popularity == 1.0:
            # This is the same search as in evaluation; adding a bias, even zero, could round differently.
            return self.plain.search(embedded, k, exclude, allowed=allowed, eligible=eligible)
        scores, items = self._at(popularity).search(embedded, k, exclude, allowed=allowed, eligible=eligible)
        return scores + self.dial.offset(popularity), items

    def _at(self, popularity: float) -> ExactCatalog:
        """Return the exact catalog for a setting of the dial; it shares all but one number per item with `plain`."""
        cached = self._turned
        if cached is None or cached[0] != popularity:
            cached = popularity, self.plain.with_bias((popularity - 1.0) * self.dial.coordinate())
            self._turned = cached
        return cached[1]
