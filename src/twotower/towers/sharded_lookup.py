"""Fetching the rows of shared tables that a model is about to look up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.towers.item_tower import ItemTower
from twotower.towers.sequence_tower import SequenceTower
from twotower.towers.tables import EmbeddingTable
from twotower.towers.two_tower import TwoTower


def shared_tables_of(model: torch.nn.Module) -> list[EmbeddingTable]:
    """Return the tables that are split over ranks, each once, in the same order on every rank."""
    return [m for m in model.modules() if isinstance(m, EmbeddingTable) and m.part is not None]


def move_to_tables(towers: TwoTower) -> None:
    """Move the layers to the device of the shared tables, unless they are already on it.

    TorchRec creates its tables on the training device, to which the layers are moved when training begins. Towers that
    are evaluated earlier, such as a continued model, which is validated first, must already be on one device. A table
    that is already on that device is not copied.
    """
    devices = {table.weight.device for table in shared_tables_of(towers)} - {towers.log_temperature.device}
    if devices:
        towers.to(devices.pop())


def fetch_for(
    towers: TwoTower,
    *,
    items: Tensor | None = None,
    queries: Tensor | None = None,
    history: Tensor | None = None,
) -> None:
    """Fetch the rows that the towers look up for these codes; collective; a no-op if no table is shared.

    Args:
        towers: the model.
        items: codes that the item tower will embed; -1 is looked up as 0, as in the towers.
        queries: codes that the query tower will embed.
        history: item codes of the queries' histories.
    """
    shared = shared_tables_of(towers)
    if not shared:
        return
    tower = towers.query_tower
    history_items = getattr(tower, "history_items", None)
    query_inputs = tower.beside if isinstance(tower, SequenceTower) else tower
    if isinstance(tower, SequenceTower) and history is not None:
        history = F.pad(history.reshape(-1), (1, 0), value=0)  # the start token is looked up as 0
    lookups = [
        (towers.item_tower.ids, items),
        (getattr(query_inputs, "ids", None), queries),
        (history_items.ids if isinstance(history_items, ItemTower) else history_items, history),
    ]
    blank = torch.empty(0, dtype=torch.int64, device=towers.log_temperature.device)
    codes = {}
    for table in shared:
        own = [part.reshape(-1).clamp(min=0) for owner, part in lookups if owner is table and part is not None]
        codes[table] = torch.cat([blank, *own])
    engine = shared[0].engine if torch.is_grad_enabled() else None  # without a gradient nothing is updated
    if engine is None:
        for table in shared:
            table.fetch(codes[table])
        return
    found = engine.fetch({table.name or "": codes[table] for table in shared})
    for table in shared:
        table.fetched = found[table.name or ""]


def release(towers: TwoTower) -> None:
    """Release the fetched rows of all shared tables."""
    for table in shared_tables_of(towers):
        table.release()


@contextmanager
def fetched_rows(
    towers: TwoTower,
    *,
    items: Tensor | None = None,
    queries: Tensor | None = None,
    history: Tensor | None = None,
) -> Iterator[None]:
    """Fetch rows with `fetch_for`, and `release` them when the block ends."""
    fetch_for(towers, items=items, queries=queries, history=history)
    try:
        yield
    finally:
        release(towers)
