"""Mining of hard negatives: the items that the current towers rank highest for each query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import torch

from twotower.config.run import EventsConfig
from twotower.data import Holdout, Interactions
from twotower.negatives import HardNegatives
from twotower.objectives import Objective
from twotower.ranking import Ranker
from twotower.ranking.distributed import ShardedRanker
from twotower.ranking.tower_ranker import TowerRanker
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import shared_tables_of

#: Queries mined at a time.
MINING_BLOCK = 8192


def refresh_hard_negatives(
    objective: Objective,
    train: Interactions,
    length: int,
    *,
    reads_gaps: bool = False,
    events: EventsConfig | None = None,
) -> Callable[[TwoTower], None] | None:
    """Return a function that refreshes the mined sources of an objective, or None if it has none.

    The mined negatives of a query are its top items, without its training items. If the tables are sharded, each rank
    searches its own items, and every rank stores the merged result. If rows have types of events, a query is asked for
    the default type, as a request that names none.

    Args:
        objective: the training objective.
        train: the training interactions.
        length: history length L of the query tower.
        reads_gaps: whether the query tower reads the time between the items of a history.
        events: `data.events` with the weights filled in, or None.
    """
    sources = [source for source in objective.pool.members() if isinstance(source, HardNegatives)]
    if not sources:
        return None

    size = max(source.size for source in sources)

    def mine(towers: TwoTower) -> None:
        ranker = _ranker(towers, length)
        # Rank by raw score: with corrected logits, rare items would look hard.
        for block in np.array_split(np.arange(train.num_queries), -(-train.num_queries // MINING_BLOCK)):
            asked = _training_queries(train, block, has_times=reads_gaps, has_events=towers.history_marks == "events")
            asked = replace(asked, context=_default_type(train, events, len(block)))
            items = torch.from_numpy(ranker.rank(asked, size, True))
            for source in sources:
                source.refresh(torch.from_numpy(block).to(source.items.device), items.to(source.items.device))

    return mine


def _default_type(train: Interactions, events: EventsConfig | None, size: int) -> pl.DataFrame | None:
    """Return the context of requests for the default type of event, with the other columns unknown."""
    if events is None or train.context is None:
        return None
    return train.context.clear(size).with_columns(pl.lit(events.asked).alias(str(events.column)))


def _ranker(towers: TwoTower, length: int) -> Ranker:
    shared = shared_tables_of(towers)
    if not shared or shared[0].part is None:
        return TowerRanker(towers, length)
    return ShardedRanker(towers, length, shared[0].part.ranks)


def _training_queries(train: Interactions, queries: np.ndarray, *, has_times: bool, has_events: bool) -> Holdout:
    """Return a holdout whose histories are the training rows of a contiguous range of queries."""
    offsets = train.offsets[queries[0] : queries[-1] + 2]
    inside, none = slice(offsets[0], offsets[-1]), np.zeros(len(offsets), dtype=np.int64)
    times = train.timestamps[inside] if has_times and train.timestamps is not None else None
    history = np.asarray(train.item_codes[inside])
    types = train.event_types(np.arange(inside.start, inside.stop)) if has_events else None
    return Holdout(
        "mining",
        queries,
        offsets - offsets[0],
        history,
        none,
        np.zeros(0, dtype=np.int32),
        times,
        history_events=types,
    )
