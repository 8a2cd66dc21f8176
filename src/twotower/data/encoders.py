"""Encoders of categorical features: fitted on the training rows of a column, they convert any rows to arrays.

An encoder produces one of three forms of array, which is all that a tower needs to know about a feature:

codes    int64 [rows]           row of an embedding table; 0 where missing
bags     int64 [rows, width]    rows of an embedding table, to be averaged; padded with 0
numbers  float32 [rows, width]  used unchanged; the last column is 1 where the value is missing, the others then 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.columns import Place, as_lists, as_text, as_words
from twotower.data.values import Values
from twotower.feature_config import CategoricalFeature, MultiFeature, TextFeature

Form = Literal["codes", "bags", "numbers"]


class Encoder(Protocol):
    """A fitted encoder of one feature.

    Attributes:
        form: form of its arrays.
        size: number of rows of the embedding table, or width of the numbers.
        note: summary of the fit, for the account.
    """

    @property
    def form(self) -> Form: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def note(self) -> str: ...  # noqa: D102

    def encode(self, column: pl.Series, place: Place) -> NDArray[Any]:
        """Encode rows of the column.

        Raises:
            InputError: a value of the wrong type, with column and row.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the fitted state as JSON values, for `restore`."""
        ...


@dataclass(frozen=True)
class Category:
    """Encoder of a categorical feature with one value per row."""

    values: Values
    note: str = ""
    form: ClassVar[Form] = "codes"

    @classmethod
    def fit(cls, declared: CategoricalFeature, column: pl.Series, place: Place) -> Category:
        """Fit the vocabulary of a column."""
        texts = as_text(column, place)
        values = Values.fit(texts, buckets=declared.buckets, min_count=declared.min_count)
        return cls(values, values.told(texts))

    @property
    def size(self) -> int:
        """Number of rows of the embedding table."""
        return self.values.size

    def encode(self, column: pl.Series, place: Place) -> NDArray[np.int64]:
        """See `Encoder`."""
        return self.values.encode(as_text(column, place))

    def state(self) -> dict[str, Any]:
        """See `Encoder`."""
        return self.values.state()

    @classmethod
    def restore(cls, declared: CategoricalFeature, state: dict[str, Any]) -> Category:
        """Restore from `state`."""
        del declared
        return cls(Values.restore(state))


@dataclass(frozen=True)
class Bag:
    """Encoder of a feature with several values per row: genres, tags, words."""

    declared: MultiFeature | TextFeature
    values: Values
    note: str = ""
    form: ClassVar[Form] = "bags"

    @classmethod
    def fit(cls, declared: MultiFeature | TextFeature, column: pl.Series, place: Place) -> Bag:
        """Fit the vocabulary of all values in a column."""
        lists = _lists(declared, column, place)
        each = lists.explode(keep_nulls=False, empty_as_null=False).cast(pl.String)
        buckets = declared.buckets if isinstance(declared, MultiFeature) else None
        values = Values.fit(each, buckets=buckets, min_count=declared.min_count)
        cut = int((lists.list.len() > declared.max_values).sum())
        note = values.told(each) + (f"; {cut:,} rows cut to {declared.max_values} values" if cut else "")
        return cls(declared, values, note)

    @property
    def size(self) -> int:
        """Number of rows of the embedding table."""
        return self.values.size

    def encode(self, column: pl.Series, place: Place) -> NDArray[np.int64]:
        """See `Encoder`. Values with the same code, such as all unknown values, count once per row."""
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
        """See `Encoder`."""
        return self.values.state()

    @classmethod
    def restore(cls, declared: MultiFeature | TextFeature, state: dict[str, Any]) -> Bag:
        """Restore from `state`."""
        return cls(declared, Values.restore(state))


def _lists(declared: MultiFeature | TextFeature, column: pl.Series, place: Place) -> pl.Series:
    if isinstance(declared, TextFeature):
        return as_words(column, place)
    return as_lists(column, declared.separator, place)
