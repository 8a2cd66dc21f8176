"""Evaluation on the full catalog, exactly ranked, next to the baselines that a model must beat."""

from twotower.evaluation.baselines import EASE, ItemKNN, Popularity
from twotower.evaluation.beyond import diversity_at, exposure, gini, list_mean, self_information
from twotower.evaluation.calibration import Calibration, softmax_calibration
from twotower.evaluation.columns import check_slices
from twotower.evaluation.metrics import coverage, hit_rate_at, hits, mrr_at, ndcg_at, recall_at
from twotower.evaluation.partition import PartitionError, partition_error
from twotower.evaluation.rankers import Ranker
from twotower.evaluation.ranking import check_targets, evaluate, evaluate_all
from twotower.evaluation.report import Evaluation, Row
from twotower.evaluation.significance import Interval, PairedComparison, bootstrap_interval, holm, paired_comparison
from twotower.evaluation.slices import COLD, DECILES, SLICES, popularity_parts, popularity_thirds

__all__ = [
    "COLD",
    "DECILES",
    "EASE",
    "SLICES",
    "Calibration",
    "Evaluation",
    "Interval",
    "ItemKNN",
    "PairedComparison",
    "PartitionError",
    "Popularity",
    "Ranker",
    "Row",
    "bootstrap_interval",
    "check_slices",
    "check_targets",
    "coverage",
    "diversity_at",
    "evaluate",
    "evaluate_all",
    "exposure",
    "gini",
    "hit_rate_at",
    "hits",
    "holm",
    "list_mean",
    "mrr_at",
    "ndcg_at",
    "paired_comparison",
    "partition_error",
    "popularity_parts",
    "popularity_thirds",
    "recall_at",
    "self_information",
    "softmax_calibration",
]
