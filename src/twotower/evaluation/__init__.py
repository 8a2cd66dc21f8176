"""Evaluation over the whole catalog, alongside the baselines that a model must beat."""

from twotower.evaluation.baselines import BASELINES, FittedBaselines, fit_baselines
from twotower.evaluation.calibration import Calibration, softmax_calibration
from twotower.evaluation.evaluator import check_targets, evaluate, evaluate_all
from twotower.evaluation.metrics import (
    coverage,
    diversity_at,
    exposure,
    gini,
    hit_rate_at,
    hits,
    list_mean,
    mrr_at,
    ndcg_at,
    recall_at,
    self_information,
)
from twotower.evaluation.off_policy import OffPolicyEstimate, off_policy_estimate
from twotower.evaluation.results import Evaluation, Row
from twotower.evaluation.significance import Interval, PairedComparison, bootstrap_interval, holm, paired_comparison
from twotower.evaluation.slices import COLD, DECILES, SLICES, check_slices, popularity_parts, popularity_thirds

__all__ = [
    "BASELINES",
    "COLD",
    "DECILES",
    "SLICES",
    "Calibration",
    "Evaluation",
    "FittedBaselines",
    "Interval",
    "OffPolicyEstimate",
    "PairedComparison",
    "Row",
    "bootstrap_interval",
    "check_slices",
    "check_targets",
    "coverage",
    "diversity_at",
    "evaluate",
    "evaluate_all",
    "exposure",
    "fit_baselines",
    "gini",
    "hit_rate_at",
    "hits",
    "holm",
    "list_mean",
    "mrr_at",
    "ndcg_at",
    "off_policy_estimate",
    "paired_comparison",
    "popularity_parts",
    "popularity_thirds",
    "recall_at",
    "self_information",
    "softmax_calibration",
]
