"""Codes for the time gaps between consecutive items."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Number of gap codes: 0 for an absent or unknown gap, 1 below 1 s, 2 below 3 s, ..., 33 for 136 years or more.
GAP_CODES = 34


def gap_codes(offsets: NDArray[np.integer[Any]], times: NDArray[np.integer[Any]]) -> NDArray[np.int8]:
    """Compute the code of the gap before each row, int8 [n].

        code = 1 + min(floor(log2(1 + seconds)), 32),   0 for the first row of each query

    The codes are logarithmic because the order of magnitude of a gap matters: an additional minute matters after ten
    seconds but not after ten days (Li, Wang & McAuley 2020 use the clipped intervals themselves). A negative gap counts
    as 0 seconds.

    Args:
        offsets: int64 [Q+1], the offsets of the rows of each query.
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
