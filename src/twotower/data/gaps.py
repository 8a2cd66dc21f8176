"""Time gaps between consecutive items, as a small number of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.columns import Place, as_moments
from twotower.errors import InputError

#: Number of gap codes: 0 for no gap or an unknown one, 1 below 1 s, 2 below 3 s, ... 33 from 136 years on.
GAP_CODES = 34


def gap_codes(offsets: NDArray[np.integer[Any]], times: NDArray[np.integer[Any]]) -> NDArray[np.int8]:
    """Compute the code of the gap before each of the compressed rows, int8 [n].

        code = 1 + min(floor(log2(1 + seconds)), 32),   0 for the first row of each query

    The codes are logarithmic because the order of magnitude of a gap matters: one more minute matters after ten seconds
    but not after ten days (Li, Wang & McAuley 2020 use the intervals themselves, clipped). A negative gap counts as 0
    seconds.

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
    """Compute the gap codes of one history of a request from unix times, dates or ISO text; None: unknown times.

    Raises:
        InputError: not one time per item, or a value that is not a time.
    """
    if times is None:
        return np.zeros(count, dtype=np.int8)
    if len(times) != count:
        raise InputError(f"times: expected one per item of the history, {count}; found {len(times)}.")
    try:
        series = pl.Series("times", list(times))
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise InputError(f"times: values of mixed types ({str(error).splitlines()[0]}).") from None
    moments, _ = as_moments(series, Place("history"))
    if moments.null_count():
        raise InputError("times: expected one per item of the history; some are missing.")
    return gap_codes(np.array([0, count]), moments.to_numpy())
