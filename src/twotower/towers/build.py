"""Towers from their settings. It stands here, not in run.py, because a served model is built without the trainer."""

from __future__ import annotations

from twotower.config import Config
from twotower.errors import InputError
from twotower.towers.encoders import ItemTower, PooledHistory, QueryTower, TwoTower
from twotower.towers.tables import EmbeddingTable


def build_towers(config: Config, *, num_queries: int, num_items: int) -> TwoTower:
    """Build both towers of a configuration, with fresh weights.

    Args:
        config: sections `query_tower`, `item_tower`, `objective` (similarity and temperature).
        num_queries: Q, rows of the query id table.
        num_items: N.

    Raises:
        InputError: the query tower has neither an id embedding nor a history.
    """
    query, item, objective = config.query_tower, config.item_tower, config.objective
    if not query.id_embedding and query.history is None:
        raise InputError("query_tower: expected id_embedding: true, or a history; found neither")
    dimension = config.item_tower.dimension
    item_tower = ItemTower(num_items, dimension, hidden=item.hidden, dropout=item.dropout)
    history, history_items = None, None
    if query.history is not None:
        history = PooledHistory(query.history.length, query.history.heads, dropout=query.history.dropout)
        history_items = item_tower.ids if query.history.share_table else EmbeddingTable(num_items, dimension)
    query_tower = QueryTower(
        num_queries if query.id_embedding else 0,
        dimension,
        history=history,
        history_items=history_items,
        hidden=query.hidden,
        dropout=query.dropout,
    )
    return TwoTower(
        query_tower,
        item_tower,
        cosine=objective.similarity == "cosine",
        temperature=objective.initial_temperature if objective.temperature == "learned" else objective.temperature,
        learned_temperature=objective.temperature == "learned",
    )
