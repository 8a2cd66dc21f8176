"""Search of embedded queries in the model's index, with filters and the popularity dial."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.index import ApproximateIndex, ExactCatalog, Exclusion, Index, PopularityDial
from twotower.index.catalog import Mask
from twotower.ranking.tower_ranker import TowerRanker
from twotower.serving.model_folder import SavedModel


def ranker_of(artifact: SavedModel) -> TowerRanker:
    """Build the ranker of a model: its towers with its exact index."""
    history = artifact.config.query_tower.history
    return TowerRanker(artifact.towers, history.length if history else 0, artifact.item_embeddings, progress=True)


def dial_of(artifact: SavedModel) -> PopularityDial:
    """Build the popularity dial from the model's training counts and temperature."""
    trained = artifact.towers.item_tower.num_items
    return PopularityDial(artifact.item_counts, float(artifact.towers.temperature.detach()), trained)


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
        """The index used when the dial is 1."""
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
        popularity: float = 1.0,
        exactly: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Find the K items with the highest `<u, v> + (b - 1) T log p`.

        Args:
            embedded: u(x), [B, D].
            k: K.
            exclude: item codes to leave out for each query, in compressed rows.
            allowed: bool [N], the only items that may be returned.
            popularity: b.
            exactly: search every item, even if there is an approximate index.

        Returns:
            Scores and item codes, [B, K] each.
        """
        if self.approximate is not None and not exactly:
            queries = self.dial.queries(embedded, popularity)
            scores, items = self.approximate.search(queries, k, exclude, allowed=allowed)
            return scores + self.dial.offset(popularity), items
        if popularity == 1.0:
            # The same search as in evaluation: adding a bias, even zero, could round differently.
            return self.plain.search(embedded, k, exclude, allowed=allowed)
        scores, items = self._at(popularity).search(embedded, k, exclude, allowed=allowed)
        return scores + self.dial.offset(popularity), items

    def _at(self, popularity: float) -> ExactCatalog:
        """Return the exact catalog for a setting of the dial; it shares everything but one number per item."""
        cached = self._turned
        if cached is None or cached[0] != popularity:
            cached = popularity, self.plain.with_bias((popularity - 1.0) * self.dial.coordinate())
            self._turned = cached
        return cached[1]
