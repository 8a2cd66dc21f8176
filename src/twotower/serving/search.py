"""From embedded queries to items: the model's index, narrowed by filters, turned by the popularity dial."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.evaluation.towers import TowerRanker
from twotower.index import ApproximateIndex, ExactCatalog, Exclusion, Index, PopularityDial
from twotower.index.catalog import Mask
from twotower.serving.artifact import Artifact


def ranker_of(artifact: Artifact) -> TowerRanker:
    """The model's towers and its exact index."""
    history = artifact.config.query_tower.history
    return TowerRanker(artifact.towers, history.length if history else 0, artifact.item_embeddings, progress=True)


def dial_of(artifact: Artifact) -> PopularityDial:
    """The popularity dial of the model's training counts and temperature."""
    trained = artifact.towers.item_tower.num_items
    return PopularityDial(artifact.item_counts, float(artifact.towers.temperature.detach()), trained)


class Search:
    """One catalog for every setting of the dial.

    Args:
        artifact: the model.
        approximate: an index over the embeddings and the dial's coordinate, D + 1 wide; None for exact search.
        alive: bool [N], False for removed items; None where all are there.
    """

    def __init__(
        self, artifact: Artifact, approximate: ApproximateIndex | None = None, alive: Mask | None = None
    ) -> None:
        self.artifact = artifact
        self.dial = dial_of(artifact)
        self.approximate = approximate
        self.alive = alive
        self._turned: tuple[float, ExactCatalog] | None = None

    @property
    def index(self) -> Index:
        """What answers with the dial at 1."""
        return self.plain if self.approximate is None else self.approximate

    @cached_property
    def plain(self) -> ExactCatalog:
        """The exact catalog, made when first asked for."""
        return ExactCatalog(self.artifact.item_embeddings, alive=self.alive)

    @cached_property
    def neighbours(self) -> ExactCatalog:
        """The catalog by cosine: itself where a model's embeddings have length 1 already."""
        if self.artifact.config.objective.similarity == "cosine":
            return self.plain
        return ExactCatalog(F.normalize(self.artifact.item_embeddings, dim=1), alive=self.alive)

    @torch.no_grad()
    def search(
        self,
        embedded: Tensor,
        k: int,
        *,
        exclude: Exclusion | None = None,
        allowed: Mask | None = None,
        popularity: float = 1.0,
        exactly: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The K items of highest `<u, v> + (b - 1) T log p`.

        Args:
            embedded: u(x), [B, D].
            k: K.
            exclude: compressed rows of item codes to leave out.
            allowed: bool [N], the only items that may come back.
            popularity: b.
            exactly: search every item, whatever index there is.

        Returns:
            scores and item codes, [B, K] each.
        """
        if self.approximate is not None and not exactly:
            queries = self.dial.queries(embedded, popularity)
            scores, items = self.approximate.search(queries, k, exclude, allowed=allowed)
            return scores + self.dial.offset(popularity), items
        if popularity == 1.0:
            # The very search that evaluation ranks with: a bias, though zero, could round differently.
            return self.plain.search(embedded, k, exclude, allowed=allowed)
        scores, items = self._at(popularity).search(embedded, k, exclude, allowed=allowed)
        return scores + self.dial.offset(popularity), items

    def _at(self, popularity: float) -> ExactCatalog:
        """The exact catalog with the dial turned, which shares everything but one number an item."""
        held = self._turned
        if held is None or held[0] != popularity:
            held = popularity, self.plain.with_bias((popularity - 1.0) * self.dial.coordinate())
            self._turned = held
        return held[1]
