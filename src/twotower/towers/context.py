"""The context of a request inside a tower, and what is known of a query beside its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.data.encoding import EncodedTable
from twotower.towers.dnn import dense_layers
from twotower.towers.features import FeatureInputs
from twotower.towers.tables import EmbeddingTable


class ContextInputs(nn.Module):
    """The features of requests side by side, [rows, width]; a row of which nothing is known has its own vector.

    In training the context of a row is hidden with probability `dropout`, whole, so that the tower learns what to do
    for a request that brings none.

    Args:
        table: fitted encoders, without rows (`EncodedTable.of_requests`): a context belongs to no id.
        dimension: D, the largest width that `auto` chooses.
        dropout: share of training rows whose context is hidden.
    """

    def __init__(self, table: EncodedTable, dimension: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.inputs = FeatureInputs(table, dimension)
        self.dropout = dropout

    @property
    def width(self) -> int:
        """Of the output."""
        return self.inputs.width

    def forward(self, encoded: Sequence[Tensor] | None, rows: int) -> Tensor:
        """Encoded contexts (`encode_given`, `encode_context`), one tensor for each feature; None: of all unknown."""
        nothing = [self.inputs.get_buffer(f"rows{place}")[-1:] for place in range(len(self.inputs.encoders))]
        if encoded is None:
            return self.inputs.embed(nothing).expand(rows, -1)
        known = list(encoded)
        if self.training and self.dropout > 0:
            hidden = torch.rand(rows, device=nothing[0].device) < self.dropout
            known = [_hide(one, none, hidden) for one, none in zip(known, nothing, strict=True)]
        return self.inputs.embed(known)


def _hide(known: Tensor, nothing: Tensor, hidden: Tensor) -> Tensor:
    if known.ndim == 1:
        return torch.where(hidden, nothing.to(known.dtype), known)
    # Bags are as wide as the fullest of them; what fills them up says nothing.
    nothing = F.pad(nothing, (0, known.shape[1] - nothing.shape[1])).to(known.dtype)
    return torch.where(hidden[:, None], nothing, known)


class KnowsQueries(nn.Module):
    """A part of a tower that knows queries by what is no history of theirs: id, features, and the requests' context.

    Args:
        num_queries: rows of the id table; 0 for none.
        dimension: D.
        trained: queries that have a training row, bool [Q]; None: all. Whole on every rank, also of a shared table.

    Attributes:
        ids: table of id embeddings, or None.
        features: of the queries, or None.
        context: of the requests, or None.
    """

    ids: EmbeddingTable | None
    features: FeatureInputs | None
    context: ContextInputs | None
    trained: Tensor

    def __init__(self, num_queries: int, dimension: int, trained: Tensor | None = None) -> None:
        super().__init__()
        self.ids = EmbeddingTable(num_queries, dimension, name="query") if num_queries else None
        if num_queries:
            all_of_them = torch.ones(num_queries, dtype=torch.bool)
            self.register_buffer("trained", all_of_them if trained is None else trained)

    def by_id(self, queries: Tensor) -> list[Tensor]:
        """Id embeddings of codes int64 [B]: one tensor [B, D], or none.

        Zeros for a new query (-1), and for one without a training row: its vector is where the table started.
        """
        if self.ids is None:
            return []
        rows = queries.clamp(min=0)
        return [self.ids(rows) * ((queries >= 0) & self.trained[rows])[:, None]]

    def by_columns(
        self, queries: Tensor, features: list[Tensor] | None, context: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Features and context, as many as there are, [B, width] each.

        `features` are encoded rows of queries that are new; otherwise their codes tell. `context` are the encoded
        contexts of the requests; None where nothing is known of any.
        """
        parts: list[Tensor] = []
        if self.features is not None:
            parts.append(self.features(queries) if features is None else self.features.embed(features))
        if self.context is not None:
            parts.append(self.context(context, len(queries)))
        return parts

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *told: Any) -> None:
        """An older version did not say which queries have a training row: all of them count as trained."""
        name = f"{prefix}trained"
        if f"{prefix}ids.weight" in state_dict and name not in state_dict and self.ids is not None:
            state_dict = {**state_dict, name: torch.ones_like(self.trained)}
        super()._load_from_state_dict(state_dict, prefix, *told)


class Beside(KnowsQueries):
    """What is known of a query beside the state s of its sequence: id, features, and the context of the request.

        u = s + e_id + MLP([s, e_id, features, context])

    The same form as `QueryTower`, with the state in the place of the pooled history: the sum keeps s in the space of
    the items, and the MLP sees all of it at once, so that a context can change what a sequence means and not only add
    a preference of its own.

    Args:
        num_queries: rows of the id table; 0 for none.
        dimension: D.
        features: of the queries, or None.
        context: of the requests, or None.
        hidden: widths of the MLP's hidden layers.
        dropout: in the MLP.
        residual: skip connections around the hidden layers.
        layer_norm: before their activations.
        trained: queries that have a training row, bool [Q]; None: all.
    """

    def __init__(
        self,
        num_queries: int,
        dimension: int,
        *,
        features: FeatureInputs | None,
        context: ContextInputs | None,
        hidden: Sequence[int],
        dropout: float,
        residual: bool = False,
        layer_norm: bool = False,
        trained: Tensor | None = None,
    ) -> None:
        super().__init__(num_queries, dimension, trained)
        self.features = features
        self.context = context
        width = dimension * (1 + bool(num_queries)) + sum(part.width for part in (features, context) if part)
        self.mlp = dense_layers([width, *hidden, dimension], dropout=dropout, residual=residual, layer_norm=layer_norm)

    def forward(
        self, state: Tensor, queries: Tensor, features: list[Tensor] | None, context: Sequence[Tensor] | None
    ) -> Tensor:
        """States [B, D], codes int64 [B] (-1 for a new query), encoded rows as `QueryTower` takes them -> [B, D]."""
        ids = self.by_id(queries)
        parts = [state, *ids, *self.by_columns(queries, features, context)]
        embedded: Tensor = self.mlp(torch.cat(parts, 1)) + sum(ids, state)
        return embedded
