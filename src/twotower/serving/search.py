"""From embedded queries to items: the model's index, narrowed by filters, turned by the popularity dial."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from twotower.evaluation.towers import TowerRanker
from twotower.index import ExactCatalog, ExactIndex, Exclusion, Index, PopularityDial
from twotower.index.catalog import Mask
from twotower.serving.artifact import Artifact


def ranker_of(artifact: Artifact) -> TowerRanker:
    """The model's towers and its exact index."""
    history = artifact.config.query_tower.history
    return TowerRanker(artifact.towers, history.length if history else 0, artifact.item_embeddings, progress=True)


def dial_of(artifact: Artifact) -> PopularityDial:
    """The popularity dial of the model's training counts and temperature."""
    return PopularityDial(artifact.item_counts, float(artifact.towers.temperature.detach()))


class Search:
    """One catalog for every setting of the dial.

    Args:
        artifact: the model.
        exact: the exact index over its item embeddings.
        approximate: an index over `dial.items(embeddings)`, D + 1 wide; None for exact search.
    """

    def __init__(self, artifact: Artifact, exact: ExactIndex, approximate: Index | None = None) -> None:
        self.artifact = artifact
        self.dial = dial_of(artifact)
        self.approximate = approximate
        self._plain = ExactCatalog(artifact.item_embeddings, index=exact)

    @property
    def index(self) -> Index:
        """What answers with the dial at 1."""
        return self._plain if self.approximate is None else self.approximate

    @torch.no_grad()
    def search(
        self,
        embedded: Tensor,
        k: int,
        *,
        exclude: Exclusion | None = None,
        allowed: Mask | None = None,
        popularity: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The K items of highest `<u, v> + (b - 1) T log p`.

        Args:
            embedded: u(x), [B, D].
            k: K.
            exclude: compressed rows of item codes to leave out.
            allowed: bool [N], the only items that may come back.
            popularity: b.

        Returns:
            scores and item codes, [B, K] each.
        """
        if self.approximate is None and popularity == 1.0:
            # The very index that evaluation ranks with: one more dimension, though zero, could round differently.
            return self._plain.search(embedded, k, exclude, allowed=allowed)
        index = self._dialled if self.approximate is None else self.approximate
        scores, items = index.search(self.dial.queries(embedded, popularity), k, exclude, allowed=allowed)
        return scores + self.dial.offset(popularity), items

    @cached_property
    def _dialled(self) -> ExactCatalog:
        return ExactCatalog(self.dial.items(self.artifact.item_embeddings))
