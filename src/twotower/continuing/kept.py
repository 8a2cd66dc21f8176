"""What a model folder keeps of its rows, read back: nobody who only answers needs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays

from twotower.errors import InputError
from twotower.serving.artifact import ROWS


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
