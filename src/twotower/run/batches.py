"""Training batches as the settings say."""

from __future__ import annotations

import numpy as np

from twotower.build import reads_gaps, reads_sequences
from twotower.config import Config
from twotower.data import GroupedBatches, Interactions, SequenceBatches, TrainingBatches
from twotower.data.declaring import encode_context
from twotower.data.encoding import EncodedTable
from twotower.data.gaps import gap_codes
from twotower.errors import InputError
from twotower.ranks import Ranks


def history_length(config: Config) -> int:
    """L of the query tower; 0 where it looks at no history."""
    return config.query_tower.history.length if config.query_tower.history else 0


def make_batches(
    config: Config,
    train: Interactions,
    rows: np.ndarray | None = None,
    ranks: Ranks | None = None,
    context: EncodedTable | None = None,
) -> TrainingBatches | GroupedBatches | SequenceBatches:
    """The batches that the towers and the objective of a configuration learn from.

    Args:
        config: the settings, without "auto" (`Config.resolved`).
        train: the training interactions.
        rows: the rows of them to learn from; None for all.
        ranks: gives this rank's part of every batch; None for a process alone.
        context: the fitted features of requests; None where the towers look at none.

    Raises:
        InputError: whole sequences are to be read, and batches built within groups.
    """
    size, seed, length = int(config.training.batch_size), config.training.seed, history_length(config)
    grouped = config.objective.frequency.startswith("grouped")
    if reads_sequences(config):
        if grouped:
            raise InputError("objective.frequency: grouped: a sequence may run over several groups; expected counted")
        # rows are those of whole queries: ContinuedSplit.rows_to_learn
        learnt = train if rows is None else train.select(rows)
        encoded = None if context is None else encode_context(context.features, learnt)
        gaps = reads_gaps(config)
        return SequenceBatches(learnt, size, history_length=length, seed=seed, context=encoded, gaps=gaps, ranks=ranks)
    encoded = None if context is None else encode_context(context.features, train)
    batches = TrainingBatches(train, size, history_length=length, seed=seed, rows=rows, ranks=ranks, context=encoded)
    return GroupedBatches(batches) if grouped else batches


def gaps_of(config: Config, data: Interactions) -> np.ndarray | None:
    """Codes of the gap before each row, int8 [n], where the tower reads them and rows have times; else None."""
    return gap_codes(data.offsets, data.timestamps) if reads_gaps(config) and data.timestamps is not None else None
