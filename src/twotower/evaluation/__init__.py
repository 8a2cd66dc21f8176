"""Honest evaluation: the whole catalog, exactly, beside what a model must beat."""

from twotower.evaluation.baselines import EASE, ItemKNN, Popularity
from twotower.evaluation.metrics import coverage, hit_rate_at, hits, mrr_at, ndcg_at, recall_at
from twotower.evaluation.rankers import Ranker
from twotower.evaluation.ranking import evaluate, evaluate_all
from twotower.evaluation.report import Evaluation, Row
from twotower.evaluation.significance import Interval, PairedComparison, bootstrap_interval, holm, paired_comparison
from twotower.evaluation.slices import SLICES, popularity_thirds

__all__ = [
    "EASE",
    "SLICES",
    "Evaluation",
    "Interval",
    "ItemKNN",
    "PairedComparison",
    "Popularity",
    "Ranker",
    "Row",
    "bootstrap_interval",
    "coverage",
    "evaluate",
    "evaluate_all",
    "hit_rate_at",
    "hits",
    "holm",
    "mrr_at",
    "ndcg_at",
    "paired_comparison",
    "popularity_thirds",
    "recall_at",
]
