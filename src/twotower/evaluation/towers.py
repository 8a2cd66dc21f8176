"""A two-tower model as a ranker: one path from queries to items, for validation, evaluation and serving alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.data import Holdout, ragged_histories
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
        return self.embed(holdout.queries, (holdout.history_offsets, holdout.history_items))

    def search(
        self, queries: np.ndarray, histories: tuple[np.ndarray, np.ndarray], k: int, *, exclude: Exclusion | None
    ) -> tuple[Tensor, Tensor]:
        """Best items of some queries.

        Args:
            queries: codes, int64 [E]; -1 for a query never seen in training.
            histories: compressed rows (offsets int64 [E+1], item codes), oldest first.
            k: how many items.
            exclude: compressed rows of items to leave out, or None.

        Returns:
            Scores and item codes, [E, k] each.
        """
        return self.index.search(self.embed(queries, histories), k, exclude)

    @torch.no_grad()
    def embed(
        self,
        queries: np.ndarray,
        histories: tuple[np.ndarray, np.ndarray],
        features: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Tensor:
        """u(x) of every query, float32 [E, D].

        Args:
            queries: codes, int64 [E]; -1 for a query never seen in training.
            histories: compressed rows (offsets int64 [E+1], item codes), oldest first.
            features: for each query what its declared columns hold, or None for what training knew of it.

        Raises:
            InputError: features are given, and the query tower takes none, or a column is missing or of another kind.
        """
        offsets, items = histories
        inputs = getattr(self.towers.query_tower, "features", None)
        if features is not None and inputs is None:
            raise InputError(
                "features: the query tower of this model takes none; set query_tower.features and train again"
            )
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
            parts.append(self.towers.embed_queries(codes, history, given).float())
        self.towers.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, self.item_embeddings.shape[1], device=device)

    def _items(self) -> Tensor:
        was_training = self.towers.training
        self.towers.eval()
        embeddings = self.towers.item_embeddings()
        self.towers.train(was_training)
        return embeddings
