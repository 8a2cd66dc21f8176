"""Construction of objectives, pools and frequencies from the names in a configuration; see registry.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from twotower.config.run import Config, ObjectiveConfig
from twotower.data import Interactions
from twotower.data.eligibility import Eligibility
from twotower.data.io.feature_tables import described
from twotower.errors import InputError
from twotower.negatives import (
    Catalog,
    CountedFrequency,
    CrossBatchMemory,
    Frequency,
    FrequencyPower,
    GroupedFrequency,
    HardNegatives,
    Head,
    InBatch,
    IndexStream,
    LogUniform,
    Observed,
    Pool,
    Proposal,
    Sampled,
    SampledWithinGroup,
    Source,
    StreamingFrequency,
    Uniform,
    Weighted,
)
from twotower.negatives.corrections import Correction, ExpectedCounts
from twotower.negatives.frequency import HasItemCounts
from twotower.objectives.base import Objective, SampledSoftmax
from twotower.objectives.feedback import Feedback
from twotower.objectives.guard import build_guard
from twotower.objectives.registry import OBJECTIVES, named_objective

__all__ = [
    "OBJECTIVES",
    "build_frequency",
    "build_objective",
    "build_pool",
    "masks_known_positives",
    "named_objective",
    "needs_known_positives",
    "refuse_in_batch",
    "source_names",
]


#: Objective whose loss contains a number that depends on the whole catalog -> that dependence, for error messages.
_WHOLE_CATALOG = {
    "refined-logq": "it normalises by the probability of the items that are not masked",
    "gbce": "its exponent is calibrated to the share of the items that are drawn",
}


def build_objective(config: Config, train: Interactions, *, learnt: HasItemCounts | None = None) -> Objective:
    """Build the objective of a configuration, with frequencies counted from the training interactions.

    `learnt` counts the items of the rows or questions that batches are made of, if these are not all rows of `train`.
    The frequency of in-batch candidates comes from these counts; heads and proposals use all rows.

    Raises:
        InputError: the objective, a source or a setting is unknown, or needs something that the data does not have.
    """
    settings = config.objective
    named = named_objective(settings.name)
    if "index_stream" in (name for source in settings.sources or named.sources for name in source):
        _require_corpus(config)
    if _rule_of_rows(train) is not None and settings.name in _WHOLE_CATALOG:
        raise InputError(
            f"objective.name: {settings.name}: {_WHOLE_CATALOG[settings.name]}, which differs from row to row under "
            "data.eligibility; use expected-count, or sampled-logistic for a binary loss"
        )
    pool = build_pool(settings, train, learnt=learnt)
    pool.guard = build_guard(config, train)
    objective = named.make(pool, settings, train.num_items)
    objective.rows_per_draw = settings.rows_per_draw
    if config.reads_feedback:
        objective.feedback = _feedback(config, objective)
    asks_together = config.reads_sequences or config.training.question in ("horizon", "set")
    if settings.rows_per_draw is not None and asks_together:
        refuse_in_batch(pool)
    return objective


def _feedback(config: Config, objective: Objective) -> Feedback:
    """Build the feedback term of an objective.

    Raises:
        InputError: the objective is not a `SampledSoftmax`, or, for the form softmax, not an estimate of the full
            softmax.
    """
    settings, term = config.objective, config.objective.feedback
    assert term is not None
    if type(objective) is not SampledSoftmax:
        raise InputError(
            f"objective.feedback: {settings.name} cannot learn from feedback; use a softmax objective such as "
            "expected-count"
        )
    if term.form == "softmax" and (type(objective.pool.correction) is not ExpectedCounts or settings.strength < 1.0):
        what = settings.name if settings.strength == 1.0 else f"objective.strength={settings.strength:g}"
        raise InputError(
            f"objective.feedback: {what} does not estimate the full softmax, which form softmax needs; use "
            "form logistic or pairwise, or expected-count with strength 1"
        )
    return Feedback(term.weight, term.form, bias=settings.bias, size=config.data.feedback.length)


def _require_corpus(config: Config) -> None:
    """Check that the catalog has items without interactions, and that the item tower has features to embed them."""
    if config.data.catalog != "table":
        raise InputError(
            "objective.sources: index_stream draws from the whole corpus, but the catalog has only items with "
            "interactions; set data.catalog=table and pass the item table with --items FILE, or use uniform"
        )
    if config.item_tower.features in ("none", []):
        raise InputError(
            "objective.sources: index_stream draws items without interactions, which are embedded by their features; "
            "set item_tower.features=auto, or use uniform"
        )


def refuse_in_batch(pool: Pool) -> None:
    """Reject in-batch candidates and memories for batches drawn in blocks, because a block may split a sequence.

    Raises:
        InputError: the pool has an in-batch source or a memory.
    """
    if any(isinstance(member, InBatch | CrossBatchMemory) for member in pool.members()):
        raise InputError(
            "objective.rows_per_draw: with in_batch or memory, the rows of whole sequences or questions must share one "
            "draw; remove rows_per_draw, or use frequency, uniform or head instead"
        )


def build_pool(settings: ObjectiveConfig, train: Interactions, *, learnt: HasItemCounts | None = None) -> Pool:
    """Build the pool that an objective's settings describe; raises the errors of `build_objective`."""
    named = named_objective(settings.name)
    unique = named.unique if settings.unique is None else settings.unique
    written = [
        (name, _options(options, settings))
        for source in (named.sources if settings.sources is None else settings.sources)
        for name, options in source.items()
    ]
    frequency = build_frequency(settings, train, learnt)
    builder = _SourceBuilder(train, frequency, written, is_grouped=settings.is_grouped)
    correction = named.correction if isinstance(named.correction, Correction) else named.correction(frequency)
    sources = (builder.build(name, options) for name, options in written)
    return Pool(*sources, unique=unique, correction=correction, eligibility=_rule_of_rows(train))


def _rule_of_rows(train: Interactions) -> Eligibility | None:
    """Return the rule for the candidates of a row; None if every item is eligible for every row."""
    rule = train.eligibility
    return rule if rule is not None and rule.governs_rows else None


def masks_known_positives(settings: ObjectiveConfig) -> bool:
    """Return whether the objective masks a query's other training items."""
    if settings.mask_known_positives is not None:
        return settings.mask_known_positives
    return named_objective(settings.name).mask_known_positives


def leaves_out_items(settings: ObjectiveConfig) -> str | None:
    """Return the setting that leaves items out of a row's sum because of their score, or None.

    With such a setting the target differs from the softmax that an audit compares with, which is over the whole catalog
    or over the catalog without known positives.
    """
    if settings.guard is not None:
        return "objective.guard"
    sources = named_objective(settings.name).sources if settings.sources is None else settings.sources
    for source in sources:
        if "mined" in source and (source["mined"] or {}).get("skipped") == "mask":
            return "objective.sources: mined: skipped: mask"
    return None


def source_names(settings: ObjectiveConfig) -> list[str]:
    """Return the names of the sources of an objective's settings."""
    sources = named_objective(settings.name).sources if settings.sources is None else settings.sources
    return [name for source in sources for name in source]


def needs_known_positives(config: Config) -> bool:
    """Return whether known positives must be masked, for the objective or because batches hold rows of one query."""
    of_rows = not {"in_batch", "memory"}.isdisjoint(source_names(config.objective))
    together = config.reads_sequences or config.training.question in ("horizon", "set")  # rows of one query
    return masks_known_positives(config.objective) or (of_rows and together)


def build_frequency(settings: ObjectiveConfig, train: Interactions, learnt: HasItemCounts | None = None) -> Frequency:
    """Build the item frequency named by `objective.frequency`, counted from `learnt`, or else from `train`.

    Raises:
        InputError: the frequency is grouped and the data has no group column.
    """
    name, options = settings.frequency_name, settings.streaming.model_dump()
    counted = train if learnt is None else learnt
    if name == "counted":
        return CountedFrequency(counted)
    if name == "streaming":
        # Questions are not rows of an epoch; `Batch.windows` describes how they were drawn.
        rows = len(counted) if isinstance(counted, Interactions) else None
        return StreamingFrequency(train.num_items, **options, rows=rows)
    train = counted if isinstance(counted, Interactions) else train
    if name == "grouped":
        return GroupedFrequency.counted(train)
    if train.groups is None:
        raise InputError("objective.frequency: grouped-streaming needs a group column; name it with data.columns.group")
    sizes = np.bincount(np.asarray(train.groups, dtype=np.int64))
    return GroupedFrequency([StreamingFrequency(train.num_items, **options, rows=max(int(n), 1)) for n in sizes])


def _options(options: dict[str, Any] | None, settings: ObjectiveConfig) -> dict[str, Any]:
    return {
        key: settings.negatives if key == "size" and value == "K" else value for key, value in (options or {}).items()
    }


#: Annotation of a source's setting -> accepted types and their description.
_SETTINGS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
}


class _SourceBuilder:
    """A builder for the sources of one pool. If the pool has a head, proposals draw only from the other items.

    If items are offered in groups (data.eligibility), proposals draw within the group of the batch, or, if no candidate
    is shared by the batch, within the group of each row. Otherwise candidates of different groups are masked.
    """

    def __init__(
        self,
        train: Interactions,
        frequency: Frequency,
        written: list[tuple[str, dict[str, Any]]],
        *,
        is_grouped: bool,
    ) -> None:
        self.is_grouped = is_grouped
        self.is_per_row = all(name in ("observed", "mined") or options.get("per_row") for name, options in written)
        self.train, self.frequency, self.written = train, frequency, written
        self.counts = torch.from_numpy(train.item_counts())
        heads = [int(options.get("size", 0)) for name, options in written if name == "head"]
        self.head = Head(self.counts, max(heads)).items if heads and max(heads) > 0 else None

    def build(self, name: str, options: dict[str, Any]) -> Source:
        builders: dict[str, Callable[..., Source]] = {
            "in_batch": self.in_batch,
            "uniform": self.uniform,
            "index_stream": self.index_stream,
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
        for option, value in options.items():
            types, expected = _SETTINGS.get(known[option].annotation, ((object,), ""))
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise InputError(f"objective.sources: {name}: {option}: expected {expected}, found {value!r}")
        for option, parameter in known.items():
            if parameter.default is parameter.empty and option not in options:
                raise InputError(f"objective.sources: {name}: setting {option!r} is missing")
        return builders[name](**options)

    def in_batch(self, *, unique: bool = False) -> Source:
        return InBatch(self.frequency, unique=unique)

    def uniform(self, *, size: int, unique: bool = False, per_row: bool = False) -> Source:
        proposal = Uniform(self.train.num_items) if self.head is None else self._tail(torch.ones(self.train.num_items))
        return self._sampled(proposal, size, unique=unique, per_row=per_row)

    def index_stream(self, *, size: int, unique: bool = False, per_row: bool = False) -> Source:
        in_corpus = torch.from_numpy(described(self.train.item_table, self.train.num_items))
        proposal: Proposal
        if self.head is None:
            proposal = IndexStream(self.train.num_items, torch.nonzero(in_corpus)[:, 0])
        else:
            proposal = self._tail(in_corpus.double())
        return self._sampled(proposal, size, unique=unique, per_row=per_row)

    def frequency_power(
        self, *, size: int, power: float = 0.75, floor: float = 0.0, unique: bool = False, per_row: bool = False
    ) -> Source:
        proposal: Proposal = FrequencyPower(self.counts, power, floor=floor)
        if self.head is not None:
            proposal = self._tail(proposal.log_prob(torch.arange(self.train.num_items)).exp())
        return self._sampled(proposal, size, unique=unique, per_row=per_row)

    def log_uniform(self, *, size: int, unique: bool = False, per_row: bool = False) -> Source:
        return self._sampled(LogUniform(self.counts), size, unique=unique, per_row=per_row)

    def _sampled(self, proposal: Proposal, size: int, *, unique: bool, per_row: bool) -> Source:
        rule = self.train.eligibility
        if rule is None or rule.member is None or not (self.is_grouped or self.is_per_row):
            return Sampled(proposal, size, unique=unique, per_row=per_row)
        return SampledWithinGroup(proposal, rule, size, unique=unique, per_row=per_row, by_row=not self.is_grouped)

    def memory(self, *, size: int, unique: bool = False) -> Source:
        return CrossBatchMemory(self.frequency, size, unique=unique)

    def head_source(self, *, size: int) -> Source:
        return Head(self.counts, size)

    def observed(self, *, size: int) -> Source:
        negatives = self.train.negatives
        if negatives is None or not len(negatives):
            raise InputError(
                "objective.sources: observed needs observed negatives; set data.positive_label, "
                "which turns the rows below it into observed negatives"
            )
        codes = torch.from_numpy(negatives.item_codes.astype("int64"))
        return Observed(torch.from_numpy(negatives.offsets.copy()), codes, size)

    def mined(
        self,
        *,
        size: int,
        ranks: Any = None,
        sampling: str = "top",
        margin: Any = None,
        relative_margin: Any = None,
        max_score: Any = None,
        skipped: str = "keep",
        after: int = 1,
    ) -> Source:
        """Build the mined source; see `HardNegatives`."""
        where = "objective.sources: mined: "
        if ranks is not None and not (
            isinstance(ranks, list | tuple) and len(ranks) == 2 and all(type(rank) is int for rank in ranks)
        ):
            raise InputError(f"{where}ranks: expected the first and the last rank, such as [10, 100], found {ranks!r}")
        for option, value, allowed in (
            ("sampling", sampling, ("top", "random")),
            ("skipped", skipped, ("keep", "mask")),
        ):
            if value not in allowed:
                raise InputError(f"{where}{option}: expected {' or '.join(allowed)}, found {value!r}")
        limits = {"margin": margin, "relative_margin": relative_margin, "max_score": max_score}
        for option, value in limits.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InputError(f"{where}{option}: expected a number, found {value!r}")
        if after < 0:
            raise InputError(f"{where}after: expected a number of epochs >= 0, found {after}")
        pairs = None
        if any(value is not None for value in limits.values()):
            queries = torch.from_numpy(self.train.query_codes().astype(np.int64))
            items = torch.from_numpy(self.train.item_codes.astype(np.int64))
            pairs = torch.unique(queries * self.train.num_items + items)
        try:
            return HardNegatives(
                self.train.num_queries,
                size,
                ranks=None if ranks is None else (ranks[0], ranks[1]),
                sampling="random" if sampling == "random" else "top",
                skipped="mask" if skipped == "mask" else "keep",
                pairs=pairs,
                num_items=self.train.num_items,
                after=after,
                **limits,
            )
        except InputError as error:
            raise InputError(f"{where}{error}") from None

    def catalog(self) -> Source:
        return Catalog(self.train.num_items)

    def _tail(self, weights: Tensor) -> Weighted:
        drawn = int((weights > 0).sum())
        weights[self.head] = 0.0
        if not bool((weights > 0).any()):
            size = max(int(options.get("size", 0)) for name, options in self.written if name == "head")
            fitting = [
                (name, {**options, "size": min(int(options["size"]), drawn // 4)} if name == "head" else options)
                for name, options in self.written
                if name != "head" or drawn >= 4  # too few items to draw from: suggest no head at all
            ]
            occur = int((self.counts > 0).sum())
            raise InputError(
                f"objective.sources: head: size {size:,} includes every item that could be drawn: {drawn:,} of the "
                f"{self.train.num_items:,} items, of which {occur:,} occur in training; make the head smaller, "
                f"for example --set 'objective.sources={_as_set(fitting)}'"
            )
        return Weighted(weights)


def _as_set(sources: list[tuple[str, dict[str, Any]]]) -> str:
    """Format sources for the command line, as the value of --set objective.sources=."""
    return yaml.safe_dump([{name: options} for name, options in sources], default_flow_style=True, width=10_000).strip()
