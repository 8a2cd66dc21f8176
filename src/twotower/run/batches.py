"""Training batches built from a configuration, and the objective, whose item frequencies are counted from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from twotower.config.run import Config
from twotower.data import GroupedBatches, Interactions, SequenceBatches, TrainingBatches
from twotower.data.loading.event_codes import event_codes
from twotower.data.loading.gaps import gap_codes
from twotower.data.loading.questions import QuestionBatches
from twotower.data.loading.row_weights import weigh_rows
from twotower.data.loading.slates import Slates
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.features.from_config import encode_context
from twotower.objectives import Objective
from twotower.objectives.build import build_objective, source_names
from twotower.run.question import DAY, refuse_question, rule_of

#: The batches of one epoch: of rows, of rows within groups, of whole sequences or of questions.
Batches = TrainingBatches | GroupedBatches | SequenceBatches | QuestionBatches


def make_batches(
    config: Config,
    train: Interactions,
    rows: np.ndarray | None = None,
    ranks: Communicator | None = None,
    context: EncodedTable | None = None,
) -> Batches:
    """Build the training batches for a configuration.

    Args:
        config: the settings, without "auto" (`Config.resolved`).
        train: the training interactions.
        rows: indices of the rows to train on; None for all.
        ranks: the processes of the run, each of which gets its part of every batch; None for a single process.
        context: the encoded request features; None if the towers read none.

    Raises:
        InputError: the configuration combines a sequence tower with batches built within groups, or it has only
            in-batch candidates and a batch has a single row.
    """
    batches = _make(config, train, rows, ranks, context)
    if _is_in_batch_alone(config):
        _require_others(config, batches)
    return batches


def _is_in_batch_alone(config: Config) -> bool:
    """Return whether the other rows of a batch are the only candidates."""
    return set(source_names(config.objective)) == {"in_batch"}


def _require_others(config: Config, batches: Batches) -> None:
    """Check that a draw covers more than one row, sequence or question.

    Two cases need no check: `draw_blocks` merges a last block of one row with the block before it, and batches within
    groups omit the only row of a group.
    """
    if config.objective.rows_per_draw == 1:
        where, what = "objective.rows_per_draw: 1", "a block of one row has no other rows"
    elif isinstance(batches, TrainingBatches) and batches.batch_size == 1:
        where, what = f"training.batch_size: {config.training.batch_size}", "a batch of one row has no other rows"
    elif isinstance(batches, SequenceBatches) and batches.windows_per_batch == 1:
        where = f"training.batch_size: {config.training.batch_size}"
        what = "a batch has one sequence, and a row's candidates come from other sequences"
    elif isinstance(batches, QuestionBatches) and batches.questions_per_batch == 1:
        where, what = f"training.question: {config.training.question}", "there is only one question"
    else:
        return
    raise InputError(
        f"{where}; {what}, so in_batch alone gives it no candidates; use larger batches, or add a source such as "
        "uniform"
    )


def _make(
    config: Config,
    train: Interactions,
    rows: np.ndarray | None,
    ranks: Communicator | None,
    context: EncodedTable | None,
) -> Batches:
    size, grouped, rule = int(config.training.batch_size), config.objective.is_grouped, rule_of(config)
    if rule is not None:
        refuse_question(config, train, rule.kind)
    elif config.reads_sequences:
        if grouped:
            raise InputError("objective.frequency: grouped: a sequence may span several groups; expected counted")
        # rows always cover whole queries: ContinuedSplit.rows_to_learn
        train = train if rows is None else train.select(rows)
    of_rows: dict[str, Any] = {
        "history_length": config.history_length,
        "seed": config.training.seed,
        "ranks": ranks,
        "context": None if context is None else encode_context(context.features, train),
        "slates": make_slates(config, train),
    }
    if rule is not None:
        return QuestionBatches(train, size, rule, rows=rows, **of_rows)
    if config.reads_sequences:
        return SequenceBatches(train, size, gaps=config.reads_gaps, **of_rows)
    batches = TrainingBatches(train, size, rows=rows, events=row_events(config, train), **of_rows)
    if grouped:
        return GroupedBatches(batches, in_batch_alone=_is_in_batch_alone(config))
    return batches


def weigh_train(
    config: Config, train: Interactions, rows: np.ndarray | None = None, quantiles: list[float] | None = None
) -> tuple[Interactions, list[float] | None]:
    """Weight the training rows by `data.weights` and `data.recency_half_life`; see `weigh_rows`.

    Args:
        config: the settings.
        train: the training interactions.
        rows: indices of the rows to train on; None for all.
        quantiles: `row_weights` in the metadata of the model that is being continued or audited.
    """
    rule, half_life = config.data.weights, config.data.recency_half_life
    if rule is None and half_life is None:
        return train, None
    options = {} if rule is None else rule.model_dump()
    return weigh_rows(train, rows=rows, quantiles=quantiles, half_life=half_life, **options)


def make_slates(config: Config, train: Interactions) -> Slates | None:
    """Build the slates of the training rows from `data.feedback`; return None if the objective does not use them.

    Raises:
        InputError: there is no feedback, or it cannot be joined to the rows.
    """
    if not config.reads_feedback:
        return None
    settings = config.data.feedback
    if settings.column is None:
        window = None if settings.window is None else max(round(settings.window * DAY), 1)
        return Slates.of_negatives(train, length=settings.length, window=window, request=settings.request)
    if settings.file is not None or settings.request is not None or settings.window is not None:
        raise InputError(
            "data.feedback.column: a list column belongs to its row, so file, request and window have no effect; "
            "remove them, or column"
        )
    if config.data.split == "random":
        raise InputError(
            "data.feedback.column: with data.split=random, held-out items would count as passed over; use "
            "data.split=time or leave-last-out"
        )
    return Slates.of_column(train, settings.column, length=settings.length)


def make_objective(
    config: Config,
    train: Interactions,
    learnt: Interactions | None,
    batches: Batches,
) -> Objective:
    """Build the objective for batches of `make_batches`, with frequencies counted from their rows or questions.

    `learnt` has the rows that the batches are made of; None for all rows of `train`.

    Raises:
        InputError: see `build_objective`.
    """
    return build_objective(config, train, learnt=batches if isinstance(batches, QuestionBatches) else learnt)


def row_events(config: Config, data: Interactions) -> np.ndarray | None:
    """Compute the event type codes of all interactions, int8 [n]; return None if the query tower does not read them."""
    history = config.query_tower.history
    if history is None or not history.event_weights:
        return None
    assert config.data.events is not None
    return event_codes(data.event_types(), tuple(config.data.events.weights or ()))


def row_gaps(config: Config, data: Interactions) -> np.ndarray | None:
    """Return the code of the time gap before each row, int8 [n]; None if unused or if the data has no timestamps."""
    return gap_codes(data.offsets, data.timestamps) if config.reads_gaps and data.timestamps is not None else None
