"""Mined negatives: the best items of each query by the current towers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from twotower.data import Holdout, Interactions
from twotower.evaluation import Ranker
from twotower.evaluation.by_parts import ShardedRanker
from twotower.evaluation.towers import TowerRanker
from twotower.losses import Objective
from twotower.negatives import Mined
from twotower.towers import TwoTower
from twotower.towers.lookups import shared_tables_of

#: Queries mined at once.
MINING_BLOCK = 8192


def miner(
    objective: Objective, train: Interactions, length: int, gaps: np.ndarray | None = None
) -> Callable[[TwoTower], None] | None:
    """Refreshes the mined sources of an objective: the best items of each query, without its training items.

    Ranks that share the tables search together, each its own part of the items; all of them keep all that is found.

    Args:
        objective: what is minimised.
        train: the training interactions.
        length: L of the query tower.
        gaps: codes of the gap before each row, int8 [n], where the tower reads them.
    """
    sources = [source for source in objective.pool.members() if isinstance(source, Mined)]
    if not sources:
        return None

    size = max(source.size for source in sources)

    def mine(towers: TwoTower) -> None:
        ranker = _ranker(towers, length)
        # By the raw score: on corrected logits rare items would look hard.
        for block in np.array_split(np.arange(train.num_queries), -(-train.num_queries // MINING_BLOCK)):
            items = torch.from_numpy(ranker.rank(_asked(train, block, has_times=gaps is not None), size, True))
            for source in sources:
                source.refresh(torch.from_numpy(block).to(source.items.device), items.to(source.items.device))

    return mine


def _ranker(towers: TwoTower, length: int) -> Ranker:
    shared = shared_tables_of(towers)
    if not shared or shared[0].part is None:
        return TowerRanker(towers, length)
    return ShardedRanker(towers, length, shared[0].part.ranks)


def _asked(train: Interactions, queries: np.ndarray, *, has_times: bool) -> Holdout:
    """The training rows of some queries in a row as histories."""
    offsets = train.offsets[queries[0] : queries[-1] + 2]
    inside, none = slice(offsets[0], offsets[-1]), np.zeros(len(offsets), dtype=np.int64)
    times = train.timestamps[inside] if has_times and train.timestamps is not None else None
    history = np.asarray(train.item_codes[inside])
    return Holdout("mining", queries, offsets - offsets[0], history, none, np.zeros(0, dtype=np.int32), times)
