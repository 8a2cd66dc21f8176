"""Time between an item and the one before it, as a small number of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.columns import Place, as_moments
from twotower.errors import InputError

#: Codes of gaps: 0 where there is none or nobody knows it, 1 below a second, 2 below 3 s, ... 33 from 136 years on.
GAP_CODES = 34


def gap_codes(offsets: NDArray[np.integer[Any]], times: NDArray[np.integer[Any]]) -> NDArray[np.int8]:
    """The code of the gap before each row of compressed rows, int8 [n].

        code = 1 + min(floor(log2(1 + seconds)), 32),   0 for the first row of each query

    Doublings, for what a gap says changes with its order of magnitude: a minute more matters after ten seconds and
    not after ten days (Li, Wang & McAuley 2020 read intervals as they are, clipped). A time that goes back counts as
    no time.

    Args:
        offsets: int64 [Q+1], rows of each query.
        times: int64 [n], microseconds, oldest first within a query.
    """
    times = np.asarray(times, dtype=np.int64)
    codes = np.zeros(len(times), dtype=np.int8)
    if len(times) > 1:
        seconds = np.maximum(np.diff(times), 0) / 1e6
        codes[1:] = 1 + np.minimum(np.floor(np.log2(1 + seconds)), GAP_CODES - 2)
    first = np.asarray(offsets)[:-1]
    codes[first[first < len(times)]] = 0
    return codes


def given_gaps(times: Sequence[Any] | None, count: int) -> NDArray[np.int8]:
    """Codes of the gaps in one history that somebody gives: unix time, dates or ISO text; None: nobody knows them.

    Raises:
        InputError: not one time for each item, or something that is no time.
    """
    if times is None:
        return np.zeros(count, dtype=np.int8)
    if len(times) != count:
        raise InputError(f"times: expected one for each item of the history, {count}; found {len(times)}.")
    try:
        series = pl.Series("times", list(times))
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise InputError(f"times: values of mixed types ({str(error).splitlines()[0]}).") from None
    moments, _ = as_moments(series, Place("history"))
    if moments.null_count():
        raise InputError("times: expected a time for each item of the history, found none for some.")
    return gap_codes(np.array([0, count]), moments.to_numpy())
