"""Query embeddings of a served model, from histories, features and request context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from twotower.errors import InputError
from twotower.features.requests import EncodedContext, Given
from twotower.serving.explain import Embed
from twotower.serving.model_folder import SavedModel
from twotower.serving.queries import trained_only
from twotower.serving.search import ranker_of


class QueryEmbedder:
    """A query tower that embeds queries as u(x).

    Args:
        artifact: the model as it was trained.

    Attributes:
        ranker: the model's towers.
        num_trained: number of trained items, the only ones that the query tower knows.
    """

    def __init__(self, artifact: SavedModel) -> None:
        self.ranker = ranker_of(artifact)
        self.num_trained = len(artifact.items)

    def embed(
        self,
        queries: np.ndarray,
        histories: tuple[np.ndarray, np.ndarray],
        features: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        context: Given | EncodedContext | None = None,
        gaps: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Embed queries given by codes, histories, features and contexts: u(x), [E, D]; see `TowerRanker.embed`.

        Items added after training are left out of the histories.
        """
        known, between = trained_only(histories, gaps, self.num_trained)
        return self.ranker.embed(queries, known, features, context=context, gaps=between)

    def in_context(self, context: Mapping[str, Any] | None) -> Embed:
        """Return a version of `embed` for queries that share one context, which is encoded once, here.

        Raises:
            InputError: see `encode_context`.
        """
        one = None if context is None else self.encode_context([context])

        def embed(
            queries: np.ndarray, histories: tuple[np.ndarray, np.ndarray], gaps: np.ndarray | None
        ) -> torch.Tensor:
            repeated = None if one is None else one.repeated(len(queries))
            return self.embed(queries, histories, context=repeated, gaps=gaps)

        return embed

    @property
    def context_columns(self) -> list[str]:
        """The columns declared in query_tower.context; empty if the query tower reads no context."""
        features = self.ranker.towers.context_features
        return [] if features is None else list(features.columns)

    def encode_context(self, rows: Sequence[Mapping[str, Any] | None]) -> EncodedContext:
        """Encode the context of requests for `embed`; None for a request without context.

        Raises:
            InputError: the query tower takes no context, or a column is unknown or of the wrong kind.
        """
        return EncodedContext.of(self.ranker.context_features(), rows)

    def check_features(self, features: Mapping[str, Any]) -> None:
        """Check features of a query before `embed`, so that one bad request does not fail its batch.

        Raises:
            InputError: the query tower takes no features, or a column is missing or of the wrong kind.
        """
        inputs = getattr(self.ranker.towers.query_tower, "features", None)
        if inputs is None:
            raise InputError("features: the query tower of this model takes no features; give a query id or a history")
        inputs.encode([features])
