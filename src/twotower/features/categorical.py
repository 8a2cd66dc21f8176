"""Encoders of categorical features, with hash buckets or a vocabulary fitted on the training rows of a column.

Encoders produce arrays of one of four forms, and a tower needs only the form and the size:

codes    int64 [rows]           rows of an embedding table; 0 where missing
bags     int64 [rows, width]    rows of an embedding table, to be averaged; padded with 0
numbers  float32 [rows, width]  used unchanged; where the value is missing, the last column is 1 and the others are 0
tokens   int32 [rows, length]   token ids plus 1 of a text, for a text encoder in the tower; padded with 0
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import CategoricalFeature, MultiFeature, TextFeature
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import counted
from twotower.features.parsing import ErrorLocation, as_lists, as_text, as_words

#: Codes of missing and unknown values. With hashing, no value is unknown, so the buckets begin at UNKNOWN.
MISSING = 0
UNKNOWN = 1


@dataclass(frozen=True)
class ValueVocabulary:
    """Codes of texts: 0 for missing, then 1 for unknown and 2, 3, ... for the vocabulary, or 1, 2, ... for buckets.

    A value's bucket is the 64-bit BLAKE2b hash of its UTF-8 text modulo the number of buckets, the same in every
    process.

    Attributes:
        known: the values in ascending order; None if values are hashed.
        buckets: number of buckets; None for a vocabulary.
    """

    known: Vocabulary | None = None
    buckets: int | None = None

    @classmethod
    def fit(cls, texts: pl.Series, *, buckets: int | None, min_count: int) -> ValueVocabulary:
        """Fit a vocabulary of the values that occur at least `min_count` times; buckets need no fitting."""
        if buckets is not None:
            return cls(buckets=buckets)
        counts = texts.drop_nulls().alias("value").value_counts(name="count")
        frequent = counts.filter(pl.col("count") >= min_count)["value"].sort()
        return cls(Vocabulary(frequent.cast(pl.String)))

    @property
    def size(self) -> int:
        """The number of codes, including 0."""
        return len(self.known) + 2 if self.known is not None else (self.buckets or 0) + 1

    def encode(self, texts: pl.Series) -> NDArray[np.int64]:
        """Encode texts, int64 [rows]."""
        if self.known is not None:
            codes = self.known.encode(texts.cast(pl.String)) + 2
            codes[codes == 1] = UNKNOWN
            codes[texts.is_null().to_numpy()] = MISSING
            return codes
        distinct = Vocabulary(texts.drop_nulls().unique().sort().cast(pl.String))
        bucket = np.array([1 + self._bucket(value) for value in distinct.ids] or [MISSING], dtype=np.int64)
        place = distinct.encode(texts.cast(pl.String))
        return np.where(place < 0, MISSING, bucket[np.maximum(place, 0)])

    def _bucket(self, value: str) -> int:
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") % (self.buckets or 1)

    def summary(self, texts: pl.Series) -> str:
        """Summarise the encoding of these texts in one line: the vocabulary size, or how many values share a bucket."""
        distinct = texts.drop_nulls().unique()
        if self.known is not None:
            rare = len(distinct) - len(self.known)
            known = counted(len(self.known), "value")
            return known + (f", {counted(rare, 'rarer value counts', 'rarer values count')} as unknown" if rare else "")
        codes = self.encode(distinct)
        shared = int((np.bincount(codes)[codes] > 1).sum()) if len(codes) else 0
        rate = shared / max(len(codes), 1)
        return (
            f"{counted(len(distinct), 'value')} in {self.buckets:,} buckets, "
            f"{rate:.1%} share a bucket with another value"
        )

    def state(self) -> dict[str, Any]:
        """Return the fitted state as JSON values, for `restore`."""
        return {"values": None if self.known is None else self.known.ids.to_list(), "buckets": self.buckets}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> ValueVocabulary:
        """Restore from the result of `state`."""
        if state["values"] is None:
            return cls(buckets=int(state["buckets"]))
        return cls(Vocabulary(pl.Series("value", state["values"], dtype=pl.String)))


Form = Literal["codes", "bags", "numbers", "tokens"]


class FeatureEncoder(Protocol):
    """A fitted encoder of one feature.

    Attributes:
        form: the form of the encoder's arrays.
        size: number of rows of the embedding table, width of the numbers, or number of token codes.
        note: summary of the fit for the account.
    """

    @property
    def form(self) -> Form: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def note(self) -> str: ...  # noqa: D102

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[Any]:
        """Encode the rows of a column.

        Raises:
            InputError: a value has the wrong type; the message names column and row.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the fitted state as JSON values, for `restore`."""
        ...


@dataclass(frozen=True)
class CategoryEncoder:
    """Encoder of a categorical feature with one value per row."""

    values: ValueVocabulary
    note: str = ""
    form: ClassVar[Form] = "codes"

    @classmethod
    def fit(cls, declared: CategoricalFeature, column: pl.Series, place: ErrorLocation) -> CategoryEncoder:
        """Fit the vocabulary of a column."""
        texts = as_text(column, place)
        values = ValueVocabulary.fit(texts, buckets=declared.buckets, min_count=declared.min_count)
        return cls(values, values.summary(texts))

    @property
    def size(self) -> int:
        """The number of rows of the embedding table."""
        return self.values.size

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.int64]:
        """See `FeatureEncoder`."""
        return self.values.encode(as_text(column, place))

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return self.values.state()

    @classmethod
    def restore(cls, declared: CategoricalFeature, state: dict[str, Any]) -> CategoryEncoder:
        """Restore from the result of `state`."""
        del declared
        return cls(ValueVocabulary.restore(state))


@dataclass(frozen=True)
class MultiCategory:
    """Encoder of a feature with several values per row: genres, tags, words."""

    declared: MultiFeature | TextFeature
    values: ValueVocabulary
    note: str = ""
    form: ClassVar[Form] = "bags"

    @classmethod
    def fit(cls, declared: MultiFeature | TextFeature, column: pl.Series, place: ErrorLocation) -> MultiCategory:
        """Fit the vocabulary of all values in a column."""
        lists = _lists(declared, column, place)
        each = lists.explode(keep_nulls=False, empty_as_null=False).cast(pl.String)
        buckets = declared.buckets if isinstance(declared, MultiFeature) else None
        values = ValueVocabulary.fit(each, buckets=buckets, min_count=declared.min_count)
        cut = int((lists.list.len() > declared.max_values).sum())
        note = values.summary(each) + (
            f"; {counted(cut, 'row')} cut to {counted(declared.max_values, 'value')}" if cut else ""
        )
        return cls(declared, values, note)

    @property
    def size(self) -> int:
        """The number of rows of the embedding table."""
        return self.values.size

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.int64]:
        """Encode as in `FeatureEncoder`; values with the same code, such as all unknown values, count once per row."""
        lists = _lists(self.declared, column, place).list.head(self.declared.max_values)
        frame = pl.DataFrame({"row": np.arange(len(lists)), "value": lists})
        each = frame.explode("value", keep_nulls=False, empty_as_null=False)
        codes = self.values.encode(each["value"].cast(pl.String))
        once = pl.DataFrame({"row": each["row"], "code": codes}).unique(maintain_order=True)
        rows = once["row"].to_numpy()
        starts = np.searchsorted(rows, np.arange(len(lists)))
        place_in_row = np.arange(len(rows)) - starts[rows]
        bags = np.zeros((len(lists), int(place_in_row.max(initial=0)) + 1), dtype=np.int64)
        bags[rows, place_in_row] = once["code"].to_numpy()
        return bags

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return self.values.state()

    @classmethod
    def restore(cls, declared: MultiFeature | TextFeature, state: dict[str, Any]) -> MultiCategory:
        """Restore from the result of `state`."""
        return cls(declared, ValueVocabulary.restore(state))


def _lists(declared: MultiFeature | TextFeature, column: pl.Series, place: ErrorLocation) -> pl.Series:
    if isinstance(declared, TextFeature):
        return as_words(column, place)
    return as_lists(column, declared.separator, place)
