"""The forms of the study: every softmax objective with 255 candidates, and two corrections from published code."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.negatives import DrawRequest, Pool
from twotower.negatives.corrections import BySourceProbability, Correction, Probability, Sources
from twotower.objectives import Objective, SampledSoftmax
from twotower.objectives.build import build_objective

MIXED_BATCH, MIXED_UNIFORM = 129, 127


class OwnSourceCount(Correction):
    """The correction log(n q_j^s), with n the draws of all sources and q^s the candidate's own source. Unbiased."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return log n + log q_j, with q of the source that drew the candidate."""
        total = sum(member.draws(request) for member in pool.random_sources())
        return BySourceProbability().log_count(pool, items, source, request) + math.log(total)


class PlainFrequency(Correction):
    """The correction log(n p_j) for a mixed pool without duplicates: one frequency for all sources."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return log n + log p_j, with p of the in-batch source."""
        total = sum(member.draws(request) for member in pool.random_sources())
        return Probability().log_count(pool, items, source, request) + math.log(total)


@dataclass(frozen=True)
class Form:
    """One form of the study.

    Attributes:
        name: name in the table.
        objective: name in `registry.OBJECTIVES`.
        overrides: settings of the objective, as after `--set objective.`.
        batch_size: B.
        claims_unbiased: whether its bias is claimed to be zero.
        correction: replaces the objective's own correction.
        exact: whether it draws nothing.
    """

    name: str
    objective: str
    overrides: tuple[str, ...] = ()
    batch_size: int = 256
    claims_unbiased: bool = False
    correction: Correction | None = None
    exact: bool = False


_MIX = f"sources=[{{in_batch: {{}}}}, {{uniform: {{size: {MIXED_UNIFORM}}}}}]"
_BATCH = "sources=[{in_batch: {}}]"

FORMS = [
    Form("full-softmax", "full-softmax", claims_unbiased=True, exact=True),
    Form(
        "sampled-softmax-uniform",
        "sampled-softmax-uniform",
        ("sources=[{uniform: {size: 255}}]",),
        claims_unbiased=True,
    ),
    Form("in-batch", "in-batch"),
    Form("in-batch-logq", "in-batch-logq"),
    Form("in-batch-logq-batch-probability", "in-batch-logq-batch-probability"),
    Form("in-batch-logq-all", "in-batch-logq-all"),
    Form("in-batch-importance", "in-batch-importance"),
    Form("refined-logq", "refined-logq", claims_unbiased=True),
    Form("mixed", "mixed", (_MIX,), MIXED_BATCH),
    Form("mixed-by-source", "mixed-by-source", (_MIX,), MIXED_BATCH),
    Form("mixed-by-source-batch-probability", "mixed-by-source-batch-probability", (_MIX,), MIXED_BATCH),
    Form("uniform-importance", "uniform-importance", ("sources=[{uniform: {size: 255}}]",)),
    Form("expected-count, in-batch", "expected-count", (_BATCH, "unique=false"), claims_unbiased=True),
    Form("expected-count, in-batch unique", "expected-count", (_BATCH, "unique=true"), claims_unbiased=True),
    Form(
        "expected-count, 128 in-batch + 127 uniform",
        "expected-count",
        (_MIX, "unique=false"),
        MIXED_BATCH,
        claims_unbiased=True,
    ),
    Form("the same, unique", "expected-count", (_MIX, "unique=true"), MIXED_BATCH, claims_unbiased=True),
    Form(
        "the same, each source by its own q",
        "expected-count",
        (_MIX, "unique=false"),
        MIXED_BATCH,
        claims_unbiased=True,
        correction=OwnSourceCount(),
    ),
    Form(
        "the same, unique, corrected with n p",
        "expected-count",
        (_MIX, "unique=true"),
        MIXED_BATCH,
        correction=PlainFrequency(),
    ),
]


def build_form(form: Form, train: Interactions) -> Objective:
    """Build the objective of a form, as from a configuration."""
    overrides = [f"objective={form.objective}", *(f"objective.{text}" for text in form.overrides)]
    objective = build_objective(Config.load(None, overrides), train)
    if form.correction is None:
        return objective
    pool = Pool(*objective.pool.members(), unique=objective.pool.unique, correction=form.correction)
    return SampledSoftmax(pool)
