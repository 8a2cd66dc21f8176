"""The known positives of queries, looked up for a whole batch at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.data.histories import take_ranges
from twotower.data.interactions import Interactions


class KnownPositives:
    """All training items of each query, as (row, item) pairs for a batch, without a loop over rows.

    Args:
        interactions: the training interactions.
    """

    def __init__(self, interactions: Interactions) -> None:
        self.offsets, self.item_codes = interactions.offsets, interactions.item_codes

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the known positives of each row's query.

        Args:
            queries: codes, int64 [B]; -1 for a query without known positives.

        Returns:
            (row [P], item [P]), int64, on the device of `queries`.
        """
        codes = queries.cpu().numpy()
        known = codes >= 0
        starts = np.where(known, self.offsets[codes], 0)
        ends = np.where(known, self.offsets[codes + 1], 0)
        place, offsets = take_ranges(starts, ends)
        row = np.repeat(np.arange(len(codes)), np.diff(offsets))
        items = np.asarray(self.item_codes)[place].astype(np.int64)
        return torch.from_numpy(row).to(queries.device), torch.from_numpy(items).to(queries.device)
