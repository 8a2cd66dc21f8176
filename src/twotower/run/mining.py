"""Mined negatives: the best items of each query by the current towers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from twotower.data import Interactions
from twotower.evaluation.towers import TowerRanker
from twotower.losses import Objective
from twotower.negatives import Mined
from twotower.towers import TwoTower

#: Queries mined at once.
MINING_BLOCK = 8192


def miner(
    objective: Objective, train: Interactions, length: int, gaps: np.ndarray | None = None
) -> Callable[[TwoTower], None] | None:
    """Refreshes the mined sources of an objective: the best items of each query, without its training items.

    Args:
        objective: what is minimised.
        train: the training interactions.
        length: L of the query tower.
        gaps: codes of the gap before each row, int8 [n], where the tower reads them.
    """
    sources = [source for source in objective.pool.members() if isinstance(source, Mined)]
    if not sources:
        return None

    def mine(towers: TwoTower) -> None:
        ranker = TowerRanker(towers, length)
        # By the raw score: on corrected logits rare items would look hard.
        for block in np.array_split(np.arange(train.num_queries), -(-train.num_queries // MINING_BLOCK)):
            offsets = train.offsets[block[0] : block[-1] + 2]
            rows = (offsets - offsets[0], train.item_codes[offsets[0] : offsets[-1]])
            since = None if gaps is None else gaps[offsets[0] : offsets[-1]]
            _, items = ranker.search(block, rows, max(source.size for source in sources), exclude=rows, gaps=since)
            for source in sources:
                source.refresh(torch.from_numpy(block).to(source.items.device), items.to(source.items.device))

    return mine
