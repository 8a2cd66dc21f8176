"""Mining of hard negatives: the items that the current towers rank highest for each query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.config.run import Config, EventsConfig
from twotower.data import Holdout, Interactions
from twotower.errors import InputError
from twotower.negatives import HardNegatives
from twotower.objectives import Objective
from twotower.ranking import Ranker
from twotower.ranking.distributed import ShardedRanker
from twotower.ranking.tower_ranker import TowerRanker
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import shared_tables_of

#: Number of queries per search.
MINING_BLOCK = 8192


#: Largest number of elements in a product of query and item vectors, [pairs, D].
_PRODUCTS = 1 << 24


def make_mining(
    objective: Objective, config: Config, train: Interactions, towers: TwoTower
) -> Callable[..., None] | None:
    """Check that a run can mine hard negatives, and return the function that does so (`refresh_hard_negatives`).

    Raises:
        InputError: texts belong to rows and not to query ids, or tables are sharded and a source has a limit.
    """
    sources = [source for source in objective.pool.members() if isinstance(source, HardNegatives)]
    if sources and config.data.query_text is not None and not config.data.texts_are_queries:
        raise InputError(
            "objective.sources: mined ranks items for each query id, but with data.columns.query a text belongs to a "
            "row; make the texts the queries (data.columns.query: null), or list negatives in data.feedback.column"
        )
    if shared_tables_of(towers) and any(source.limits is not None for source in sources):
        raise InputError(
            "objective.sources: mined: margin, relative_margin and max_score need the scores of all items in one "
            "process; use ranks alone, or training.table_placement=replicated"
        )
    return refresh_hard_negatives(
        objective, train, config.history_length, reads_gaps=config.reads_gaps, events=config.data.events
    )


def refresh_hard_negatives(
    objective: Objective,
    train: Interactions,
    length: int,
    *,
    reads_gaps: bool = False,
    events: EventsConfig | None = None,
) -> Callable[..., None] | None:
    """Return a function that refreshes the mined sources of an objective, or None if it has none.

    The mined negatives of a query are its top items, without its training items. If the tables are sharded, each rank
    searches its own items, and every rank stores the merged result. If rows have event types, items are ranked for the
    default type, as for a request that names none.

    The function is called with the towers. With `epoch=n`, counted from 0, it refreshes the sources that are due at the
    start of that epoch; without it, all sources.

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

    def mine(towers: TwoTower, epoch: int | None = None) -> None:
        due = [source for source in sources if epoch is None or epoch >= source.after]
        if not due:
            return
        ranker = _ranker(towers, length)
        # Rank by raw score: with corrected logits, rare items would look hard.
        for block in np.array_split(np.arange(train.num_queries), -(-train.num_queries // MINING_BLOCK)):
            asked = _training_queries(train, block, has_times=reads_gaps, has_events=towers.history_marks == "events")
            asked = replace(asked, context=_default_type(train, events, len(block)))
            _refresh(due, ranker, asked, block)

    return mine


def _default_type(train: Interactions, events: EventsConfig | None, size: int) -> pl.DataFrame | None:
    """Return the context of requests for the default event type, with the other columns unknown."""
    if events is None or train.context is None:
        return None
    return train.context.clear(size).with_columns(pl.lit(events.asked).alias(str(events.column)))


def _refresh(sources: list[HardNegatives], ranker: Ranker, asked: Holdout, block: np.ndarray) -> None:
    """Refresh the sources for a block of queries."""
    codes, most = torch.from_numpy(block).to(sources[0].items.device), max(source.last for source in sources)
    if not isinstance(ranker, TowerRanker) or all(source.limits is None for source in sources):
        items = torch.from_numpy(ranker.rank(asked, most, True)).to(codes.device)
        for source in sources:
            source.refresh(codes, items)
        return
    queries = ranker.embed_holdout(asked)
    scores, items = ranker.index.search(queries, most, (asked.history_offsets, asked.history_items))
    scores, items = scores.to(codes.device), items.to(codes.device)
    for source in sources:
        own = None if source.limits is None else _scores(ranker, queries, *source.pairs_of(codes)[1:])
        source.refresh(codes, items, scores, own)


def _scores(ranker: TowerRanker, queries: Tensor, row: Tensor, item: Tensor) -> Tensor:
    """Compute the scores of pairs (row of the queries [P], item [P]), as the index does, float32 [P]."""
    vectors, device = ranker.item_embeddings, queries.device
    size = max(_PRODUCTS // vectors.shape[1], 1)
    blocks = [slice(start, start + size) for start in range(0, len(row), size)]
    parts = [(queries[row[one].to(device)] * vectors[item[one].to(device)]).sum(1) for one in blocks]
    return torch.cat(parts).to(row.device) if parts else torch.zeros(0, device=row.device)


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
