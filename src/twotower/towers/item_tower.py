"""The item tower: embeds an item from its id and features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.towers.features import FeatureInputs
from twotower.towers.layers.mlp import dense_layers
from twotower.towers.tables import EmbeddingTable


class ItemTower(nn.Module):
    """Id embedding and features, combined by dense layers (Yang et al. 2020, "Mixed Negative Sampling", section 3.1).

        v = DNN([e, features]), plus e if `residual`;   e = e_id, or a learned vector e_0 if the id is not used

    The id is not used for an item that never occurs in training nor, with probability `id_dropout`, for any item of a
    training step. The tower then learns to represent an item by its features alone, as it must for a new item (Volkovs
    et al. 2017, "DropoutNet"). Without features, the tower is the id embedding, followed by an MLP if `hidden` is not
    empty.

    Args:
        num_items: number of items, N.
        dimension: width of the embeddings, D.
        hidden: widths of the hidden layers; empty for one linear map or, without features, for the table alone.
        dropout: dropout in the hidden layers.
        features: inputs for item features; None for a tower without features.
        id_embedding: whether each item has its own embedding.
        id_dropout: share of the items of a training step whose id is hidden.
        trained: items that occur in training, bool [N]; None for all.
        residual: add e to the output, and skip connections around the hidden layers.
        layer_norm: normalise before the activations.
        table: name of the id table in placements.
        projection: False for v = e + the sum of the features' vectors, without layers.

    Raises:
        InputError: the tower has neither ids nor features, or id dropout without features.
    """

    trained: Tensor

    def __init__(
        self,
        num_items: int,
        dimension: int,
        *,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        features: FeatureInputs | None = None,
        id_embedding: bool = True,
        id_dropout: float = 0.0,
        trained: Tensor | None = None,
        residual: bool = False,
        layer_norm: bool = False,
        table: str = "item",
        projection: bool = True,
    ) -> None:
        super().__init__()
        if features is None and (id_dropout > 0 or not id_embedding):
            raise InputError("an item tower without features needs id embeddings")
        self.num_items = num_items
        self.dimension = dimension
        self.ids = EmbeddingTable(num_items, dimension, name=table) if id_embedding else None
        self.features = features
        self.id_dropout = id_dropout
        self.residual = residual
        if features is not None and id_embedding:
            self.no_id = nn.Parameter(torch.zeros(dimension))
            self.register_buffer("trained", torch.ones(num_items, dtype=torch.bool) if trained is None else trained)
        width = dimension * id_embedding + (features.width if features else 0)
        if not projection and features is not None:
            features.require_vectors(dimension)
        layered = projection and (bool(hidden) or features is not None)
        self.mlp = (
            dense_layers([width, *hidden, dimension], dropout=dropout, residual=residual, layer_norm=layer_norm)
            if layered
            else None
        )

    def forward(self, items: Tensor) -> Tensor:
        """Embed items, codes int64 [M] -> [M, D]."""
        if self.features is None:
            own: Tensor = self.ids(items) if self.ids is not None else items
            return self._joined(own, None)
        return self._joined(self._own(items), self.features(items))

    def embed_features(self, encoded: list[Tensor], items: Tensor | None = None) -> Tensor:
        """Embed items given their encoded features (`FeatureInputs.encode`) -> [M, D].

        `items`, int64 [M], contains the codes of items whose id is also used, -1 for no id; None to use no ids.

        Raises:
            InputError: this tower has no features.
        """
        if self.features is None:
            raise InputError("this item tower has no features, only ids; set item_tower.features and retrain")
        features = self.features.embed(encoded)
        if self.ids is None:
            return self._joined(None, features)
        own: Tensor = self.no_id.expand(len(features), -1)
        if items is not None:
            known = self.trained[items.clamp(min=0)] & (items >= 0)
            own = torch.where(known[:, None], self.ids(items.clamp(min=0)), own)
        return self._joined(own, features)

    def _own(self, items: Tensor) -> Tensor | None:
        if self.ids is None:
            return None
        is_used = self.trained[items]
        if self.training and self.id_dropout > 0:
            is_used = is_used & (torch.rand(len(items), device=items.device) >= self.id_dropout)
        return torch.where(is_used[:, None], self.ids(items), self.no_id)

    def _joined(self, own: Tensor | None, features: Tensor | None) -> Tensor:
        parts = [part for part in (own, features) if part is not None]
        if self.mlp is None:
            if features is None or self.features is None:
                return parts[0]
            summed = self.features.summed(features)
            return summed if own is None else own + summed
        output: Tensor = self.mlp(torch.cat(parts, 1))
        return output + own if self.residual and own is not None else output
