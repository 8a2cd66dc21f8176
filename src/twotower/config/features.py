"""Declarations of features (column, kind, encoding) of items, queries and requests, as pure data."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Width = Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]


def _not_blank(path: str) -> str:
    if not path.strip():
        raise ValueError("expected a path, found only blanks")
    return path


def matching(pattern: str, expected: str) -> AfterValidator:
    """Make a validator for text that must match a regular expression as a whole; `expected` completes its message."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


#: Path of a file; an empty or blank path would mean the current folder.
FilePath = Annotated[str, AfterValidator(_not_blank)]


class Section(BaseModel):
    """A section of the configuration. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self, section: str, **values: Any) -> Self:
        """Return a copy with some values of one section replaced; the new values are not validated."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})


class Feature(Section):
    """A column of the item or query table, or of the interactions. Unknown fields are errors."""

    column: str = Field(description="Column of the table.", min_length=1)


class CategoricalFeature(Feature):
    """A categorical value: one learned vector per value, one for unknown and one for missing values."""

    kind: Literal["categorical"] = "categorical"
    buckets: int | None = Field(
        None, ge=2, description="Hash values to this many vectors instead of storing a vocabulary."
    )
    min_count: int = Field(1, ge=1, description="Treat values in fewer training rows than this as unknown.")
    width: Width = Field(
        "auto", description="Width of a value's vector. auto: 2 sqrt(values), at least 4 and at most D."
    )


class MultiFeature(Feature):
    """Several categorical values, such as genres or tags: the mean of their vectors."""

    kind: Literal["multi"] = "multi"
    separator: str | None = Field(
        None, min_length=1, description="Separator between the values of a text column. null: the column has lists."
    )
    buckets: int | None = Field(
        None, ge=2, description="Hash values to this many vectors instead of storing a vocabulary."
    )
    min_count: int = Field(1, ge=1, description="Treat values in fewer training rows than this as unknown.")
    max_values: int = Field(32, ge=1, le=1024, description="Use at most this many values per row.")
    width: Width = Field(
        "auto", description="Width of a value's vector. auto: 2 sqrt(values), at least 4 and at most D."
    )


class NumericFeature(Feature):
    """A number, standardised or binned by quantile, with an indicator for missing values."""

    kind: Literal["numeric"] = "numeric"
    scale: Literal["standard", "log", "quantiles"] = Field(
        "standard",
        description="standard: mean 0, variance 1. log: log(1 + x), standardised. quantiles: one vector per bin.",
    )
    bins: int = Field(10, ge=2, le=1000, description="With scale quantiles: the number of equally filled bins.")
    width: Width = Field("auto", description="Width of a bin's vector.")


class DenseFeature(Feature):
    """A precomputed vector, such as an image or text embedding: a list column, or the rows of a .npy file."""

    kind: Literal["dense"] = "dense"
    file: FilePath | None = Field(
        None, description="A .npy matrix used instead of a column; `column` is then only a name."
    )
    ids: FilePath | None = Field(None, description="Ids of the matrix rows: .npy, or a text file with one id per line.")
    normalise: bool = Field(True, description="Scale every vector to length 1.")

    @model_validator(mode="after")
    def _require_file_and_ids(self) -> DenseFeature:
        if (self.file is None) != (self.ids is None):
            raise ValueError("a dense feature from a file needs both `file` and `ids`")
        return self


class TimestampFeature(Feature):
    """A timestamp: cyclic hour, weekday and day of the year, and its age at the latest training timestamp."""

    kind: Literal["timestamp"] = "timestamp"
    parts: list[Literal["hour", "weekday", "season", "age"]] = Field(
        ["hour", "weekday", "season", "age"],
        min_length=1,
        description="hour, weekday, season: sine and cosine. age: log(1 + days), standardised.",
    )


class TextFeature(Feature):
    """Text: a bag of words, or the embedding of a pretrained text encoder, which can be trained with the towers."""

    kind: Literal["text"] = "text"
    model: FilePath = Field(
        "words",
        description="words: the mean of learned word vectors. Otherwise the name or folder of a sentence-transformers "
        "model.",
    )
    train: Literal["frozen", "lora", "full"] = Field(
        "frozen",
        description="frozen: the model's vectors are computed once. lora: low-rank updates of its linear layers are "
        "trained. full: all its weights are trained.",
    )
    prompt: str = Field(
        "", max_length=1000, description="Prefix added to every text, such as 'query: '. Not with model: words."
    )
    max_tokens: int = Field(
        128,
        ge=8,
        le=8192,
        description="With train: maximum number of tokens read from a text, up to the limit of the model.",
    )
    share: bool = Field(
        True,
        description="With train: share one encoder among all features with this model and these settings, in both "
        "towers. false: a separate encoder for this feature.",
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the updates with train: lora.")
    lora_alpha: float = Field(32.0, gt=0, description="The updates are multiplied by alpha / rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout of the inputs of the updates.")
    gradient_checkpointing: bool = Field(
        False, description="With train: recompute activations in the backward pass. Less memory, more time."
    )
    min_count: int = Field(
        2, ge=1, description="With model: words: treat words in fewer training rows than this as unknown."
    )
    max_values: int = Field(64, ge=1, le=1024, description="With model: words: use at most this many words per row.")
    width: Width = Field("auto", description="With model: words: width of a word's vector.")

    @model_validator(mode="after")
    def _words_have_no_encoder(self) -> TextFeature:
        if self.model == "words" and (self.train != "frozen" or self.prompt):
            raise ValueError("train and prompt need a text model; model: words learns word vectors from scratch")
        return self


#: All kinds, in the order of the documentation.
KINDS = (CategoricalFeature, MultiFeature, NumericFeature, DenseFeature, TimestampFeature, TextFeature)

AnyFeature = Annotated[
    CategoricalFeature | MultiFeature | NumericFeature | DenseFeature | TimestampFeature | TextFeature,
    Field(discriminator="kind"),
]


def _distinct(features: list[AnyFeature]) -> list[AnyFeature]:
    """Reject a column declared twice with the same kind; two kinds for one column are allowed."""
    seen: set[tuple[str, str]] = set()
    for feature in features:
        if (feature.column, feature.kind) in seen:
            raise ValueError(f"column {feature.column!r} is declared twice as {feature.kind}")
        seen.add((feature.column, feature.kind))
    return features


FeatureList = Annotated[list[AnyFeature], AfterValidator(_distinct)]

#: `none`, `auto` (the proposal of `twotower features`), or a list. Because of the discriminator, pydantic reports an
#: error in a list as an error of the list.
Features = Annotated[
    Annotated[Literal["none", "auto"], Tag("name")] | Annotated[FeatureList, Tag("list")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "list"),
]
