"""Parts of the towers that are computed from the training rows: log popularity, and the graph of propagation."""

from __future__ import annotations

import numpy as np
import torch

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.loading.event_codes import event_codes
from twotower.errors import InputError
from twotower.ranking.baselines import distinct_rows
from twotower.towers import TwoTower
from twotower.towers.propagation import propagate_over


def use_training_rows(
    towers: TwoTower, config: Config, train: Interactions, *, every: Interactions, continues: bool
) -> None:
    """Set the parts of the towers that are computed from the training rows, in place.

    These parts belong to `item_tower.popularity`, `item_tower.event_share` and `query_tower.propagation`.

    Args:
        towers: the newly built towers; changed in place.
        config: the settings.
        train: the rows to train on; in the graph of propagation, repeated pairs count once.
        every: these rows and, if the run continues a model, the rows that the model was trained on.
        continues: whether the run continues another model.

    Raises:
        InputError: propagation cannot be combined with the other settings.
    """
    towers.set_popularity(torch.from_numpy(train.item_counts()))
    if towers.by_event is not None:
        towers.set_event_shares(_counts_by_type(towers, every))
    layers = config.query_tower.propagation
    if not layers:
        return
    if continues:
        raise InputError(
            "query_tower.propagation: a saved model has propagated tables but no graph, so it cannot be continued; "
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


def _counts_by_type(towers: TwoTower, train: Interactions) -> torch.Tensor:
    """Count the rows of each item and event type, int64 [N, types]."""
    inputs, kept = towers.query_tower.context, towers.by_event
    assert inputs is not None and kept is not None
    codes = event_codes(train.event_types(), inputs.event_types)
    if codes is None:
        raise InputError("data.events: the training rows have no types; pass them through with_events")
    known, types = codes >= 0, kept.shape[1]
    pairs = np.asarray(train.item_codes, dtype=np.int64)[known] * types + codes[known]
    return torch.from_numpy(np.bincount(pairs, minlength=train.num_items * types).reshape(-1, types))
