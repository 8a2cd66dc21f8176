"""Items that are to join, change or leave: what a caller says of them, checked and turned into codes and rows."""

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
    """Items that join or change.

    Attributes:
        ids: theirs.
        codes: int64 [n], the codes they have; -1 for an id that was never there.
        embeddings: float32 [n, D].
        rows: their rows in the item table, or None.
    """

    ids: pl.Series
    codes: Codes
    embeddings: Tensor
    rows: pl.DataFrame | None

    @classmethod
    def of(cls, artifact: Artifact, alive: Mask, items: Any, embeddings: Any, *, join: bool) -> Edit:
        """From a frame or rows.

        Args:
            artifact: the model now.
            alive: bool [N], the items in the catalog now.
            items: a data frame or a list of dicts: ids, and columns of the item table.
            embeddings: [n, D], or None: the column `embedding`, or the item tower by the items' features.
            join: whether they join; otherwise they change.

        Raises:
            InputError: no ids, one that repeats, is there already or is not there; a value that does not fit its
                column; embeddings that are missing or of a wrong shape.
        """
        what = "items that join" if join else "items that change"
        frame = _framed(items, what)
        column = _id_column(frame, what)
        ids = ids_like(ids_of(frame[column], what), artifact.items, f"{what}: column {column!r}")
        if ids.null_count() or ids.n_unique() < len(ids):
            raise InputError(f"{what}: column {column!r}: expected every id once, found a null or a repeated one")
        codes = artifact.items.encode(ids)
        there = (codes >= 0) & alive[np.maximum(codes, 0)]
        if bool((there if join else ~there).any()):
            wrong = ids[int(np.flatnonzero(there if join else ~there)[0])]
            raise InputError(
                f"{what}: {wrong!r} is in the catalog already; update it instead"
                if join
                else f"{what}: {wrong!r} is not in the catalog; add it instead"
            )
        if embeddings is None and EMBEDDING in frame.columns:
            embeddings = frame[EMBEDDING].to_list()
        rows = None if artifact.item_table is None else _rows(artifact.item_table, frame, codes, ids, what)
        said = frame if rows is None else _overlaid(frame, rows)
        return cls(ids, codes, new_embeddings(artifact, codes, said, embeddings, what), rows)


def leaving(artifact: Artifact, alive: Mask, ids: Sequence[Any]) -> Codes:
    """Codes of items that are to leave, each once.

    Raises:
        InputError: one is not in the catalog.
    """
    if isinstance(ids, str) or not len(ids):
        raise InputError(f"items that leave: expected a list of item ids, found {ids!r}")
    codes = artifact.items.encode(list(ids))
    gone = (codes < 0) | ~alive[np.maximum(codes, 0)]
    if bool(gone.any()):
        raise InputError(f"items that leave: {list(ids)[int(np.flatnonzero(gone)[0])]!r} is not in the catalog")
    return np.unique(codes)


def _framed(items: Any, what: str) -> pl.DataFrame:
    if isinstance(items, Sequence) and not isinstance(items, str) and all(isinstance(row, Mapping) for row in items):
        try:
            items = pl.DataFrame(list(items), infer_schema_length=None)
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{what}: rows that do not fit together ({str(error).splitlines()[0]})") from None
    frame = as_polars(items, what)
    if not len(frame):
        raise InputError(f"{what}: expected at least one, found none")
    return frame


def _id_column(frame: pl.DataFrame, what: str) -> str:
    column = usual_column(frame.columns, (("id",), *USUAL_NAMES["item"]), "item", what)
    if column is None:
        raise InputError(f"{what}: expected a column of item ids (item_id, item, id), found {', '.join(frame.columns)}")
    return column


def _rows(table: pl.DataFrame, frame: pl.DataFrame, codes: Codes, ids: pl.Series, what: str) -> pl.DataFrame:
    """Rows of the item table: what the frame says, what the table has, null."""
    # Row 0 stands in for items that were never there; their columns start empty.
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
    """What is said of the items, completed by what the item table holds of them."""
    return frame.with_columns(rows[name] for name in rows.columns)
