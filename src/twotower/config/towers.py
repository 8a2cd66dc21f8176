"""The settings of both towers as pydantic models, which are pure data and build nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from twotower.config.features import Features, Section


class SequenceConfig(Section):
    """Settings of a sequence encoder, which trains on every position of the history; see docs/sequences.md."""

    kind: Literal["transformer", "gru"] = "transformer"
    blocks: int = Field(2, ge=1, le=64, description="Transformer blocks, or layers of the GRU.")
    heads: int = Field(2, ge=1, le=64, description="Attention heads of each block; must divide D.")
    expansion: float = Field(4.0, gt=0, le=16, description="Width of a block's feed-forward layer as a multiple of D.")
    gated: bool = Field(False, description="Use RMSNorm and SwiGLU in the blocks instead of LayerNorm and GELU.")
    recency: int = Field(
        0,
        ge=0,
        le=64,
        description="Number of averages of the preceding items, each with a learned weight per distance; added "
        "to the encoder's input and output.",
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="Dropout of the input, of the blocks' outputs and of the blocks' hidden units."
    )
    gaps: bool = Field(False, description="Also read the time between consecutive items; needs timestamps.")


class HistoryConfig(Section):
    """The recent items of a query, pooled with learned recency weights or encoded as a sequence."""

    length: int = Field(50, ge=1, le=10_000, description="L, the number of most recent items to use.")
    heads: int = Field(4, ge=1, le=64, description="Number of pooled averages, each with its own recency weights.")
    power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Exponent a: the averages are multiplied by n^a, where n is the number of items in the history. "
        "0 gives means, 1 gives sums.",
    )
    dropout: float = Field(0.3, ge=0, lt=1, description="Fraction of history items hidden during training.")
    share_table: bool = Field(True, description="Look up the history's items in the item tower's id table.")
    item_features: bool = Field(
        False,
        description="Embed the history's items with the whole item tower, including features, rather than by id alone.",
    )
    sequence: SequenceConfig | None = Field(
        None, description="Encode the history with a transformer or a GRU. null: average its items (see heads) instead."
    )
    event_weights: bool = Field(
        False,
        description="With data.events: each head has a learned weight for every pair of the requested type and the "
        "type of a history item. Not with sequence.",
    )

    @model_validator(mode="after")
    def _pools_by_type(self) -> HistoryConfig:
        if self.event_weights and self.sequence is not None:
            raise ValueError(
                "event_weights: a sequence tower does not read the types of its items; expected sequence: null"
            )
        return self


class QueryTowerConfig(Section):
    """The query tower: an id embedding, the history, features and context, combined by an MLP."""

    id_embedding: bool = Field(False, description="A learned vector per query seen in training.")
    propagation: int = Field(
        0,
        ge=0,
        le=8,
        description="Layers of propagation of both id tables over the graph of queries and items during training "
        "(LightGCN); the saved tables are the propagated ones. Needs id_embedding, and no history, hidden or features.",
    )
    history: HistoryConfig | None = HistoryConfig()
    hidden: list[Annotated[int, Field(ge=1)]] | None = Field(
        [128],
        max_length=64,
        description="Widths of the hidden layers of the MLP. null: no MLP; the embedding is the sum of the "
        "id and history vectors.",
    )
    projection: bool = Field(
        True,
        description="false: no dense layers. The embedding is the sum of the id, the history and all features and "
        "context, which must be text or dense vectors of width D. hidden must be null.",
    )
    dropout: float = Field(0.3, ge=0, lt=1)
    residual: bool = Field(False, description="Skip connections around the MLP's hidden layers.")
    layer_norm: bool = Field(False, description="Layer norm before the activations of the MLP.")
    features: Features = Field(
        "none", description="Columns of the query table: none, auto (as `twotower features` proposes), or a list."
    )
    context: Features = Field(
        "none",
        description="Columns of the interactions that are also known at request time, such as device or hour: none, "
        "auto, or a list.",
    )
    context_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of training rows whose context is hidden, so that the model also serves requests "
        "without a context.",
    )

    @model_validator(mode="after")
    def _has_layers(self) -> QueryTowerConfig:
        if self.projection:
            return self
        if self.hidden is not None or self.residual or self.layer_norm:
            raise ValueError("projection=false has no layers; expected hidden=null, residual=false, layer_norm=false")
        if self.history is not None and self.history.sequence is not None:
            raise ValueError("projection=false: a sequence tower has its own layers; use projection=true")
        return self


def nested_widths(nested: Sequence[int], dimension: int) -> tuple[int, ...]:
    """Return the nested widths, ascending, with D as the last."""
    return (*(width for width in nested if width < dimension), dimension)


class ItemTowerConfig(Section):
    """The item tower: an id embedding and declared features, combined by an MLP."""

    dimension: int = Field(64, ge=1, le=4096, description="D: width of the output embeddings of both towers.")
    nested: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        [],
        max_length=16,
        description="Widths, ascending, at which the embeddings are also trained, such as [64, 128]: the loss is the "
        "mean of the losses of the first 64, 128 and all D coordinates (Matryoshka), so that an index may use any of "
        "them. D is added if it is not the last. Empty: D alone.",
    )
    nested_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        max_length=17,
        description="Weights of the losses of the nested widths, D last, relative to each other. null: equal weights.",
    )
    table_precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Storage type of the embedding tables of both towers. bfloat16 halves the memory."
    )
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [], max_length=64, description="Widths of the hidden layers. Empty: no MLP."
    )
    projection: bool = Field(
        True,
        description="false: no dense layers. The embedding is the sum of the id and all features, which must be text "
        "or dense vectors of width D. hidden must be empty.",
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    residual: bool = Field(
        False, description="Add the id embedding to the output, and use skip connections in the MLP."
    )
    layer_norm: bool = Field(False, description="Layer norm before the activations of the MLP.")
    features: Features = Field(
        "none", description="Columns of the item table: none, auto (as `twotower features` proposes), or a list."
    )
    id_embedding: bool = Field(True, description="A learned vector per item. false: features only.")
    bias: bool = Field(
        False, description="A learned number per item, added to its score; stored as an extra coordinate."
    )
    popularity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="a: a log p_j is added to the score of item j, whose share of the training rows is p_j, in "
        "training and in the saved model, so that the vectors represent only preferences; stored as an extra "
        "coordinate.",
    )
    event_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a, with data.events: a log (p_j^t / p_j) is added to the score of item j for a request of type t, "
        "where p_j^t is its share of the training rows of type t and p_j its share of all training rows; stored as an "
        "extra coordinate for each type. null: 1 with data.events.",
    )
    id_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability that an item's id is hidden during training; needs features."
    )

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths at which the loss is computed, ascending, D last."""
        return nested_widths(self.nested, self.dimension)

    @model_validator(mode="after")
    def _nests(self) -> ItemTowerConfig:
        if any(one >= next_one for one, next_one in pairwise(self.nested)):
            raise ValueError(f"nested: expected ascending widths, each once, found {self.nested}")
        if self.nested and self.nested[-1] > self.dimension:
            raise ValueError(
                f"nested: {self.nested[-1]} is wider than the embeddings; expected widths up to dimension, "
                f"{self.dimension}"
            )
        if self.nested_weights is not None and len(self.nested_weights) != len(self.widths):
            raise ValueError(
                f"nested_weights: expected one weight for each of the widths {list(self.widths)}, found "
                f"{len(self.nested_weights)}"
            )
        return self

    @model_validator(mode="after")
    def _knows_items(self) -> ItemTowerConfig:
        if self.features == "none" and (self.id_dropout > 0 or not self.id_embedding):
            raise ValueError(
                "id_dropout above 0 and id_embedding=false need features; without features an item has only its id"
            )
        if not self.projection and (self.hidden or self.residual or self.layer_norm):
            raise ValueError("projection=false has no layers; expected hidden=[], residual=false and layer_norm=false")
        return self
