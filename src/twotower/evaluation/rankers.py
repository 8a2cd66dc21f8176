"""What evaluation asks of a model."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Holdout


class Ranker(Protocol):
    """A model or a baseline, as evaluation sees it: it ranks, and its scores stay its own.

    A ranker that searches an approximate index says so with an attribute `is_exact = False`; evaluation refuses it
    unless asked. One that places items in a space may have an attribute `item_embeddings`, [N, D]: the diversity of its
    lists is measured there. So may one that holds them by parts, with a method `embeddings_of(items [n]) -> [n, D]`.
    """

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool, /) -> "Tensor | NDArray[np.int64]":
        """The k best items of each query of `holdout`.

        Args:
            holdout: E queries.
            k: how many items, at least 1.
            exclude_seen: leave out what stands in the query's history.

        Returns:
            [E, k] int64 item codes, best first, distinct within a row; -1 at the end where fewer than k are left.
        """
