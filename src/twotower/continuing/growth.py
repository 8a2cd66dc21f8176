"""Transfer of a parent model's weights and state to towers with more queries, items and feature values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from twotower.config import Config
from twotower.continuing.parent import Parent
from twotower.data.encoding import EncodedTable
from twotower.data.growing import grown, grown_context
from twotower.data.past import ContinuedSplit
from twotower.losses import Objective
from twotower.ranks import Ranks
from twotower.schema import Vocabulary
from twotower.stored_rows import RowSource
from twotower.towers import TwoTower, build_towers
from twotower.training.continuing import (
    BLOCK_ROWS,
    ContinueOptimizer,
    Maps,
    continue_objective,
    grow,
    named_tables,
    row_maps,
)
from twotower.training.opened import open_checkpoint

#: Start of the message when only weights are inherited.
AFRESH = "optimizer and objective start from scratch, only weights are inherited"


@dataclass(frozen=True)
class Grown:
    """The features of both sides with the new rows, and the maps from old to new codes.

    Attributes:
        features: by side, for sides with features.
        maps: of queries, items and feature values.
        num_queries, num_items: Q and N of the new model.
    """

    features: dict[str, EncodedTable]
    maps: Maps
    num_queries: int
    num_items: int


def grown_features(parent: Parent, split: ContinuedSplit) -> Grown:
    """Apply the parent's fitted features to the new rows too; see `data.growing.grown`."""
    train = split.train
    sides: dict[str, tuple[Any, Vocabulary, pl.DataFrame | None, NDArray[np.bool_]]] = {
        "item": (split.item_map, train.items, split.new_item_table, train.item_counts() > 0),
        "query": (split.query_map, train.queries, train.query_table, np.diff(train.offsets) > 0),
    }
    features, values = {}, {}
    for old in parent.artifact.towers.feature_tables():
        side = old.features.side
        if side == "context":
            one = grown_context(old.features, train, ~split.learnt)
            features[side] = one.table
            values[side] = {place: torch.tensor(rows) for place, rows in one.value_maps.items()}
            continue
        codes, ids, table, known = sides[side]
        one = grown(old, codes, table, ids, known)
        features[side] = one.table
        values[side] = {place: torch.tensor(rows) for place, rows in one.value_maps.items()}
    maps = Maps(torch.tensor(split.query_map), torch.tensor(split.item_map), values)
    return Grown(features, maps, train.num_queries, train.num_items)


def carry_on(
    parent: Parent,
    config: Config,
    growth: Grown,
    *,
    towers: TwoTower,
    objective: Objective,
    ranks: Ranks | None = None,
    say: Callable[[object], None] | None = None,
) -> ContinueOptimizer | None:
    """Load the parent's weights and state into fresh towers and a fresh objective, both changed in place; collective.

    Of sharded tables, each rank reads only the rows that it will hold; optimizer state is read when training starts.
    The ranks check together that the checkpoint matches the model, each on its share of the rows.

    Args:
        parent: the model to continue.
        config: the settings.
        growth: the result of `grown_features`.
        towers: freshly built.
        objective: freshly built.
        ranks: the processes of the run; None for a single process.
        say: receives a message if the states of optimizer and objective cannot be inherited.

    Returns:
        The callback that loads the parent's optimizer state; None if that state is not available.
    """

    def build(num_queries: int, num_items: int) -> TwoTower:
        few = {
            side: EncodedTable(one.features, [rows[:1] for rows in one.arrays]) for side, one in growth.features.items()
        }
        return build_towers(
            config,
            num_queries=num_queries,
            num_items=num_items,
            item_features=few.get("item"),
            query_features=few.get("query"),
            context=few.get("context"),
        )

    tables = named_tables(build, growth.num_queries, growth.num_items)
    rows = row_maps(towers, tables, growth.maps)
    ranks, old = ranks or Ranks(), parent.weights()
    grow(towers, old, rows)
    if parent.checkpoint is None or not parent.checkpoint.is_dir():
        if say is not None:
            say(f"{AFRESH}: {parent.where} has no checkpoint (checkpoints/best.ckpt)")
        return None
    saved = open_checkpoint(parent.checkpoint)
    state: Mapping[str, RowSource] = saved["state_dict"]
    # The checkpoint matches the model only if it has the same weights: the averaged ones, if there are any.
    kind = "averaged" if any(name.startswith("averaged.") for name in state) else "towers"
    if ranks.agree(any(not _same(state.get(f"{kind}.{name}"), own, ranks) for name, own in old.items())):
        if say is not None:
            say(f"{AFRESH}: {parent.checkpoint} has other weights than the model")
        return None
    prefix = "objective."
    kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    continue_objective(objective, kept, growth.maps.items)
    return ContinueOptimizer(rows, saved["optimizer_states"][0], say)


def _same(saved: RowSource | None, own: RowSource, ranks: Ranks) -> bool:
    """Return whether two tensors are equal on the rows that this rank checks: rows of a large one are divided."""
    if saved is None or saved.shape != own.shape or saved.dtype != own.dtype:
        return False
    if len(own.shape) < 2 or len(own) <= BLOCK_ROWS:
        return torch.equal(saved[...], own[...])
    part = ranks.part(len(own))
    blocks = (slice(start, min(start + BLOCK_ROWS, part.stop)) for start in range(part.start, part.stop, BLOCK_ROWS))
    return all(torch.equal(saved[block], own[block]) for block in blocks)
