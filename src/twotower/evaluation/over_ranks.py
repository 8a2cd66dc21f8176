"""A ranker that divides the queries over ranks and returns the whole ranking on all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Holdout
from twotower.evaluation.rankers import Ranker
from twotower.ranks import Ranks
from twotower.towers import TwoTower


class OverRanks:
    """A ranker that divides a holdout over ranks; every rank gets the same ranking as a single process.

    Args:
        ranker: the same on every rank.
        ranks: the processes; all of them call `rank`, with the same holdout.
    """

    def __init__(self, ranker: Ranker, ranks: Ranks) -> None:
        self.ranker, self.ranks = ranker, ranks

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the best items of every query, int64 [E, k]."""
        own = part_of(holdout, self.ranks.part(len(holdout)))
        ranked = (
            torch.as_tensor(self.ranker.rank(own, k, exclude_seen)).cpu()
            if len(own)
            else torch.empty(0, k, dtype=torch.int64)
        )
        device = self.ranks.device
        every = self.ranks.gather(ranked.to(device), self.ranks.shares(len(holdout)))
        return every.cpu().numpy()

    def __getattr__(self, name: str) -> Any:
        # Other attributes that evaluation reads from a ranker: whether it is exact, its embeddings.
        return getattr(self.ranker, name)


def over_ranks(ranker: Ranker, ranks: Ranks) -> Ranker:
    """Wrap a ranker to divide its work over ranks, if there are several."""
    return ranker if ranks.size == 1 else OverRanks(ranker, ranks)


def part_of(holdout: Holdout, rows: slice) -> Holdout:
    """Return the queries `rows.start` to `rows.stop` of a holdout."""
    begin, end = rows.start, rows.stop
    history, targets = holdout.history_offsets[begin : end + 1], holdout.target_offsets[begin : end + 1]
    inside = slice(history[0], history[-1])
    return replace(
        holdout,
        queries=holdout.queries[rows],
        history_offsets=history - history[0],
        history_items=holdout.history_items[inside],
        target_offsets=targets - targets[0],
        target_items=holdout.target_items[targets[0] : targets[-1]],
        history_timestamps=None if holdout.history_timestamps is None else holdout.history_timestamps[inside],
        query_times=None if holdout.query_times is None else holdout.query_times[rows],
        context=None if holdout.context is None else holdout.context[rows],
    )


@torch.no_grad()
def item_embeddings(towers: TwoTower, ranks: Ranks) -> Tensor:
    """Compute all item embeddings, [N, D], as `TwoTower.item_embeddings` does; each rank embeds its part."""
    if ranks.size == 1:
        return towers.item_embeddings()
    was_training = towers.training
    towers.eval()
    shares = ranks.shares(towers.item_tower.num_items)
    own = ranks.within(shares)
    codes = torch.arange(own.start, own.stop, device=towers.log_temperature.device)
    parts = [towers.embed_items(part).float() for part in torch.split(codes, 65_536)]
    towers.train(was_training)
    return ranks.gather(torch.cat(parts), shares)
