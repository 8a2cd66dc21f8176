"""Towers: from features to embeddings of width D."""

from twotower.towers.build import build_towers
from twotower.towers.encoders import MLP, ItemTower, PooledHistory, QueryTower, TwoTower
from twotower.towers.tables import EmbeddingTable

__all__ = ["MLP", "EmbeddingTable", "ItemTower", "PooledHistory", "QueryTower", "TwoTower", "build_towers"]
