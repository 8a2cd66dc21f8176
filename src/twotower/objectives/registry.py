"""The registry of named objectives: the loss, the default sources and the correction of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from twotower.config.run import ObjectiveConfig
from twotower.errors import InputError
from twotower.negatives import Frequency, Pool, Sampled, corrections
from twotower.negatives.corrections import Correction
from twotower.objectives.base import Objective, PositiveCorrectedSoftmax, RefinedLogQ, SampledSoftmax
from twotower.objectives.binary import BPR, GeneralisedBCE, Logistic

Sources = list[dict[str, dict[str, Any] | None]]

IN_BATCH: Sources = [{"in_batch": {}}]
MIXED: Sources = [{"in_batch": {}}, {"uniform": {"size": 1024}}]
UNIFORM: Sources = [{"uniform": {"size": 1024}}]


@dataclass(frozen=True)
class ObjectiveSpec:
    """The definition of a named objective.

    Attributes:
        summary: one-line description, for lists of objectives.
        sources: default sources if the configuration has none; `K` means `objective.negatives`.
        correction: the correction that is subtracted from the logits, or a function of the item frequency that
            creates it.
        make: builds the objective from its pool.
        unique: default of `objective.unique`: whether duplicates are removed.
        mask_known_positives: default of `objective.mask_known_positives`: whether a query's other positives are masked.
    """

    summary: str
    sources: Sources
    make: Callable[[Pool, ObjectiveConfig, int], Objective]
    correction: Correction | Callable[[Frequency], Correction] = field(default_factory=corrections.ExpectedCounts)
    unique: bool = False
    mask_known_positives: bool = False


def _softmax(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    del num_items
    return SampledSoftmax(pool, strength=settings.strength)


def _logistic(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    del num_items
    return Logistic(pool, initial_bias=_initial_bias(settings, settings.negatives))


def _initial_bias(settings: ObjectiveConfig, count: int) -> float | None:
    return -math.log(max(count, 1)) if settings.bias else None


def _corrected_logistic(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    bias = _initial_bias(settings, num_items)
    return Logistic(pool, corrected=True, initial_bias=bias, strength=settings.strength)


def _noise_contrastive(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    bias = _initial_bias(settings, num_items)
    return Logistic(pool, corrected=True, keep_accidental=True, initial_bias=bias, strength=settings.strength)


def _gbce(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    size = sum(member.size for member in pool.members() if isinstance(member, Sampled))
    return GeneralisedBCE(
        pool,
        size=size,
        num_items=num_items,
        calibration=settings.calibration,
        initial_bias=_initial_bias(settings, size),
    )


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "expected-count": ObjectiveSpec(
        "softmax, each candidate weighted by one over its expected count (the default)",
        MIXED,
        _softmax,
        unique=True,
        mask_known_positives=True,
    ),
    "full-softmax": ObjectiveSpec("softmax over the whole catalog, exact", [{"catalog": {}}], _softmax),
    "sampled-softmax-uniform": ObjectiveSpec("softmax over K uniform items, s - log(K/N)", UNIFORM, _softmax),
    "in-batch": ObjectiveSpec(
        "softmax over the batch, uncorrected: popular items are over-penalised",
        IN_BATCH,
        _softmax,
        corrections.NoCorrection(),
    ),
    "in-batch-logq": ObjectiveSpec(
        "softmax over the batch, s - log p",
        IN_BATCH,
        _softmax,
        corrections.Probability(),
        mask_known_positives=True,
    ),
    "in-batch-logq-batch-probability": ObjectiveSpec(
        "softmax over the batch, s - log(1 - (1-p)^B)",
        IN_BATCH,
        _softmax,
        corrections.BatchProbability(),
        mask_known_positives=True,
    ),
    "in-batch-logq-all": ObjectiveSpec(
        "softmax over the batch, s - log p, the positive corrected too: the common industry form",
        IN_BATCH,
        lambda pool, settings, _: PositiveCorrectedSoftmax(pool, strength=settings.strength),
        corrections.Probability(),
    ),
    "in-batch-importance": ObjectiveSpec(
        "softmax over the batch, reweighted to uniform: s + log(P/Q)",
        IN_BATCH,
        _softmax,
        corrections.ImportanceToUniform(),
    ),
    "uniform-importance": ObjectiveSpec(
        "softmax over K uniform items, reweighted to the frequency: s + log(Q/P), as popularity-biased as in-batch",
        UNIFORM,
        _softmax,
        corrections.ImportanceToFrequency,
    ),
    "refined-logq": ObjectiveSpec(
        "softmax over the batch without the positive, rows weighted by 1 - P(y)",
        IN_BATCH,
        lambda pool, settings, _: RefinedLogQ(pool, strength=settings.strength),
        corrections.Probability(),
    ),
    "mixed": ObjectiveSpec(
        "batch and uniform candidates, s - log Q* of the mixture (mixed negative sampling)",
        MIXED,
        _softmax,
        corrections.MixtureProbability(),
    ),
    "mixed-by-source": ObjectiveSpec(
        "batch and uniform candidates, each corrected by the q of its own source",
        MIXED,
        _softmax,
        corrections.BySourceProbability(),
        mask_known_positives=True,
    ),
    "mixed-by-source-batch-probability": ObjectiveSpec(
        "batch and uniform candidates, each corrected by 1 - (1-q)^n of its own source",
        MIXED,
        _softmax,
        corrections.BySourceProbability(of_all_draws=True),
        mask_known_positives=True,
    ),
    "negative-sampling": ObjectiveSpec(
        "binary cross-entropy, K uniform negatives for each positive (word2vec)",
        [{"uniform": {"size": "K", "per_row": True}}],
        _logistic,
        corrections.NoCorrection(),
    ),
    "logistic-observed": ObjectiveSpec(
        "binary cross-entropy, negatives are observed dislikes or impressions",
        [{"observed": {"size": "K"}}],
        _logistic,
        corrections.NoCorrection(),
    ),
    "logistic-popular": ObjectiveSpec(
        "binary cross-entropy, negatives drawn by popularity from items the query has no interaction with",
        [{"frequency": {"size": "K", "power": 1.0, "per_row": True}}],
        _logistic,
        corrections.NoCorrection(),
        mask_known_positives=True,
    ),
    "sampled-logistic": ObjectiveSpec(
        "binary cross-entropy, log kappa subtracted from all logits, accidental hits masked",
        MIXED,
        _corrected_logistic,
    ),
    "nce": ObjectiveSpec(
        "binary cross-entropy, log kappa subtracted from all logits, accidental hits kept as noise",
        [{"frequency": {"size": 1024, "power": 1.0}}],
        _noise_contrastive,
    ),
    "gbce": ObjectiveSpec(
        "binary cross-entropy calibrated against overconfidence (gSASRec)",
        [{"uniform": {"size": "K", "per_row": True}}],
        _gbce,
        corrections.NoCorrection(),
    ),
    "bpr": ObjectiveSpec(
        "pairwise ranking against K uniform negatives",
        [{"uniform": {"size": "K", "per_row": True}}],
        lambda pool, *_: BPR(pool),
        corrections.NoCorrection(),
    ),
}


def named_objective(name: str) -> ObjectiveSpec:
    """Return the definition of a named objective.

    Raises:
        InputError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise InputError(f"objective.name: unknown objective {name!r}; expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
