"""A two-tower model as a ranker: one path from queries to items, for validation, evaluation and serving alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.data import Holdout, ragged_histories
from twotower.data.encoding import Encoded, FeatureSet
from twotower.data.gaps import gap_codes
from twotower.data.given import EncodedContext, Given, encode_given
from twotower.errors import InputError
from twotower.evaluation.progress import SlowProgress
from twotower.index import ExactIndex, Exclusion
from twotower.towers import TwoTower

#: Queries embedded at once: bounds the memory of gathered histories.
BLOCK = 4096


class TowerRanker:
    """Ranks the whole catalog by <u(x), v(j)>.

    Args:
        towers: the model; put into evaluation mode while it ranks.
        history_length: L, how many recent items the query tower looks at; 0 for a tower without a history.
        item_embeddings: [N, D], where they are at hand; computed otherwise.
        progress: show a bar while a long ranking of a holdout runs.
    """

    def __init__(
        self,
        towers: TwoTower,
        history_length: int,
        item_embeddings: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> None:
        self.progress = progress
        self.towers = towers
        self.history_length = history_length
        self.item_embeddings = self._items() if item_embeddings is None else item_embeddings

    @cached_property
    def index(self) -> ExactIndex:
        """Exact search over the items, laid out when first needed: a served model may have an index of another kind."""
        return ExactIndex(self.item_embeddings)

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray:
        """Best items of every query of a holdout, int64 [E, k], -1 where fewer are left."""
        histories = (holdout.history_offsets, holdout.history_items)
        queries, exclude = self.embed_holdout(holdout), histories if exclude_seen else None
        with SlowProgress("ranking") as told:
            _, items = self.index.search(queries, k, exclude, progress=told if self.progress else None)
        return items.cpu().numpy()

    def embed_holdout(self, holdout: Holdout) -> Tensor:
        """u(x) of every query of a holdout, float32 [E, D]."""
        histories = (holdout.history_offsets, holdout.history_items)
        return self.embed(holdout.queries, histories, context=holdout.context, gaps=gaps_of(holdout))

    def search(
        self,
        queries: np.ndarray,
        histories: tuple[np.ndarray, np.ndarray],
        k: int,
        *,
        exclude: Exclusion | None,
        gaps: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Best items of some queries.

        Args:
            queries: codes, int64 [E]; -1 for a query never seen in training.
            histories: compressed rows (offsets int64 [E+1], item codes), oldest first.
            k: how many items.
            exclude: compressed rows of items to leave out, or None.
            gaps: as in `embed`.

        Returns:
            Scores and item codes, [E, k] each.
        """
        return self.index.search(self.embed(queries, histories, gaps=gaps), k, exclude)

    @torch.no_grad()
    def embed(
        self,
        queries: np.ndarray,
        histories: tuple[np.ndarray, np.ndarray],
        features: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        context: Given | EncodedContext | None = None,
        gaps: np.ndarray | None = None,
    ) -> Tensor:
        """u(x) of every query, float32 [E, D].

        Args:
            queries: codes, int64 [E]; -1 for a query never seen in training.
            histories: compressed rows (offsets int64 [E+1], item codes), oldest first.
            features: for each query what its declared columns hold, or None for what training knew of it.
            context: of each query's request: a frame, or for each a mapping or None; or all of them encoded. A tower
                that looks at no context takes a frame, as every holdout of data with further columns has one, and
                reads nothing of it.
            gaps: code of the gap before each item of the histories (data/gaps.py), beside them; None where nobody
                knows them. Only a tower that reads gaps looks at it.

        Raises:
            InputError: features or contexts are given, and the query tower takes none, or a value is of another kind;
                a declared feature is missing.
        """
        offsets, items = histories
        inputs = getattr(self.towers.query_tower, "features", None)
        if features is not None and inputs is None:
            raise InputError(
                "features: the query tower of this model takes none; set query_tower.features and train again"
            )
        requests = self.encoded_context(context, len(queries))
        since = gaps if getattr(self.towers.query_tower, "gaps", None) is not None else None
        device = self.towers.log_temperature.device
        was_training = self.towers.training
        self.towers.eval()
        parts = []
        for start in range(0, len(queries), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(queries)))
            codes = torch.from_numpy(np.asarray(queries[rows], dtype=np.int64)).to(device)
            history = None
            if self.history_length:
                recent = ragged_histories(offsets, items, rows, self.history_length)
                history = torch.from_numpy(recent).to(device)
            given = None
            if features is not None and inputs is not None:
                given = inputs.encode_some(codes, [features[row] for row in rows.tolist()])
            between = None
            if since is not None and self.history_length:
                newest = ragged_histories(offsets, since, rows, self.history_length)
                between = torch.from_numpy(np.maximum(newest, 0)).to(device)
            told = None if requests is None else [torch.from_numpy(one[rows]).to(device) for one in requests]
            parts.append(self.towers.embed_queries(codes, history, given, told, between).float())
        self.towers.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, self.item_embeddings.shape[1], device=device)

    def context_features(self) -> FeatureSet:
        """What encodes the context of a request.

        Raises:
            InputError: the query tower looks at none.
        """
        features = self.towers.context_features
        if features is None:
            raise InputError("context: this model looks at none; set query_tower.context and train again")
        return features

    def encoded_context(self, given: Given | EncodedContext | None, rows: int) -> Encoded | None:
        """The context of some requests as the tower takes it; see `embed`."""
        if given is None or (self.towers.context_features is None and isinstance(given, pl.DataFrame)):
            return None
        features = self.context_features()
        if len(given) != rows:
            raise InputError(f"context: expected one row for each query, {rows}; found {len(given)}")
        return given.arrays if isinstance(given, EncodedContext) else encode_given(features, given)

    def _items(self) -> Tensor:
        was_training = self.towers.training
        self.towers.eval()
        embeddings = self.towers.item_embeddings()
        self.towers.train(was_training)
        return embeddings


def gaps_of(holdout: Holdout) -> np.ndarray | None:
    """Codes of the gaps in the histories of a holdout; None where it has no times."""
    times = holdout.history_timestamps
    return None if times is None else gap_codes(holdout.history_offsets, times)
