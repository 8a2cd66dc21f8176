"""What the towers compute from the training rows: log popularity, and the graph of propagation."""

from __future__ import annotations

import numpy as np
import torch

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.ranking.baselines import distinct_rows
from twotower.towers import TwoTower
from twotower.towers.propagation import propagate_over


def use_training_rows(towers: TwoTower, config: Config, train: Interactions, *, continues: bool) -> None:
    """Set `item_tower.popularity` and `query_tower.propagation` of the towers, in place, from the training rows.

    Args:
        towers: freshly built.
        config: the settings.
        train: the rows to train on; repeats count once.
        continues: the run continues another model.

    Raises:
        InputError: propagation cannot be combined with the other settings.
    """
    towers.set_popularity(torch.from_numpy(train.item_counts()))
    layers = config.query_tower.propagation
    if not layers:
        return
    if continues:
        raise InputError(
            "query_tower.propagation: a saved model has the propagated tables and no graph, so it cannot be continued; "
            "train again on all rows, without --from"
        )
    if config.training.micro_batch is not None:
        raise InputError(
            "training.micro_batch: propagation embeds all queries and items in every step; use "
            "training.micro_batch=null, or query_tower.propagation=0"
        )
    offsets, items = distinct_rows(np.asarray(train.offsets), np.asarray(train.item_codes), train.num_items)
    queries = np.repeat(np.arange(train.num_queries), np.diff(offsets))
    propagate_over(towers, torch.from_numpy(np.stack([queries, items])), layers)
