"""Reading of the rows stored in a model folder for continued training."""

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
from twotower.data.loading.histories import take_ranges
from twotower.errors import InputError
from twotower.serving.model_folder import ROWS, find_model, read_metadata
from twotower.system.parquet import read_parquet


def load_rows(folder: Path) -> dict[str, np.ndarray] | None:
    """Read the `rows` of a model folder; return None if an older version wrote the folder.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / ROWS
    if not path.is_file():
        return None
    try:
        return dict(load_arrays(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable ({error}); copy it again or train again") from error


def load_context(folder: Path, name: str = "context") -> pl.DataFrame | None:
    """Read one of the `contexts` of a model folder; return None if the folder has no such context.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / f"{name}.parquet"
    if not path.is_file():
        return None
    try:
        return read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: not readable ({error}); copy it again or train again") from error


def has_validation(rows: Mapping[str, NDArray[Any]]) -> bool:
    """Return whether the rows of a continued model include the validation rows, which older versions did not save."""
    return "validation.queries" in rows


def lost_validation(directory: str | Path) -> bool:
    """Return whether a model, or the model of a run folder, is a continued model without saved validation rows.

    Raises:
        InputError: the folder contains no model, or a damaged one.
    """
    folder = find_model(directory)
    continued = len(read_metadata(folder)["data"].get("lineage", [])) > 1
    return continued and not has_validation(load_rows(folder) or {})


def holdout_of(
    name: str, rows: Mapping[str, NDArray[Any]], data: Interactions, context: pl.DataFrame | None
) -> Holdout:
    """Rebuild a holdout of a continued model from its folder.

    Args:
        name: "test" or "validation".
        rows: the stored rows with `NAME.queries`, `.history` (the number of earlier rows of each query), `.offsets`,
            `.items` and, if rows have timestamps or groups, `.times` and `.groups`.
        data: all rows of the model.
        context: the context of each query, or None.
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
        rows.get(f"{name}.groups"),
        data.eligibility,
        history_events=data.event_types(history),
    )
