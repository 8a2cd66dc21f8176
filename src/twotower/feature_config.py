"""Declared features of items and queries: which column, what kind, how it is encoded. Pure data, builds nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Width = Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]


class Section(BaseModel):
    """A part of the configuration: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Feature(Section):
    """A column of the item or query table. Unknown fields are errors."""

    column: str = Field(description="Column of the table.", min_length=1)


class CategoricalFeature(Feature):
    """One value out of a set: a learned vector for each value, one for values not in training, one for none."""

    kind: Literal["categorical"] = "categorical"
    buckets: int | None = Field(None, ge=2, description="Hash into so many vectors instead of keeping a vocabulary.")
    min_count: int = Field(1, ge=1, description="Values in fewer training rows than this count as unknown.")
    width: Width = Field("auto", description="Of a value's vector; auto: 2 sqrt(values), 4 at least, D at most.")


class MultiFeature(Feature):
    """Several values of a set, such as genres or tags: the mean of their vectors."""

    kind: Literal["multi"] = "multi"
    separator: str | None = Field(None, min_length=1, description="Between values of a text column; None: lists.")
    buckets: int | None = Field(None, ge=2, description="Hash into so many vectors instead of keeping a vocabulary.")
    min_count: int = Field(1, ge=1, description="Values in fewer training rows than this count as unknown.")
    max_values: int = Field(32, ge=1, le=1024, description="A row's values after this many are left out.")
    width: Width = Field("auto", description="Of a value's vector; auto: 2 sqrt(values), 4 at least, D at most.")


class NumericFeature(Feature):
    """A number, standardised or by its quantile, and whether it is missing."""

    kind: Literal["numeric"] = "numeric"
    scale: Literal["standard", "log", "quantiles"] = Field(
        "standard", description="standard: mean 0, deviation 1. log: of log(1 + x). quantiles: a vector for each bin."
    )
    bins: int = Field(10, ge=2, le=1000, description="Of scale quantiles: bins with about as many rows each.")
    width: Width = Field("auto", description="Of a bin's vector.")


class DenseFeature(Feature):
    """A vector known beforehand, such as an image or text embedding: a list column, or rows of a .npy file."""

    kind: Literal["dense"] = "dense"
    file: str | None = Field(None, description="A .npy matrix instead of a column; `column` is then its name.")
    ids: str | None = Field(None, description="Ids of the matrix's rows: .npy, or a text file with one id a line.")
    normalise: bool = Field(True, description="Scale every vector to length 1.")

    @model_validator(mode="after")
    def _both(self) -> DenseFeature:
        if (self.file is None) != (self.ids is None):
            raise ValueError("a dense feature from a file needs both `file` and `ids`")
        return self


class TimestampFeature(Feature):
    """A moment: cyclic hour, weekday and day of the year; age before the latest moment in training."""

    kind: Literal["timestamp"] = "timestamp"
    parts: list[Literal["hour", "weekday", "season", "age"]] = Field(
        ["hour", "weekday", "season", "age"],
        min_length=1,
        description="hour, weekday, season: sine and cosine. age: log(1 + days), standardised.",
    )


class TextFeature(Feature):
    """Text: a bag of its words, or the embedding of a sentence-transformers model."""

    kind: Literal["text"] = "text"
    model: str = Field(
        "words", description="words: the mean of learned word vectors. Else a sentence-transformers name or folder."
    )
    min_count: int = Field(2, ge=1, description="Of words: those in fewer training rows count as unknown.")
    max_values: int = Field(64, ge=1, le=1024, description="Of words: a row's words after this many are left out.")
    width: Width = Field("auto", description="Of a word's vector.")


#: Every kind, in the order in which they are documented.
KINDS = (CategoricalFeature, MultiFeature, NumericFeature, DenseFeature, TimestampFeature, TextFeature)

AnyFeature = Annotated[
    CategoricalFeature | MultiFeature | NumericFeature | DenseFeature | TimestampFeature | TextFeature,
    Field(discriminator="kind"),
]


def _distinct(features: list[AnyFeature]) -> list[AnyFeature]:
    """Two encodings of one column are allowed, the same one twice is a slip."""
    seen: set[tuple[str, str]] = set()
    for feature in features:
        if (feature.column, feature.kind) in seen:
            raise ValueError(f"column {feature.column!r} is declared twice as {feature.kind}")
        seen.add((feature.column, feature.kind))
    return features


FeatureList = Annotated[list[AnyFeature], AfterValidator(_distinct)]

#: `none`, `auto` (what `twotower features` proposes), or a list. Told apart first, so that an error in a list is told
#: as one.
Features = Annotated[
    Annotated[Literal["none", "auto"], Tag("name")] | Annotated[FeatureList, Tag("list")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "list"),
]
