"""Query and item towers: from ids, features and histories to embeddings of width D."""

from twotower.towers.attention import Transformer
from twotower.towers.build import build_towers
from twotower.towers.context import Beside, ContextInputs
from twotower.towers.dnn import DNN, MLP
from twotower.towers.encoders import PooledHistory, QueryTower, TwoTower
from twotower.towers.features import FeatureInputs
from twotower.towers.items import ItemTower
from twotower.towers.recency import RecencyAverages
from twotower.towers.recurrent import Recurrent
from twotower.towers.sequence import SequenceTower
from twotower.towers.tables import EmbeddingTable

__all__ = [
    "DNN",
    "MLP",
    "Beside",
    "ContextInputs",
    "EmbeddingTable",
    "FeatureInputs",
    "ItemTower",
    "PooledHistory",
    "QueryTower",
    "RecencyAverages",
    "Recurrent",
    "SequenceTower",
    "Transformer",
    "TwoTower",
    "build_towers",
]
