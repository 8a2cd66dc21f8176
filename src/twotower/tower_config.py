"""The settings of both towers as pydantic models: pure data, builds nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twotower.feature_config import Features, Section


class SequenceConfig(Section):
    """A history read in its order: every position of a query's sequence is a training row; see docs/sequences.md."""

    kind: Literal["transformer", "gru"] = "transformer"
    blocks: int = Field(2, ge=1, le=64, description="Transformer blocks, or layers of the GRU.")
    heads: int = Field(2, ge=1, le=64, description="Attention heads of each block; they divide D.")
    expansion: float = Field(4.0, gt=0, le=16, description="Units of a block's feed-forward layer, over D.")
    gated: bool = Field(False, description="RMSNorm and SwiGLU in the blocks instead of LayerNorm and GELU.")
    recency: int = Field(
        0, ge=0, le=64, description="Averages of the items so far, by learned weights of distance, around the encoder."
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="Of the input, of what blocks add, and of their hidden units.")
    gaps: bool = Field(False, description="Read the time between one item and the next as well; needs timestamps.")


class HistoryConfig(Section):
    """The recent items of a query, pooled with learned weights for each step back in time, or read in their order."""

    length: int = Field(50, ge=1, le=10_000, description="L: how many of the most recent items are looked at.")
    heads: int = Field(4, ge=1, le=64, description="How many pooled averages, each with its own recency weights.")
    dropout: float = Field(0.3, ge=0, lt=1, description="Share of history items hidden while training.")
    share_table: bool = Field(True, description="Look the history's items up in the item tower's own table.")
    item_features: bool = Field(
        False, description="Embed the history's items by the whole item tower, features included, not by their id."
    )
    sequence: SequenceConfig | None = Field(
        None, description="Read the history by a transformer or a GRU. None: pool it (heads, MLP)."
    )


class QueryTowerConfig(Section):
    """From a query to its embedding: an id embedding and/or the pooled history, then an MLP."""

    id_embedding: bool = Field(False, description="A learned vector for each query seen in training.")
    history: HistoryConfig | None = HistoryConfig()
    hidden: list[Annotated[int, Field(ge=1)]] = Field([128], description="Widths of the hidden layers of the MLP.")
    dropout: float = Field(0.3, ge=0, lt=1)
    residual: bool = Field(False, description="Skip connections around the MLP's hidden layers.")
    layer_norm: bool = Field(False, description="Layer norm before the activations of the MLP.")
    features: Features = Field(
        "none", description="Columns of the query table: none, auto (what `twotower features` proposes), or a list."
    )
    context: Features = Field(
        "none",
        description="Columns of the interactions that a request has too, such as device or hour: none, auto, a list.",
    )
    context_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of training rows whose context is hidden, for requests that bring none."
    )


class ItemTowerConfig(Section):
    """From an item to its embedding: id embedding and declared features, joined by an MLP."""

    dimension: int = Field(64, ge=1, le=4096, description="D: width of the embeddings in which both towers end.")
    table_precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="What the embedding tables of both towers are stored in. bfloat16: half the memory."
    )
    hidden: list[Annotated[int, Field(ge=1)]] = Field([], description="Widths of the hidden layers; empty: no MLP.")
    dropout: float = Field(0.0, ge=0, lt=1)
    residual: bool = Field(False, description="Add the id embedding to the output; skip connections in the MLP.")
    layer_norm: bool = Field(False, description="Layer norm before the activations of the MLP.")
    features: Features = Field(
        "none", description="Columns of the item table: none, auto (what `twotower features` proposes), or a list."
    )
    id_embedding: bool = Field(True, description="A learned vector for each item; false: features alone.")
    id_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability that an item's id is hidden while training; needs features."
    )

    @model_validator(mode="after")
    def _knows_items(self) -> ItemTowerConfig:
        if self.features == "none" and (self.id_dropout > 0 or not self.id_embedding):
            raise ValueError("id_dropout and id_embedding: false need features; without any an item is known by its id")
        return self
