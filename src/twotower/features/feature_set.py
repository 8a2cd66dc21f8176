"""The fitted features of one side, which convert tables, data frames or dicts to arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import load_file, save_file

from twotower.config.features import (
    AnyFeature,
    CategoricalFeature,
    DenseFeature,
    MultiFeature,
    NumericFeature,
    TextFeature,
    TimestampFeature,
)
from twotower.data.loading.batches import Encoded
from twotower.distributed.row_files import stored_shapes
from twotower.features.categorical import CategoryEncoder, FeatureEncoder, MultiCategory
from twotower.features.frames import RowsLike, check_columns, frame_of, with_files
from twotower.features.numeric import DenseEncoder, NumericEncoder, Quantile, TimestampEncoder
from twotower.features.parsing import ErrorLocation
from twotower.features.text import TextEncoder
from twotower.features.tokens import TokenEncoder

#: Maximum size in bytes of the JSON file with the fitted encoders, which may have large vocabularies.
MOST_JSON = 256 << 20
_DECLARED: TypeAdapter[AnyFeature] = TypeAdapter(AnyFeature)


def _kind(declared: AnyFeature) -> Any:
    """Return the encoder class for a declared feature."""
    if isinstance(declared, NumericFeature):
        return Quantile if declared.scale == "quantiles" else NumericEncoder
    if isinstance(declared, TextFeature):
        if declared.model == "words":
            return MultiCategory
        return TextEncoder if declared.train == "frozen" else TokenEncoder
    classes = {
        CategoricalFeature: CategoryEncoder,
        MultiFeature: MultiCategory,
        TimestampFeature: TimestampEncoder,
        DenseFeature: DenseEncoder,
    }
    return classes[type(declared)]


@dataclass(frozen=True)
class FeatureSet:
    """Fitted encoders of the declared features of one side.

    Attributes:
        side: "item", "query", or "context" of a request.
        declared: the declared features.
        encoders: one per declared feature.
        widths: the width of each feature in the tower's input, set when a tower is built; None before. A vocabulary
            that grows keeps its width, because `auto` would choose a different width for the new number of values.

    Example:
        features = FeatureSet.fit("item", [NumericFeature(column="price")], data.item_table, ids=data.items.ids)
        features.encode([{"price": 3.5}, {"price": None}])
    """

    side: str
    declared: list[AnyFeature]
    encoders: list[FeatureEncoder]
    widths: list[int] | None = None

    @classmethod
    def fit(
        cls,
        side: str,
        declared: Sequence[AnyFeature],
        table: pl.DataFrame | None,
        *,
        ids: pl.Series,
        known: NDArray[np.bool_] | None = None,
    ) -> FeatureSet:
        """Fit the vocabularies, means and bins.

        Args:
            side: "item" or "query".
            declared: the features; at least one.
            table: row i describes id i; None if every feature comes from a file.
            ids: the ids of the rows.
            known: which rows occur in training, bool [rows]; only these are used. None for all rows.

        Raises:
            InputError: there is no table, or a column is missing or has the wrong type.
        """
        frame = with_files(pl.DataFrame({"": ids}) if table is None else table, declared, ids)
        place = _place(side, ids)
        check_columns(frame, declared, place.table, needs_table=table is None)
        rows = np.flatnonzero(known) if known is not None else np.arange(len(frame))
        place = ErrorLocation(place.table, ids.gather(rows), side)
        return cls.fit_rows(side, declared, frame.select({one.column for one in declared})[rows], place)

    @classmethod
    def fit_rows(
        cls, side: str, declared: Sequence[AnyFeature], frame: pl.DataFrame, place: ErrorLocation
    ) -> FeatureSet:
        """Fit on all rows of a frame.

        Raises:
            InputError: a column is missing or has the wrong type; the message names `place`.
        """
        check_columns(frame, declared, place.table, needs_table=False)
        return cls(side, list(declared), [_kind(one).fit(one, frame[one.column], place) for one in declared])

    def encode_rows(self, frame: pl.DataFrame, place: ErrorLocation) -> Encoded:
        """Encode the rows of a frame; an absent column counts as missing in every row.

        Raises:
            InputError: a value has the wrong type.
        """
        absent = [name for name in self.columns if name not in frame.columns]
        if absent:
            frame = frame.with_columns(pl.Series(name, [None] * len(frame), dtype=pl.Null) for name in absent)
        return self._encode(frame, place)

    def encode_table(self, table: pl.DataFrame | None, ids: pl.Series) -> Encoded:
        """Encode a whole table with one row per id.

        Raises:
            InputError: see `fit`.
        """
        frame = with_files(pl.DataFrame({"": ids}) if table is None else table, self.declared, ids)
        return self._encode(frame, _place(self.side, ids))

    def encode(self, rows: RowsLike) -> Encoded:
        """Encode new rows, with unseen ids or without ids.

        Args:
            rows: a data frame (polars, pandas, Arrow) or a list of dicts with the declared columns; additional
                columns are ignored. None, NaN and blank text count as missing.

        Returns:
            One array per feature, in the form of its encoder.

        Raises:
            InputError: a declared column is missing, or a value has the wrong type; the message names column and row.
        """
        name = f"{self.side} features"
        frame = frame_of(rows, self.columns, name)
        check_columns(frame, self.declared, name, needs_table=False)
        return self._encode(frame, ErrorLocation(name))

    def _encode(self, frame: pl.DataFrame, place: ErrorLocation) -> Encoded:
        pairs = zip(self.declared, self.encoders, strict=True)
        return [encoder.encode(frame[one.column], place) for one, encoder in pairs]

    def missing(self) -> Encoded:
        """Encode one row in which every feature is missing."""
        return self._encode(
            pl.DataFrame({name: pl.Series([None], dtype=pl.Null) for name in self.columns}), ErrorLocation("")
        )

    @property
    def columns(self) -> list[str]:
        """The distinct required columns."""
        return list(dict.fromkeys(one.column for one in self.declared))

    def __str__(self) -> str:
        """Format one line per feature with the summary of the fit."""
        pairs = list(zip(self.declared, self.encoders, strict=True))
        width = max(len(one.column) for one in self.declared)
        return "\n".join(f"{self.side} feature  {one.column:{width}s}  {one.kind}  {it.note}" for one, it in pairs)

    def to_json(self) -> str:
        """Serialise the declarations and the fitted state, for `from_json`."""
        pairs = zip(self.declared, self.encoders, strict=True)
        features = [{"declared": one.model_dump(mode="json"), "state": encoder.state()} for one, encoder in pairs]
        widths = {} if self.widths is None else {"widths": self.widths}
        return json.dumps({"side": self.side, "features": features, **widths}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> FeatureSet:
        """Restore a fitted set from the result of `to_json`.

        Raises:
            ValueError: the text was not written by `to_json`.
        """
        try:
            read = json.loads(text)
            declared = [_DECLARED.validate_python(entry["declared"]) for entry in read["features"]]
            states = [entry["state"] for entry in read["features"]]
            encoders = [_kind(one).restore(one, state) for one, state in zip(declared, states, strict=True)]
            widths = read.get("widths")  # absent in files of older versions, which derived widths from the values
            return cls(str(read["side"]), declared, encoders, widths)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not fitted features: {error}") from error


@dataclass(frozen=True)
class EncodedTable:
    """The encoded features of all ids of one side, saved with a model so that the feature table is no longer needed.

    Attributes:
        features: the fitted encoders.
        arrays: one array per feature, in which row i belongs to code i.
    """

    features: FeatureSet
    arrays: Encoded

    @classmethod
    def fit(
        cls,
        side: str,
        declared: Sequence[AnyFeature],
        table: pl.DataFrame | None,
        *,
        ids: pl.Series,
        known: NDArray[np.bool_] | None = None,
    ) -> EncodedTable:
        """Fit on the training rows and encode all rows; see `FeatureSet.fit`."""
        features = FeatureSet.fit(side, declared, table, ids=ids, known=known)
        return cls(features, features.encode_table(table, ids))

    @classmethod
    def of_requests(cls, features: FeatureSet) -> EncodedTable:
        """Create a table without rows, for features of requests instead of ids."""
        return cls(features, [array[:0] for array in features.missing()])

    def write(self, folder: Path) -> None:
        """Write two files, `{side}_features.json` and `{side}_features.safetensors`."""
        name = f"{self.features.side}_features"
        (folder / f"{name}.json").write_text(self.features.to_json(), encoding="utf-8")
        arrays = {str(place): np.ascontiguousarray(array) for place, array in enumerate(self.arrays)}
        save_file(arrays, folder / f"{name}.safetensors")

    @classmethod
    def read(cls, folder: Path, side: str) -> EncodedTable | None:
        """Read the files written by `write`; return None if this side has no features.

        Raises:
            ValueError: a file is damaged.
        """
        path = folder / f"{side}_features.json"
        if not path.is_file():
            return None
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.name}: {path.stat().st_size:,} bytes, expected at most {MOST_JSON:,}")
        features = FeatureSet.from_json(path.read_text(encoding="utf-8"))
        values = path.with_suffix(".safetensors")
        sizes = [encoder.size for encoder in features.encoders]
        for name, one in stored_shapes(values)[0].items():  # a bag contains each value at most once
            if not name.isdecimal() or int(name) >= len(sizes) or one.shape[1:] > (sizes[int(name)],):
                raise ValueError(f"{values.name}: {name} has shape {list(one.shape)}")
        arrays = load_file(values)
        found = [arrays[str(place)] for place in range(len(features.declared))]
        for encoder, array in zip(features.encoders, found, strict=True):
            _require_form(encoder, array, path.name)
        return cls(features, found)


def _require_form(encoder: FeatureEncoder, array: NDArray[Any], where: str) -> None:
    """Check that a stored array has the form of its encoder.

    Raises:
        ValueError: the shape or the type differs, or a code has no row in the encoder's table.
    """
    dimensions = 1 if encoder.form == "codes" else 2
    types = {"numbers": np.float32, "tokens": np.int32}
    if array.ndim != dimensions or array.dtype != types.get(encoder.form, np.int64):
        raise ValueError(f"{where}: {encoder.form} of type {array.dtype} {list(array.shape)}")
    if encoder.form == "numbers":
        if array.shape[1] != encoder.size:
            raise ValueError(f"{where}: {array.shape[1]:,} numbers in each row, expected {encoder.size:,}")
    elif isinstance(encoder, TokenEncoder) and array.shape[1] > encoder.most:
        raise ValueError(f"{where}: texts of {array.shape[1]:,} tokens, expected at most {encoder.most:,}")
    elif array.size and not 0 <= array.min() <= array.max() < encoder.size:
        raise ValueError(f"{where}: a code has no row in a table of {encoder.size:,} rows")


def _place(side: str, ids: pl.Series) -> ErrorLocation:
    return ErrorLocation(f"{side} table", ids, side)
