"""Search for the best items of query embeddings: exact and approximate, with filters, the popularity dial and ties."""

from twotower.index.approximate.build import KINDS, IndexReport, build_index, load_index
from twotower.index.approximate.index import ApproximateIndex
from twotower.index.catalog import ExactCatalog, Index
from twotower.index.exact import ExactIndex
from twotower.index.popularity import PopularityDial
from twotower.index.ties import tie_order
from twotower.index.topk import Exclusion, ScoreTile, pack_keys, top_k

__all__ = [
    "KINDS",
    "ApproximateIndex",
    "ExactCatalog",
    "ExactIndex",
    "Exclusion",
    "Index",
    "IndexReport",
    "PopularityDial",
    "ScoreTile",
    "build_index",
    "load_index",
    "pack_keys",
    "tie_order",
    "top_k",
]
