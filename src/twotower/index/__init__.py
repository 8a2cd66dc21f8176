"""From query embeddings to the best items: exact search and the order among ties."""

from twotower.index.exact import ExactIndex
from twotower.index.ties import tie_order
from twotower.index.topk import Exclusion, ScoreTile, pack_keys, top_k

__all__ = ["ExactIndex", "Exclusion", "ScoreTile", "pack_keys", "tie_order", "top_k"]
