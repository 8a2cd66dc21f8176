"""From names to objects: the only place that maps the names of objectives, sources and frequencies to classes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower.config import Config, ObjectiveConfig
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.losses import (
    BPR,
    GeneralisedBCE,
    Logistic,
    Objective,
    PositiveCorrectedSoftmax,
    RefinedLogQ,
    SampledSoftmax,
)
from twotower.negatives import (
    Catalog,
    CountedFrequency,
    CrossBatchMemory,
    Frequency,
    FrequencyPower,
    GroupedFrequency,
    Head,
    InBatch,
    LogUniform,
    Mined,
    Observed,
    Pool,
    Proposal,
    Sampled,
    Source,
    StreamingFrequency,
    Uniform,
    Weighted,
    corrections,
)
from twotower.negatives.corrections import Correction

Sources = list[dict[str, dict[str, Any] | None]]

IN_BATCH: Sources = [{"in_batch": {}}]
MIXED: Sources = [{"in_batch": {}}, {"uniform": {"size": 1024}}]
UNIFORM: Sources = [{"uniform": {"size": 1024}}]


@dataclass(frozen=True)
class Named:
    """What a name of an objective stands for.

    Attributes:
        summary: one line for a list.
        sources: its sources where the configuration gives none; `K` stands for `objective.negatives`.
        correction: what it subtracts from the logits.
        make: builds it from its pool.
        unique: whether duplicates are removed where the configuration does not say.
        mask_known_positives: whether a query's other positives are masked where the configuration does not say.
    """

    summary: str
    sources: Sources
    make: Callable[[Pool, ObjectiveConfig, int], Objective]
    correction: Correction = field(default_factory=corrections.ExpectedCounts)
    unique: bool = False
    mask_known_positives: bool = False


def _softmax(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    del num_items
    return SampledSoftmax(pool, strength=settings.strength)


def _logistic(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    del num_items
    return Logistic(pool, initial_bias=-math.log(settings.negatives))


def _corrected_logistic(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    return Logistic(pool, corrected=True, initial_bias=-math.log(num_items), strength=settings.strength)


def _noise_contrastive(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    return Logistic(
        pool, corrected=True, keep_accidental=True, initial_bias=-math.log(num_items), strength=settings.strength
    )


def _gbce(pool: Pool, settings: ObjectiveConfig, num_items: int) -> Objective:
    size = sum(member.size for member in pool.members() if isinstance(member, Sampled))
    return GeneralisedBCE(
        pool,
        size=size,
        num_items=num_items,
        calibration=settings.calibration,
        initial_bias=-math.log(max(size, 1)),
    )


OBJECTIVES: dict[str, Named] = {
    "expected-count": Named(
        "softmax, each candidate weighted by one over its expected count (the default)", MIXED, _softmax, unique=True
    ),
    "full-softmax": Named("softmax over the whole catalog, exact", [{"catalog": {}}], _softmax),
    "sampled-softmax-uniform": Named("softmax over K uniform items, s - log(K/N)", UNIFORM, _softmax),
    "in-batch": Named(
        "softmax over the batch, uncorrected: popular items are over-penalised",
        IN_BATCH,
        _softmax,
        corrections.NoCorrection(),
    ),
    "in-batch-logq": Named("softmax over the batch, s - log p", IN_BATCH, _softmax, corrections.Probability()),
    "in-batch-logq-batch-probability": Named(
        "softmax over the batch, s - log(1 - (1-p)^B)", IN_BATCH, _softmax, corrections.BatchProbability()
    ),
    "in-batch-logq-all": Named(
        "softmax over the batch, s - log p, the positive corrected too: the common industry form",
        IN_BATCH,
        lambda pool, settings, _: PositiveCorrectedSoftmax(pool, strength=settings.strength),
        corrections.Probability(),
    ),
    "in-batch-importance": Named(
        "softmax over the batch, reweighted to uniform: s + log(P/Q)",
        IN_BATCH,
        _softmax,
        corrections.ImportanceToUniform(),
    ),
    "refined-logq": Named(
        "softmax over the batch without the positive, rows weighted by 1 - P(y)",
        IN_BATCH,
        lambda pool, settings, _: RefinedLogQ(pool, strength=settings.strength),
        corrections.Probability(),
    ),
    "mixed": Named(
        "batch and uniform candidates, s - log Q* of the mixture (mixed negative sampling)",
        MIXED,
        _softmax,
        corrections.MixtureProbability(),
    ),
    "mixed-by-source": Named(
        "batch and uniform candidates, each by its own source's q", MIXED, _softmax, corrections.BySourceProbability()
    ),
    "negative-sampling": Named(
        "binary cross-entropy, K uniform negatives for each positive (word2vec)",
        [{"uniform": {"size": "K", "per_row": True}}],
        _logistic,
        corrections.NoCorrection(),
    ),
    "logistic-observed": Named(
        "binary cross-entropy, negatives are observed dislikes or impressions",
        [{"observed": {"size": "K"}}],
        _logistic,
        corrections.NoCorrection(),
    ),
    "logistic-popular": Named(
        "binary cross-entropy, negatives by popularity among items the query has not met",
        [{"frequency": {"size": "K", "power": 1.0, "per_row": True}}],
        _logistic,
        corrections.NoCorrection(),
        mask_known_positives=True,
    ),
    "sampled-logistic": Named(
        "binary cross-entropy, log kappa subtracted from all logits, accidental hits masked",
        MIXED,
        _corrected_logistic,
    ),
    "nce": Named(
        "binary cross-entropy, log kappa subtracted from all logits, accidental hits kept as noise",
        [{"frequency": {"size": 1024, "power": 1.0}}],
        _noise_contrastive,
    ),
    "gbce": Named(
        "binary cross-entropy calibrated against overconfidence (gSASRec)",
        [{"uniform": {"size": "K", "per_row": True}}],
        _gbce,
        corrections.NoCorrection(),
    ),
    "bpr": Named(
        "pairwise ranking against K uniform negatives",
        [{"uniform": {"size": "K", "per_row": True}}],
        lambda pool, *_: BPR(pool),
        corrections.NoCorrection(),
    ),
}


def named_objective(name: str) -> Named:
    """What a name stands for.

    Raises:
        InputError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise InputError(f"objective.name: unknown objective {name!r}; expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(config: Config, train: Interactions, *, learnt: Interactions | None = None) -> Objective:
    """The objective of a configuration, its frequency counted from the training interactions.

    `learnt` are the rows that batches are made of, where they are not all of `train`: the frequency of in-batch
    candidates is theirs, while heads and proposals go by all rows.

    Raises:
        InputError: the objective, one of its sources or a setting is unknown, or needs what the data does not have.
    """
    settings = config.objective
    named = named_objective(settings.name)
    pool = build_pool(settings, train, learnt=learnt)
    objective = named.make(pool, settings, train.num_items)
    objective.rows_per_draw = settings.rows_per_draw
    if settings.rows_per_draw is not None and reads_sequences(config):
        refuse_in_batch(pool)
    return objective


def reads_sequences(config: Config) -> bool:
    """Whether rows are positions of whole sequences."""
    return config.query_tower.history is not None and config.query_tower.history.sequence is not None


def reads_gaps(config: Config) -> bool:
    """Whether the time between the items of a history is read."""
    history = config.query_tower.history
    return history is not None and history.sequence is not None and history.sequence.gaps


def refuse_in_batch(pool: Pool) -> None:
    """Refuse the rows of a batch as candidates where blocks of it, which cut sequences, have draws of their own.

    Raises:
        InputError: the pool has an in-batch source.
    """
    if any(isinstance(member, InBatch) for member in pool.members()):
        raise InputError(
            "objective.rows_per_draw: with in_batch and whole sequences the rows of a batch share one draw; take "
            "rows_per_draw out, or take candidates from frequency, uniform or head"
        )


def build_pool(settings: ObjectiveConfig, train: Interactions, *, learnt: Interactions | None = None) -> Pool:
    """The pool of an objective's settings; errors as those of `build_objective`."""
    named = named_objective(settings.name)
    unique = named.unique if settings.unique is None else settings.unique
    written = [
        (name, _options(options, settings))
        for source in (named.sources if settings.sources is None else settings.sources)
        for name, options in source.items()
    ]
    builder = _SourceBuilder(train, build_frequency(settings, train if learnt is None else learnt), written)
    return Pool(
        *(builder.build(name, options) for name, options in written), unique=unique, correction=named.correction
    )


def masks_known_positives(settings: ObjectiveConfig) -> bool:
    """Whether a query's other training items are masked, as far as the objective decides."""
    if settings.mask_known_positives is not None:
        return settings.mask_known_positives
    return named_objective(settings.name).mask_known_positives


def needs_known_positives(config: Config) -> bool:
    """Whether every row's known positives are masked: by the objective, or because sequences share their batch."""
    sources = config.objective.sources or named_objective(config.objective.name).sources
    in_batch = any("in_batch" in source for source in sources)
    return masks_known_positives(config.objective) or (in_batch and reads_sequences(config))


def build_frequency(settings: ObjectiveConfig, train: Interactions) -> Frequency:
    """The item frequency that `objective.frequency` names.

    Raises:
        InputError: grouped, and the data has no group column.
    """
    if settings.frequency == "counted":
        return CountedFrequency(train)
    if settings.frequency == "streaming":
        return StreamingFrequency(train.num_items)
    if settings.frequency == "grouped":
        return GroupedFrequency.counted(train)
    if train.groups is None:
        raise InputError("objective.frequency: grouped-streaming needs a group column; name it with data.columns.group")
    return GroupedFrequency([StreamingFrequency(train.num_items) for _ in range(int(train.groups.max()) + 1)])


def _options(options: dict[str, Any] | None, settings: ObjectiveConfig) -> dict[str, Any]:
    return {key: settings.negatives if value == "K" else value for key, value in (options or {}).items()}


class _SourceBuilder:
    """Builds the sources of one pool, which know of each other's head: a tail need not be drawn from the head."""

    def __init__(self, train: Interactions, frequency: Frequency, written: list[tuple[str, dict[str, Any]]]) -> None:
        self.train, self.frequency = train, frequency
        self.counts = torch.from_numpy(train.item_counts())
        heads = [int(options.get("size", 0)) for name, options in written if name == "head"]
        self.head = Head(self.counts, max(heads)).items if heads and max(heads) > 0 else None

    def build(self, name: str, options: dict[str, Any]) -> Source:
        builders: dict[str, Callable[..., Source]] = {
            "in_batch": self.in_batch,
            "uniform": self.uniform,
            "frequency": self.frequency_power,
            "log_uniform": self.log_uniform,
            "memory": self.memory,
            "head": self.head_source,
            "observed": self.observed,
            "mined": self.mined,
            "catalog": self.catalog,
        }
        if name not in builders:
            raise InputError(f"objective.sources: unknown source {name!r}; expected one of {', '.join(builders)}")
        known = inspect.signature(builders[name]).parameters
        for option in options:
            if option not in known:
                raise InputError(
                    f"objective.sources: {name}: unknown setting {option!r}; expected {', '.join(known) or 'none'}"
                )
        for option, parameter in known.items():
            if parameter.default is parameter.empty and option not in options:
                raise InputError(f"objective.sources: {name}: setting {option!r} is missing")
        return builders[name](**options)

    def in_batch(self, *, unique: bool = False) -> Source:
        return InBatch(self.frequency, unique=unique)

    def uniform(self, *, size: int, unique: bool = False, per_row: bool = False) -> Source:
        proposal = Uniform(self.train.num_items) if self.head is None else self._tail(torch.ones(self.train.num_items))
        return Sampled(proposal, size, unique=unique, per_row=per_row)

    def frequency_power(
        self, *, size: int, power: float = 0.75, floor: float = 0.0, unique: bool = False, per_row: bool = False
    ) -> Source:
        proposal: Proposal = FrequencyPower(self.counts, power, floor=floor)
        if self.head is not None:
            proposal = self._tail(proposal.log_prob(torch.arange(self.train.num_items)).exp())
        return Sampled(proposal, size, unique=unique, per_row=per_row)

    def log_uniform(self, *, size: int, unique: bool = False, per_row: bool = False) -> Source:
        return Sampled(LogUniform(self.counts), size, unique=unique, per_row=per_row)

    def memory(self, *, size: int, unique: bool = False) -> Source:
        return CrossBatchMemory(self.frequency, size, unique=unique)

    def head_source(self, *, size: int) -> Source:
        return Head(self.counts, size)

    def observed(self, *, size: int) -> Source:
        negatives = self.train.negatives
        if negatives is None or not len(negatives):
            raise InputError(
                "objective.sources: observed needs observed negatives; say which labels are positive with "
                "data.positive_label, and the rows below it are taken"
            )
        codes = torch.from_numpy(negatives.item_codes.astype("int64"))
        return Observed(torch.from_numpy(negatives.offsets.copy()), codes, size)

    def mined(self, *, size: int) -> Source:
        return Mined(self.train.num_queries, size)

    def catalog(self) -> Source:
        return Catalog(self.train.num_items)

    def _tail(self, weights: Tensor) -> Weighted:
        weights[self.head] = 0.0
        if not bool((weights > 0).any()):
            raise InputError("objective.sources: the head holds every item that could be drawn; make it smaller")
        return Weighted(weights)
