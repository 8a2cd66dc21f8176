"""The interface that evaluation requires of a model."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Holdout


class Ranker(Protocol):
    """A model or a baseline as seen by evaluation: it returns rankings, not scores.

    A ranker that searches an approximate index sets an attribute `is_exact = False`; evaluation rejects it unless
    approximate rankers are allowed. The diversity of its lists is measured from an optional attribute
    `item_embeddings`, [N, D], or, if embeddings are sharded, an optional method `embeddings_of(items [n]) -> [n, D]`.
    """

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool, /) -> "Tensor | NDArray[np.int64]":
        """Return the k best items of each query of `holdout`.

        Args:
            holdout: E queries.
            k: number of items, at least 1.
            exclude_seen: exclude items of the query's history.

        Only items that `holdout.eligible` allows may be returned, if the data has a rule (`Interactions.eligibility`).

        Returns:
            [E, k] int64 item codes, best first, distinct within a row; -1 at the end if fewer than k are left.
        """
