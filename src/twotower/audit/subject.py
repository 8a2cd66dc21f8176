"""The subject of an audit: a trained model, rows of its training data, and its training batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.audit.gradients import AuditedRows, follow
from twotower.config.run import Config
from twotower.data import Batch, GroupedBatches, Interactions, KnownPositives, TrainingBatches
from twotower.data.loading.gaps import gap_codes
from twotower.data.loading.histories import gather_histories
from twotower.errors import InputError
from twotower.negatives import Pool, popularity_deciles
from twotower.objectives.build import masks_known_positives
from twotower.ranking.tower_ranker import TowerRanker
from twotower.serving import SavedModel

#: Maximum number of logits R x N. In float64 this is 64 MiB per array, and four such arrays are held.
_LOGITS = 1 << 23
#: Batches that estimated frequencies and memories see before anything is measured.
_WARM_UP = 500
#: Number of batches shuffled in one call.
_AT_ONCE = 16


@dataclass(frozen=True)
class Subject:
    """The subject of an audit: settings, training data and the rows to measure.

    Attributes:
        config: settings of the model, with every "auto" resolved.
        train: the training interactions.
        rows: rows whose gradient is measured, spread over the popularity deciles.
        deciles: popularity decile of each row's positive, int64 [R].
    """

    config: Config
    train: Interactions
    rows: AuditedRows
    deciles: Tensor

    @property
    def counts(self) -> Tensor:
        """Training interactions of each item, [N]."""
        return torch.from_numpy(self.train.item_counts())

    @property
    def batch_size(self) -> int:
        """Batch size B."""
        return min(int(self.config.training.batch_size), len(self.train))

    def batches(self, seed: int = 0) -> Iterator[Batch]:
        """Yield endless training batches, as in `fit`."""
        if self.config.objective.is_grouped:
            grouped = GroupedBatches(TrainingBatches(self.train, self.batch_size, seed=seed))
            while True:
                yield from grouped
        # Shuffle several batches in one call and split them: the cost is per call more than per row.
        several = max(min(_AT_ONCE, len(self.train) // self.batch_size), 1)
        batches = TrainingBatches(self.train, several * self.batch_size, seed=seed)
        while True:
            for block in batches:
                for start in range(0, len(block), self.batch_size):
                    yield _part(block, slice(start, start + self.batch_size))


def _part(block: Batch, rows: slice) -> Batch:
    """Select rows of a batch."""
    return Batch(
        rows=block.rows[rows],
        queries=block.queries[rows],
        items=block.items[rows],
        history=block.history[rows],
        weights=None if block.weights is None else block.weights[rows],
        groups=None if block.groups is None else block.groups[rows],
    )


def subject_of(artifact: SavedModel, train: Interactions, *, rows: int = 64, seed: int = 0) -> Subject:
    """Choose training rows evenly over the popularity deciles, and compute their logits over the catalog.

    Args:
        artifact: the trained model.
        train: its training interactions.
        rows: number of rows R; reduced if the catalog is so large that the logits would not fit into memory.
        seed: seed of the choice.

    Raises:
        InputError: `rows` is less than 2, or the data and the model have different numbers of items.
    """
    if rows < 2:
        raise InputError(f"rows: expected at least 2, found {rows}")
    if train.num_items != len(artifact.item_embeddings):
        raise InputError(f"the data has {train.num_items} items, the model {len(artifact.item_embeddings)}")
    config = artifact.config.resolved(len(train))
    rows = max(min(rows, _LOGITS // train.num_items), 2)
    decile = popularity_deciles(torch.from_numpy(train.item_counts())).numpy()
    chosen = _choose(train, config, decile, rows, np.random.default_rng(seed))
    length = config.query_tower.history.length if config.query_tower.history else 0
    batch = TrainingBatches(train, len(chosen), history_length=length).batch(chosen)
    ranker = TowerRanker(artifact.towers, length, artifact.item_embeddings)
    # Each row has its own context; models without context features ignore it.
    requests = ranker.encoded_context(None if train.context is None else train.context[chosen], len(chosen))
    context = None if requests is None else [torch.from_numpy(one) for one in requests]
    gaps = None
    if config.reads_gaps and train.timestamps is not None and length:
        codes = gap_codes(train.offsets, train.timestamps)
        before = gather_histories(train.offsets, codes, batch.queries.numpy(), chosen, length)
        gaps = torch.from_numpy(np.maximum(before, 0))
    with torch.no_grad():
        query = artifact.towers.eval().embed_queries(batch.queries, batch.history, context=context, gaps=gaps)
        logits = (query @ artifact.item_embeddings.T / artifact.towers.temperature).double()
    known = KnownPositives(train).pairs(batch.queries) if masks_known_positives(config.objective) else None
    audited = AuditedRows(logits, batch.items, batch.queries, batch.groups, known)
    return Subject(config, train, audited, torch.from_numpy(decile)[batch.items])


def _choose(
    train: Interactions, config: Config, decile: np.ndarray, rows: int, random: np.random.Generator
) -> np.ndarray:
    """Choose row numbers, int64 [R], evenly over the deciles, among rows that can appear in training batches."""
    sample = np.unique(random.integers(0, len(train), min(len(train), 200_000)))
    if config.objective.is_grouped and train.groups is not None:
        groups = np.asarray(train.groups, dtype=np.int64)
        large = np.bincount(groups) >= int(config.training.batch_size)
        sample = sample[large[groups[sample]]]
    sample = random.permutation(sample)
    of = decile[train.item_codes[sample]]
    # Round-robin: the first row of every decile, then the second, ...
    place = np.zeros(len(sample), dtype=np.int64)
    for number in range(10):
        place[of == number] = np.arange((of == number).sum())
    return np.sort(sample[np.argsort(place, kind="stable")[:rows]])


def warm_up(pool: Pool, stream: Iterator[Batch], epoch: int) -> None:
    """Feed batches to estimated frequencies and memories, whose state is not saved with the model."""
    if all(frequency.is_exact for frequency in pool.frequencies()) and not pool.state_dict():
        return
    for _ in range(min(max(epoch, 1), _WARM_UP)):
        batch = next(stream)
        follow(pool, batch, drawn=False)
        follow(pool, batch, drawn=True)


def masked_share(pool: Pool, stream: Iterator[Batch], subject: Subject, batches: int = 5) -> float:
    """Measure the share of masked candidates over all rows of some real batches."""
    known = KnownPositives(subject.train) if masks_known_positives(subject.config.objective) else None
    masked, places = 0, 0
    training = pool.training
    pool.eval()
    for _ in range(batches):
        batch = next(stream)
        pairs = None if known is None else known.pairs(batch.queries)
        drawn = pool.draw(batch.items, known_positives=pairs, queries=batch.queries, group=batch.group)
        for entries in (drawn.mask, drawn.row_mask):
            if entries is not None:
                masked, places = masked + int(entries.sum()), places + entries.numel()
    pool.train(training)
    return masked / max(places, 1)
