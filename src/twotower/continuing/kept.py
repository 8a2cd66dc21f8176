"""What a model folder keeps of its rows, read back: nobody who only answers needs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays

from twotower.data import Holdout, Interactions
from twotower.data.histories import take_ranges
from twotower.errors import InputError
from twotower.serving.artifact import ROWS, find_model, read_metadata


def load_rows(folder: Path) -> dict[str, np.ndarray] | None:
    """`rows` of a model folder; None where an older version wrote it.

    Raises:
        InputError: damaged.
    """
    path = folder / ROWS
    if not path.is_file():
        return None
    try:
        return dict(load_arrays(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable ({error}); copy it again or train again") from error


def load_context(folder: Path, name: str = "context") -> pl.DataFrame | None:
    """One of the `contexts` of a model folder; None where it has none.

    Raises:
        InputError: damaged.
    """
    path = folder / f"{name}.parquet"
    if not path.is_file():
        return None
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: not readable ({error}); copy it again or train again") from error


def has_validation(rows: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the rows of a continued model tell its validation; those that an older version wrote do not."""
    return "validation.queries" in rows


def lost_validation(directory: str | Path) -> bool:
    """Whether a model, or the run folder around it, went on with another without keeping its validation.

    Raises:
        InputError: no model is there, or it is damaged.
    """
    folder = find_model(directory)
    continued = len(read_metadata(folder)["data"].get("lineage", [])) > 1
    return continued and not has_validation(load_rows(folder) or {})


def holdout_of(
    name: str, rows: Mapping[str, NDArray[Any]], data: Interactions, context: pl.DataFrame | None
) -> Holdout:
    """A holdout of a continued model, from what its folder keeps of it.

    Args:
        name: "test" or "validation".
        rows: with `NAME.queries`, `.history` (how many rows of each of them, from the first, came before), `.offsets`,
            `.items` and, where rows have a time, `.times`.
        data: all rows of the model.
        context: of each question.
    """
    starts = data.offsets[rows[f"{name}.queries"]]
    history, offsets = take_ranges(starts, starts + rows[f"{name}.history"])
    return Holdout(
        name,
        np.asarray(rows[f"{name}.queries"]),
        offsets,
        np.asarray(data.item_codes[history]),
        np.asarray(rows[f"{name}.offsets"]),
        np.asarray(rows[f"{name}.items"]),
        None if data.timestamps is None else np.asarray(data.timestamps[history]),
        rows.get(f"{name}.times"),
        context,
    )
