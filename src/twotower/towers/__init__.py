"""Towers: from features to embeddings of width D."""

from twotower.towers.build import build_towers
from twotower.towers.context import ContextInputs, SideInputs
from twotower.towers.features import FeatureInputs
from twotower.towers.item_tower import ItemTower
from twotower.towers.layers.attention import Transformer
from twotower.towers.layers.gru import Recurrent
from twotower.towers.layers.mlp import DNN, MLP
from twotower.towers.layers.recency import RecencyAverages
from twotower.towers.sequence_tower import SequenceTower
from twotower.towers.tables import EmbeddingTable
from twotower.towers.two_tower import PooledHistory, QueryTower, TwoTower

__all__ = [
    "DNN",
    "MLP",
    "ContextInputs",
    "EmbeddingTable",
    "FeatureInputs",
    "ItemTower",
    "PooledHistory",
    "QueryTower",
    "RecencyAverages",
    "Recurrent",
    "SequenceTower",
    "SideInputs",
    "Transformer",
    "TwoTower",
    "build_towers",
]
