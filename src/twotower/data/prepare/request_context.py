"""Context columns of the interactions, read on demand, which describe the request, such as device or hour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.io.feature_tables import typed
from twotower.data.io.layout import read_table
from twotower.data.prepare.chunks import EncodedChunks
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import Vocabulary, listed
from twotower.errors import InputError

CONTEXT_FILE = "context.parquet"

#: Names of the columns to read, or "all" for every column without a role.
ContextColumns = Sequence[str] | Literal["all"] | None


def context_columns(
    requested: ContextColumns, columns: ColumnRoles, found: Sequence[str], where: str, *, lists: bool
) -> list[str]:
    """Resolve the distinct context columns to read.

    Args:
        requested: the columns requested by the caller.
        columns: the roles.
        found: the columns of the file.
        where: name of the file in messages.
        lists: whether a row has a list of items. If so, "all" selects no columns, because the columns without a role
            describe the query.

    Raises:
        InputError: a column does not exist, or contains the query id or item id.
    """
    if requested is None:
        return []
    if requested == "all":
        taken = set(columns.roles().values()) - {columns.timestamp}
        return [] if lists else [name for name in found if name not in taken]
    if isinstance(requested, str):
        raise InputError(f"context: expected a list of columns, or 'all'; found {requested!r}.")
    for name in requested:
        if name not in found:
            raise InputError(f"{where}: context column {name!r} does not exist. Columns found: {listed(found)}.")
        if name in (columns.query, columns.item):
            raise InputError(
                f"{where}: context column {name!r} is the query id or the item id, which would leak the target; "
                "leave it out."
            )
    return list(dict.fromkeys(requested))


def gathered(
    collected: EncodedChunks,
    names: Sequence[str],
    arrival: NDArray[np.int64] | None,
    *,
    timestamp: str | None,
    times: NDArray[np.int64] | None,
    text: bool,
) -> pl.DataFrame | None:
    """Gather the context columns of all rows in memory, in the order of the sorted rows.

    Args:
        collected: the result of the first pass.
        names: the context columns, in order.
        arrival: int64 [n], the input row of each sorted row; None if the timestamp is the only context column.
        timestamp: the timestamp column; its values are taken from `times`, which is already parsed and checked.
        times: int64 [n] microseconds.
        text: whether the types of text values are to be inferred from the content.
    """
    if not names:
        return None
    found: dict[str, pl.Series] = {}
    if arrival is not None:
        frame = collected.context()
        if text:
            frame = frame.with_columns(typed(frame[name]) for name in frame.columns if frame.schema[name] == pl.String)
        found |= {column.name: column.gather(arrival) for column in frame.get_columns()}
    if timestamp in names and times is not None and timestamp is not None:
        found[timestamp] = pl.Series(timestamp, np.asarray(times)).cast(pl.Datetime("us"))
    return pl.DataFrame([found[name] for name in names])


def read_context(directory: Path, rows: int) -> pl.DataFrame:
    """Read the context of saved interactions into memory.

    Raises:
        InputError: the file is missing or damaged, or has a different length.
    """
    path = directory / CONTEXT_FILE
    frame = read_table(path)
    if len(frame) != rows:
        raise InputError(f"{path}: {len(frame)} rows, expected {rows}; prepare the data again.")
    return frame


def joined_context(parts: Sequence[pl.DataFrame | None], order: NDArray[Any]) -> pl.DataFrame | None:
    """Concatenate the contexts of several data sets and reorder the rows.

    Args:
        parts: the contexts; None for a data set without a context.
        order: the new order of the concatenated rows.

    Returns:
        The columns that are in all data sets; None if a data set has no context, or no column is in all.

    Raises:
        InputError: the types of a column differ between data sets.
    """
    frames = [frame for frame in parts if frame is not None]
    names = [name for name in frames[0].columns if all(name in frame.columns for frame in frames)] if frames else []
    if len(frames) < len(parts) or not names:
        return None
    try:
        return pl.concat([frame.select(names) for frame in frames], how="vertical_relaxed")[order]
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"context: a column does not have the same type in all of the data ({str(error).splitlines()[0]}); "
            "write it as one type"
        ) from None


@dataclass(frozen=True)
class RowQueries:
    """The query id of each row, looked up on demand for error messages.

    Attributes:
        offsets: int64 [Q+1], the offsets of the rows of each query.
        queries: the query vocabulary.
    """

    offsets: NDArray[np.int64]
    queries: Vocabulary

    def __getitem__(self, row: int) -> Any:
        code = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.queries.ids[code]
