"""The training rows of all cases, in batches that are divided over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import polars as pl

from twotower.data import Batch, Interactions, SequenceBatches, TrainingBatches
from twotower.distributed.communicator import Communicator

NUM_QUERIES, NUM_ITEMS, STEPS, LENGTH = 40, 60, 20, 5


@cache
def interactions() -> Interactions:
    random = np.random.default_rng(0)
    popular = 1.0 / np.arange(1, NUM_ITEMS + 1)
    rows = 600
    columns = {
        "user_id": random.integers(0, NUM_QUERIES, rows),
        "item_id": np.r_[np.arange(NUM_ITEMS), random.choice(NUM_ITEMS, rows - NUM_ITEMS, p=popular / popular.sum())],
        "timestamp": np.arange(rows),
        "weight": random.uniform(0.5, 2.0, rows),
    }
    return Interactions.from_frame(pl.DataFrame(columns))


def batches(data: Interactions, ranks: Communicator, *, weighted: bool) -> Iterator[Batch]:
    """Yield batches of 12 rows; then a smaller one, one not divisible by W, and one with rows only on rank 0."""
    source = TrainingBatches(data, 12, history_length=LENGTH, ranks=ranks)
    order = np.random.default_rng(1).permutation(len(data))
    rows = [*np.split(order[: 12 * (STEPS - 3)], STEPS - 3), order[300:302], order[310:317], order[320:325]]
    for step, part in enumerate(rows):
        # The last one is as if ranks read separate data, and one of them runs out first.
        own = part if ranks.is_first else part[:0]
        batch = source.part(part) if step < STEPS - 1 else source.batch(own)
        yield batch if weighted else replace(batch, weights=None)


def sequence_batches(data: Interactions, ranks: Communicator, *, weighted: bool) -> Iterator[Batch]:
    """Yield batches of about seven windows; the last but one has a single window, so other ranks have no rows."""
    source = SequenceBatches(data, 40, history_length=LENGTH, ranks=ranks)
    for step in range(STEPS):
        first = step * source.windows_per_batch % (source.num_windows - source.windows_per_batch)
        windows = np.arange(first, first + (1 if step == STEPS - 2 else source.windows_per_batch))
        batch = source.batch(windows, epoch=step % 3)
        yield batch if weighted else replace(batch, weights=None)
