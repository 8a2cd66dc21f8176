"""Rankers: a model or a baseline that gives each query its ranked list of items."""

from twotower.ranking.base import Ranker
from twotower.ranking.baselines import EASE, ItemKNN, Popularity
from twotower.ranking.tower_ranker import TowerRanker

__all__ = [
    "EASE",
    "ItemKNN",
    "Popularity",
    "Ranker",
    "TowerRanker",
]
