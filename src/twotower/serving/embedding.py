"""Questions embedded by the query tower of a served model: histories, features, and the context of the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from twotower.data.given import EncodedContext, Given
from twotower.errors import InputError
from twotower.serving.artifact import Artifact
from twotower.serving.explain import Embed
from twotower.serving.questions import trained_only
from twotower.serving.search import ranker_of


class QueryEmbedder:
    """Turns questions into u(x).

    Args:
        artifact: the model as it was trained.

    Attributes:
        ranker: its towers.
        num_trained: items that the query tower knows: those of the training.
    """

    def __init__(self, artifact: Artifact) -> None:
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
        """u(x) of queries by codes, histories, features and contexts, [E, D]; see `TowerRanker.embed`.

        Items that joined after training say nothing to the tower.
        """
        known, between = trained_only(histories, gaps, self.num_trained)
        return self.ranker.embed(queries, known, features, context=context, gaps=between)

    def in_context(self, context: Mapping[str, Any] | None) -> Embed:
        """`embed` of queries that all have the same context, which is encoded here, once.

        Raises:
            InputError: as those of `encode_context`.
        """
        one = None if context is None else self.encode_context([context])

        def embed(
            queries: np.ndarray, histories: tuple[np.ndarray, np.ndarray], gaps: np.ndarray | None
        ) -> torch.Tensor:
            told = None if one is None else one.repeated(len(queries))
            return self.embed(queries, histories, context=told, gaps=gaps)

        return embed

    @property
    def context_columns(self) -> list[str]:
        """The columns declared in query_tower.context; none where the query tower reads no context."""
        features = self.ranker.towers.context_features
        return [] if features is None else list(features.columns)

    def encode_context(self, rows: Sequence[Mapping[str, Any] | None]) -> EncodedContext:
        """The context of some requests as `embed` takes it; None for a request of which nothing is known.

        Raises:
            InputError: the query tower takes none, or a column is unknown or of another kind.
        """
        return EncodedContext.of(self.ranker.context_features(), rows)

    def check_features(self, features: Mapping[str, Any]) -> None:
        """Refuse features of a query that `embed` could not use, so that one request does not spoil its batch.

        Raises:
            InputError: the query tower takes none, or a column is missing or of another kind.
        """
        inputs = getattr(self.ranker.towers.query_tower, "features", None)
        if inputs is None:
            raise InputError("features: the query tower of this model takes none; give a query id or a history")
        inputs.encode([features])
