"""Extension of fitted features to new rows: vocabularies gain new values; everything else stays as fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import AnyFeature, DenseFeature
from twotower.data.interactions import Interactions
from twotower.data.io.feature_tables import described
from twotower.data.schema.vocabulary import Codes, Vocabulary, listed
from twotower.errors import InputError
from twotower.features.categorical import CategoryEncoder, FeatureEncoder, MultiCategory, ValueVocabulary
from twotower.features.feature_set import EncodedTable, FeatureSet
from twotower.features.from_config import context_frame, context_place
from twotower.features.parsing import ErrorLocation


@dataclass(frozen=True)
class GrownFeatures:
    """The features of one side, extended to new rows.

    Attributes:
        table: the encoders and encoded rows, in the order of the new ids.
        value_maps: the new code of each old value code, by feature index; only for features with an embedding table.
    """

    table: EncodedTable
    value_maps: dict[int, Codes]


def extend_encoded_table(
    old: EncodedTable,
    code_map: Codes,
    table: pl.DataFrame | None,
    ids: Vocabulary,
    known: NDArray[np.bool_],
) -> GrownFeatures:
    """Extend fitted features to new rows.

    A vocabulary gains the values that occur often enough (`min_count`) in the training rows of the new table. Means,
    deviations, bins and the reference time stay as fitted, because the following layers were trained with them. Rows
    described by the new table are encoded again; all other rows keep their codes.

    Args:
        old: features of the parent model.
        code_map: int64 [old ids], the new code of each old id; -1 for a withdrawn id.
        table: the new table in the order of `ids`, with nulls for ids without a row; or None.
        ids: the new vocabulary of this side.
        known: bool [ids], the ids with a training row.

    Raises:
        InputError: there are new ids but no table, or a declared column is missing or has the wrong type.
    """
    side, declared = old.features.side, old.features.declared
    stays = np.zeros(len(ids), dtype=np.bool_)
    stays[code_map[code_map >= 0]] = True
    if table is None and bool(stays.all()):
        # There are no new ids: null rows let every id keep its old codes.
        columns = {name: pl.Series([None] * len(ids), dtype=pl.Null) for name in old.features.columns}
        table = pl.DataFrame({"": ids.ids, **columns})
    _check(side, declared, table)
    has_row = described(table, len(ids))
    fitting = np.flatnonzero(has_row & known)
    where = ErrorLocation(f"{side} table", ids.ids.gather(fitting), side)
    features, maps = _extended(old.features, None if table is None or not len(fitting) else table[fitting], where)
    arrays = features.encode_table(table, ids.ids)
    for place, one in enumerate(declared):
        updated = has_row
        if isinstance(one, DenseFeature) and one.file is not None:
            updated = arrays[place][:, -1] == 0  # the last column is 1 where the vector is missing
        keeps = np.flatnonzero(~updated & stays)
        source = np.full(len(ids), -1, dtype=np.int64)
        source[code_map[code_map >= 0]] = np.flatnonzero(code_map >= 0)
        rows = old.arrays[place][source[keeps]]
        if place in maps:
            rows = maps[place][rows]
        arrays[place] = _put(arrays[place], keeps, rows)
    return GrownFeatures(EncodedTable(features, arrays), maps)


def extend_encoded_context(old: FeatureSet, data: Interactions, new: NDArray[np.bool_]) -> GrownFeatures:
    """Extend fitted context features: vocabularies gain the values of the new rows; the rest stays as fitted.

    Args:
        old: features of the parent model.
        data: old and new training rows.
        new: bool [n], marks the new rows.

    Raises:
        InputError: a declared column is missing or has the wrong type.
    """
    fresh = data.select(new)
    frame, place = context_frame(old.declared, fresh), context_place(fresh)
    features, maps = _extended(old, frame, place)
    return GrownFeatures(EncodedTable.of_requests(features), maps)


def _extended(old: FeatureSet, fresh: pl.DataFrame | None, place: ErrorLocation) -> tuple[FeatureSet, dict[int, Codes]]:
    """Add the values of fresh rows to the vocabularies; return the features, and the maps from old to new codes."""
    maps: dict[int, Codes] = {}
    encoders: list[FeatureEncoder] = []
    for number, (one, encoder) in enumerate(zip(old.declared, old.encoders, strict=True)):
        if isinstance(encoder, CategoryEncoder | MultiCategory) and encoder.values.known is not None:
            values = encoder.values
            if fresh is not None and one.column in fresh.columns:
                values = type(encoder).fit(one, fresh[one.column], place).values  # type: ignore[arg-type]
            both, maps[number] = _union(encoder.values, values)
            encoder = replace(encoder, values=both)  # noqa: PLW2901
        elif encoder.form not in ("numbers", "tokens"):
            maps[number] = np.arange(encoder.size)
        encoders.append(encoder)
    return FeatureSet(old.side, old.declared, encoders, old.widths), maps


def _check(side: str, declared: Sequence[AnyFeature], table: pl.DataFrame | None) -> None:
    plural = {"item": "items", "query": "queries"}[side]
    for one in declared:
        if isinstance(one, DenseFeature) and one.file is not None:
            continue
        if table is None:
            raise InputError(
                f"{side}_tower.features: the model's feature {one.column!r} needs the {side} table of the new data; "
                f"set data.{plural}"
            )
        if one.column not in table.columns:
            raise InputError(
                f"{side} table of the new data: column {one.column!r}, a feature of the model, does not exist; columns "
                f"found: {listed(table.columns)}"
            )


def _union(old: ValueVocabulary, new: ValueVocabulary) -> tuple[ValueVocabulary, Codes]:
    """Merge two vocabularies in ascending order; also return the new code of each old code."""
    assert old.known is not None and new.known is not None
    values = ValueVocabulary(Vocabulary(pl.concat([old.known.ids, new.known.ids.alias("id")]).unique().sort()))
    assert values.known is not None
    return values, np.concatenate([[0, 1], 2 + values.known.encode(old.known.ids)]).astype(np.int64)


def _put(array: NDArray[Any], places: Codes, rows: NDArray[Any]) -> NDArray[Any]:
    """Write `rows` to `places`; lists of value codes are padded with 0 to the larger width."""
    if array.ndim == 2 and array.shape[1] < rows.shape[1]:
        array = np.concatenate([array, np.zeros((len(array), rows.shape[1] - array.shape[1]), array.dtype)], axis=1)
    elif array.ndim == 2 and rows.shape[1] < array.shape[1]:
        rows = np.concatenate([rows, np.zeros((len(rows), array.shape[1] - rows.shape[1]), rows.dtype)], axis=1)
    array = array.copy()
    array[places] = rows
    return array
