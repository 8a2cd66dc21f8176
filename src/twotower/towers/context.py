"""Inputs of a query tower other than its history: query ids, query features and the request context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.features.feature_set import EncodedTable
from twotower.features.parsing import ErrorLocation
from twotower.towers.features import FeatureInputs
from twotower.towers.layers.mlp import dense_layers
from twotower.towers.tables import EmbeddingTable
from twotower.towers.text import TextTransformer


class ContextInputs(nn.Module):
    """The concatenated context features of requests, [rows, width]; without a context, all of them count as missing.

    In training the whole context of a row is hidden with probability `dropout`, so that the tower learns to handle
    requests without a context. The event type, which every request has, is not hidden.

    Args:
        table: fitted encoders, without rows (`EncodedTable.of_requests`): a context does not belong to an id.
        dimension: D, the maximum width that `auto` chooses.
        dropout: share of training rows whose context is hidden.
        texts: as in `FeatureInputs`.
        event: name of the feature with the event type; None if rows have no event types.
        event_types: the names of the types.

    Attributes:
        event_types: the names of the types; empty without types.
    """

    def __init__(
        self,
        table: EncodedTable,
        dimension: int,
        *,
        dropout: float = 0.0,
        texts: dict[Any, TextTransformer] | None = None,
        event: str | None = None,
        event_types: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.inputs = FeatureInputs(table, dimension, texts)
        self.dropout = dropout
        self.event_types = tuple(event_types)
        self.event_place: int | None = None
        if event is not None:
            self.event_place = [one.column for one in table.features.declared].index(event)
            encoder = table.features.encoders[self.event_place]
            names = pl.Series(event, self.event_types, dtype=pl.String)
            codes = torch.from_numpy(encoder.encode(names, ErrorLocation("data.events")))
            types = torch.full((encoder.size,), -1)
            types[codes] = torch.arange(len(codes))
            types[:2] = -1  # missing and unknown values
            self.register_buffer("types", types, persistent=False)

    def asked(self, encoded: Sequence[Tensor] | None, rows: int) -> Tensor:
        """Return the event type that each of B requests asks for, as its position in `event_types`, int64 [B].

        Args:
            encoded: the contexts, as in `forward`.
            rows: number of requests, B.

        Returns:
            The positions, -1 where the type is unknown.
        """
        if encoded is None or self.event_place is None:
            return torch.full((rows,), -1, device=self.inputs.get_buffer("rows0").device)
        return self.get_buffer("types")[encoded[self.event_place]]

    @property
    def width(self) -> int:
        """Width of the output."""
        return self.inputs.width

    def forward(self, encoded: Sequence[Tensor] | None, rows: int) -> Tensor:
        """Embed contexts encoded by `encode_context_rows` or `encode_context`; `encoded` is None if all are unknown."""
        nothing = [self.inputs.get_buffer(f"rows{place}")[-1:] for place in range(len(self.inputs.encoders))]
        if encoded is None:
            return self.inputs.embed(nothing).expand(rows, -1)
        known = list(encoded)
        if self.training and self.dropout > 0:
            hidden = torch.rand(rows, device=nothing[0].device) < self.dropout
            known = [
                one if place == self.event_place else _hide(one, none, hidden)
                for place, (one, none) in enumerate(zip(known, nothing, strict=True))
            ]
        return self.inputs.embed(known)


def _hide(known: Tensor, nothing: Tensor, hidden: Tensor) -> Tensor:
    if known.ndim == 1:
        return torch.where(hidden, nothing.to(known.dtype), known)
    # Bags are padded to the width of the largest one; padding has no effect.
    nothing = F.pad(nothing, (0, known.shape[1] - nothing.shape[1])).to(known.dtype)
    return torch.where(hidden[:, None], nothing, known)


class QueryInputs(nn.Module):
    """Base class for query inputs other than the history: id, features, and the request context.

    Args:
        num_queries: rows of the id table; 0 for none.
        dimension: width of the embeddings, D.
        trained: queries that have a training row, bool [Q]; None for all. Every rank has the whole mask, even if the
            table is shared.

    Attributes:
        ids: table of id embeddings, or None.
        features: inputs for query features, or None.
        context: inputs for request context, or None.
    """

    ids: EmbeddingTable | None
    features: FeatureInputs | None
    context: ContextInputs | None
    trained: Tensor

    def __init__(self, num_queries: int, dimension: int, trained: Tensor | None = None) -> None:
        super().__init__()
        self.ids = EmbeddingTable(num_queries, dimension, name="query") if num_queries else None
        if num_queries:
            everything = torch.ones(num_queries, dtype=torch.bool)
            self.register_buffer("trained", everything if trained is None else trained)

    def by_id(self, queries: Tensor) -> list[Tensor]:
        """Look up the id embeddings of codes int64 [B]: a list of one tensor [B, D], empty without an id table.

        A new query (-1) gets zeros, as does a query without training rows, whose vector still has its initial value.
        """
        if self.ids is None:
            return []
        rows = queries.clamp(min=0)
        return [self.ids(rows) * ((queries >= 0) & self.trained[rows])[:, None]]

    def by_columns(
        self, queries: Tensor, features: list[Tensor] | None, context: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Embed the features and the context, if the tower has them, [B, width] each.

        Args:
            queries: codes int64 [B].
            features: encoded feature rows of new queries; None to look the features up by code.
            context: encoded request contexts; None if there are none.
        """
        parts: list[Tensor] = []
        if self.features is not None:
            parts.append(self.features(queries) if features is None else self.features.embed(features))
        if self.context is not None:
            parts.append(self.context(context, len(queries)))
        return parts

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the state; if an older version saved it without `trained`, all queries count as trained."""
        name = f"{prefix}trained"
        if f"{prefix}ids.weight" in state_dict and name not in state_dict and self.ids is not None:
            state_dict = {**state_dict, name: torch.ones_like(self.trained)}
        super()._load_from_state_dict(state_dict, prefix, *args)


class SideInputs(QueryInputs):
    """The side inputs of a sequence tower: id, features and request context, combined with the sequence state s.

        u = s + e_id + MLP([s, e_id, features, context])

    This is `QueryTower` with the state instead of the pooled history. The sum keeps s in the space of the
    items; the MLP reads all inputs together, so that a context can change what a sequence means instead of only adding
    a preference.

    Args:
        num_queries: rows of the id table; 0 for none.
        dimension: width of the embeddings, D.
        features: inputs for query features, or None.
        context: inputs for request context, or None.
        hidden: widths of the MLP's hidden layers.
        dropout: dropout in the MLP.
        residual: add skip connections around the hidden layers.
        layer_norm: apply layer normalisation before the activations of the hidden layers.
        trained: queries that have a training row, bool [Q]; None for all.
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
        """Combine states [B, D] with query codes int64 [B] (-1 if new), features and context as in `QueryTower`."""
        ids = self.by_id(queries)
        parts = [state, *ids, *self.by_columns(queries, features, context)]
        embedded: Tensor = self.mlp(torch.cat(parts, 1)) + sum(ids, state)
        return embedded
