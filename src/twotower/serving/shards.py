"""The exact search of a saved model over several ranks, each of which searches its part of the items."""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Holdout
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.index import ExactIndex
from twotower.index.popularity import checked_popularity
from twotower.ranking.distributed import rank_by_items, rank_by_queries
from twotower.serving.retriever import Retriever


class SharedRetriever:
    """Ranker of holdouts with the same results as `Retriever.rank`, computed together with the other ranks.

    Each rank embeds its part of the queries and searches its part of the items for all queries, so the index of the
    items takes 1/W of the memory on each rank. If the catalog was changed after training, the parts no longer match
    it, and every rank searches all items for its part of the queries.

    Args:
        retriever: the same model on every rank.
        ranks: the processes; all of them call `rank`, with the same holdout.
    """

    def __init__(self, retriever: Retriever, ranks: Communicator) -> None:
        self.retriever, self.ranks = retriever, ranks
        self.part = RowShard(ranks, len(retriever.artifact.item_embeddings))

    @property
    def item_embeddings(self) -> Tensor:
        """v(j) of every trained item, [N, D]."""
        return self.retriever.item_embeddings

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool, *, popularity: float = 1.0) -> NDArray[np.int64]:
        """Rank items for an evaluation, int64 [E, k], on every rank."""
        if not self.retriever.catalog.is_as_trained:
            rank = partial(self.retriever.rank, k=k, exclude_seen=exclude_seen, popularity=popularity)
            return rank_by_queries(rank, holdout, k, self.ranks)
        index = self._index
        if checked_popularity(popularity) != 1.0:  # as in `Search`: a bias of zero could round differently
            index = index.with_bias(((popularity - 1.0) * self.retriever.search.dial.coordinate())[self.part.own])
        return rank_by_items(index, self.part, self.retriever.embed_holdout, holdout, k=k, exclude_seen=exclude_seen)

    @cached_property
    def _index(self) -> ExactIndex:
        own = self.part.own
        return ExactIndex(self.retriever.artifact.item_embeddings[own], first=own.start)


def shared_retriever(retriever: Retriever, ranks: Communicator) -> Retriever | SharedRetriever:
    """Divide the search of a retriever over ranks, if there are several."""
    return retriever if ranks.size == 1 else SharedRetriever(retriever, ranks)
