"""Columns of the interactions that describe the request, such as device or hour: read on demand, one row for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.collecting import Collected
from twotower.data.features import typed
from twotower.data.storing import read_table
from twotower.errors import InputError
from twotower.schema import Columns, Vocabulary, listed

CONTEXT_FILE = "context.parquet"

#: Names of the columns to read, or "all" that have no other role.
Wanted = Sequence[str] | Literal["all"] | None


def context_columns(wanted: Wanted, columns: Columns, found: Sequence[str], where: str, *, lists: bool) -> list[str]:
    """The columns to read besides those with a role, each once.

    Args:
        wanted: what was asked for.
        columns: the roles.
        found: the columns of the file.
        where: the file, for messages.
        lists: whether a row has a list of items; then "all" is none: what stands beside a list describes the query.

    Raises:
        InputError: a column is not there, or is the query's or the item's id.
    """
    if wanted is None:
        return []
    if wanted == "all":
        taken = set(columns.roles().values()) - {columns.timestamp}
        return [] if lists else [name for name in found if name not in taken]
    if isinstance(wanted, str):
        raise InputError(f"context: expected a list of columns, or 'all'; found {wanted!r}.")
    for name in wanted:
        if name not in found:
            raise InputError(f"{where}: context column {name!r} is not there. Columns found: {listed(found)}.")
        if name in (columns.query, columns.item):
            raise InputError(f"{where}: context column {name!r} is the query's or the item's id; it tells the answer.")
    return list(dict.fromkeys(wanted))


def gathered(
    collected: Collected,
    names: Sequence[str],
    arrival: NDArray[np.int64] | None,
    *,
    timestamp: str | None,
    times: NDArray[np.int64] | None,
    text: bool,
) -> pl.DataFrame | None:
    """The context in the order of the sorted rows. The columns of all rows are held in memory for this.

    Args:
        collected: the first pass.
        names: of the columns, in order.
        arrival: int64 [n], which row of the input each sorted row was; None where only the timestamp is asked for.
        timestamp: the column that is the time, taken from `times`: it is read and checked already.
        times: int64 [n] microseconds.
        text: whether values are text whose type is found from its content.
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
    """The context that lies beside saved interactions, in memory.

    Raises:
        InputError: missing, damaged, or of another length.
    """
    path = directory / CONTEXT_FILE
    frame = read_table(path)
    if len(frame) != rows:
        raise InputError(f"{path}: {len(frame)} rows, expected {rows}; prepare again.")
    return frame


def joined_context(parts: Sequence[pl.DataFrame | None], order: NDArray[Any]) -> pl.DataFrame | None:
    """Context of several data sets one after the other, in another order; None where one of them has none.

    Columns are those that all of them have.

    Raises:
        InputError: a column is of another kind in one of them.
    """
    frames = [frame for frame in parts if frame is not None]
    names = [name for name in frames[0].columns if all(name in frame.columns for frame in frames)] if frames else []
    if len(frames) < len(parts) or not names:
        return None
    try:
        return pl.concat([frame.select(names) for frame in frames], how="vertical_relaxed")[order]
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"context: a column is of another kind in the new data ({str(error).splitlines()[0]}); write it as one type"
        ) from None


@dataclass(frozen=True)
class Owners:
    """The query id of a row, found when it is asked for: what an error calls a row of the interactions.

    Attributes:
        offsets: int64 [Q+1], rows of each query.
        queries: their ids.
    """

    offsets: NDArray[np.int64]
    queries: Vocabulary

    def __getitem__(self, row: int) -> Any:
        code = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.queries.ids[code]
