"""Codes for the event types of rows and of history items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray


def event_codes(types: pl.Series | None, names: Sequence[str]) -> NDArray[np.int8] | None:
    """Return the position of each type in `names`, int8 [n], -1 for other types and nulls; None without types."""
    if types is None:
        return None
    places = dict(zip(names, range(len(names)), strict=True))
    found: NDArray[np.int8] = (
        types.cast(pl.String).replace_strict(places, default=-1, return_dtype=pl.Int8).fill_null(-1).to_numpy()
    )
    return found
