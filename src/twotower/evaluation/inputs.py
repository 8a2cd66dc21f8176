"""What an evaluation needs to know of its data and its rankers, and no more.

`twotower.data.Holdout` and `twotower.data.Interactions` satisfy these; so does anything with the same attributes.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Codes = NDArray[np.int64] | NDArray[np.int32]


class HoldoutLike(Protocol):
    """Queries with their history and their targets, in compressed rows."""

    @property
    def name(self) -> str:
        """What the holdout is called in a report."""

    @property
    def queries(self) -> NDArray[np.int64]:
        """[E] query codes."""

    @property
    def history_offsets(self) -> NDArray[np.int64]:
        """[E+1] where each query's history starts."""

    @property
    def history_items(self) -> Codes:
        """Item codes, oldest first."""

    @property
    def target_offsets(self) -> NDArray[np.int64]:
        """[E+1] where each query's targets start."""

    @property
    def target_items(self) -> Codes:
        """Item codes to be found."""


class TrainLike(Protocol):
    """The training interactions, in compressed rows by query."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[Q+1] where each query's interactions start."""

    @property
    def item_codes(self) -> Codes:
        """[n] the item of each interaction."""

    @property
    def num_items(self) -> int:
        """N, the size of the catalog."""

    def item_counts(self) -> NDArray[np.int64]:
        """[N] interactions of each item."""


class Ranker(Protocol):
    """A model or a baseline, as evaluation sees it: it ranks, and its scores stay its own.

    A ranker that searches an approximate index says so with an attribute `is_exact = False`; evaluation refuses it
    unless asked.
    """

    def rank(self, holdout: HoldoutLike, k: int, exclude_seen: bool, /) -> "Tensor | NDArray[np.int64]":
        """The k best items of each query of `holdout`.

        Args:
            holdout: E queries.
            k: how many items, at least 1.
            exclude_seen: leave out what stands in the query's history.

        Returns:
            [E, k] int64 item codes, best first, distinct within a row; -1 at the end where fewer than k are left.
        """
