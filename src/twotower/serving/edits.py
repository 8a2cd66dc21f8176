"""Validation of catalog edits: items to add, change or remove, checked and turned into codes and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from twotower.data.reading import as_polars
from twotower.data.written import ids_like
from twotower.errors import InputError
from twotower.schema import USUAL_NAMES, ids_of, usual_column
from twotower.serving.artifact import Artifact
from twotower.serving.changes import Codes, Mask, new_embeddings

#: A column with embeddings, in a frame or file.
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Edit:
    """Checked items to add or change.

    Attributes:
        ids: ids of the items.
        codes: int64 [n], their codes; -1 for an id that is new to the vocabulary.
        embeddings: float32 [n, D].
        rows: their rows in the item table, or None if there is no table.
    """

    ids: pl.Series
    codes: Codes
    embeddings: Tensor
    rows: pl.DataFrame | None

    @classmethod
    def of(cls, artifact: Artifact, alive: Mask, items: Any, embeddings: Any, *, join: bool) -> Edit:
        """Check items given as a frame or as rows.

        Args:
            artifact: the model in its current state.
            alive: bool [N], the items in the catalog now.
            items: a data frame or a list of dicts with ids and columns of the item table.
            embeddings: [n, D]; None to take the column `embedding`, or else the item tower with the items' features.
            join: True to add items, False to change existing ones.

        Raises:
            InputError: there are no ids; an id repeats, exists already (add) or does not exist (change); a value does
                not fit its column; embeddings are missing or of a wrong shape.
        """
        what = "items to add" if join else "items to change"
        frame = _framed(items, what)
        column = _id_column(frame, what)
        ids = ids_like(ids_of(frame[column], what), artifact.items, f"{what}: column {column!r}")
        if ids.null_count() or ids.n_unique() < len(ids):
            raise InputError(f"{what}: column {column!r}: expected every id once, found a null or repeated id")
        codes = artifact.items.encode(ids)
        exists = (codes >= 0) & alive[np.maximum(codes, 0)]
        if bool((exists if join else ~exists).any()):
            wrong = ids[int(np.flatnonzero(exists if join else ~exists)[0])]
            raise InputError(
                f"{what}: {wrong!r} is in the catalog already; update it instead"
                if join
                else f"{what}: {wrong!r} is not in the catalog; add it instead"
            )
        if embeddings is None and EMBEDDING in frame.columns:
            embeddings = frame[EMBEDDING].to_list()
        rows = None if artifact.item_table is None else _rows(artifact.item_table, frame, codes, ids, what)
        completed = frame if rows is None else _overlaid(frame, rows)
        return cls(ids, codes, new_embeddings(artifact, codes, completed, embeddings, what), rows)


def leaving(artifact: Artifact, alive: Mask, ids: Sequence[Any]) -> Codes:
    """Return the codes of items to remove, each once.

    Raises:
        InputError: an id is not in the catalog.
    """
    if isinstance(ids, str) or not len(ids):
        raise InputError(f"items to remove: expected a list of item ids, found {ids!r}")
    codes = artifact.items.encode(list(ids))
    gone = (codes < 0) | ~alive[np.maximum(codes, 0)]
    if bool(gone.any()):
        raise InputError(f"items to remove: {list(ids)[int(np.flatnonzero(gone)[0])]!r} is not in the catalog")
    return np.unique(codes)


def _framed(items: Any, what: str) -> pl.DataFrame:
    if isinstance(items, Sequence) and not isinstance(items, str) and all(isinstance(row, Mapping) for row in items):
        try:
            items = pl.DataFrame(list(items), infer_schema_length=None)
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{what}: rows do not fit together ({str(error).splitlines()[0]})") from None
    frame = as_polars(items, what)
    if not len(frame):
        raise InputError(f"{what}: expected at least one item, found none")
    return frame


def _id_column(frame: pl.DataFrame, what: str) -> str:
    column = usual_column(frame.columns, (("id",), *USUAL_NAMES["item"]), "item", what)
    if column is None:
        raise InputError(f"{what}: expected a column of item ids (item_id, item, id), found {', '.join(frame.columns)}")
    return column


def _rows(table: pl.DataFrame, frame: pl.DataFrame, codes: Codes, ids: pl.Series, what: str) -> pl.DataFrame:
    """Build rows of the item table: values of the frame, else of the table, else null."""
    # New items read row 0 as a placeholder; `known` then replaces its values with null.
    known = pl.Series(codes >= 0)
    held = table.select(pl.all().gather(np.where(codes >= 0, codes, 0)))
    columns = []
    for name, dtype in table.schema.items():
        before = held.select(pl.when(known).then(pl.col(name)).alias(name)).to_series()
        if name in frame.columns:
            try:
                columns.append(frame[name].cast(dtype, strict=True).alias(name))
            except pl.exceptions.PolarsError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"{what}: column {name!r}: expected {dtype} ({reason})") from None
        elif usual_column([name], USUAL_NAMES["item"], "item", what) and dtype == ids.dtype:
            columns.append(ids.alias(name))
        else:
            columns.append(before)
    return pl.DataFrame(columns)


def _overlaid(frame: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Complete the frame with the columns of the item table."""
    return frame.with_columns(rows[name] for name in rows.columns)
