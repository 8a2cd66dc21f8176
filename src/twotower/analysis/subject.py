"""What is audited: a trained model, rows of its training data, and the batches that training would have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.analysis.gradients import follow
from twotower.analysis.measurement import AuditedRows
from twotower.build import masks_known_positives, reads_gaps
from twotower.config import Config
from twotower.data import Batch, GroupedBatches, Interactions, KnownPositives, TrainingBatches
from twotower.data.gaps import gap_codes
from twotower.data.histories import gather_histories
from twotower.errors import InputError
from twotower.evaluation.towers import TowerRanker
from twotower.negatives import Pool, popularity_deciles
from twotower.serving import Artifact

#: Logits held at a time, R x N: a quarter of a gigabyte in float64, beside three arrays of that size.
_LOGITS = 1 << 23
#: Batches that estimated frequencies and memories see before anything is measured.
_WARM_UP = 500
#: Batches that are shuffled in one call.
_AT_ONCE = 16


@dataclass(frozen=True)
class Subject:
    """What is audited: a model, the rows it was trained on, and how its batches come.

    Attributes:
        config: its settings, with every "auto" resolved.
        train: the training interactions.
        rows: rows whose gradient is measured, spread over the deciles of popularity.
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
        """B."""
        return min(int(self.config.training.batch_size), len(self.train))

    def batches(self, seed: int = 0) -> Iterator[Batch]:
        """Training batches without end, as `fit` would give them."""
        if self.config.objective.frequency.startswith("grouped"):
            grouped = GroupedBatches(TrainingBatches(self.train, self.batch_size, seed=seed))
            while True:
                yield from grouped
        # Several batches at a time, cut apart: the same order, for the shuffle costs by call more than by row.
        several = max(min(_AT_ONCE, len(self.train) // self.batch_size), 1)
        batches = TrainingBatches(self.train, several * self.batch_size, seed=seed)
        while True:
            for block in batches:
                for start in range(0, len(block), self.batch_size):
                    yield _part(block, slice(start, start + self.batch_size))


def _part(block: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    return Batch(
        rows=block.rows[rows],
        queries=block.queries[rows],
        items=block.items[rows],
        history=block.history[rows],
        weights=None if block.weights is None else block.weights[rows],
        groups=None if block.groups is None else block.groups[rows],
    )


def subject_of(artifact: Artifact, train: Interactions, *, rows: int = 64, seed: int = 0) -> Subject:
    """Choose rows of the training data, as many for each popularity decile, and score the catalog for them.

    Args:
        artifact: the trained model.
        train: its training interactions.
        rows: R; fewer where the catalog is so large that their logits would not fit.
        seed: of the choice.

    Raises:
        InputError: fewer than 2 rows are asked for, or the catalog is another one.
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
    # Every row's own context; a model that looks at none reads nothing of it.
    requests = ranker.encoded_context(None if train.context is None else train.context[chosen], len(chosen))
    context = None if requests is None else [torch.from_numpy(one) for one in requests]
    gaps = None
    if reads_gaps(config) and train.timestamps is not None and length:
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
    """Row numbers, int64 [R], as many from every decile; only rows that training batches can hold."""
    sample = np.unique(random.integers(0, len(train), min(len(train), 200_000)))
    if config.objective.frequency.startswith("grouped") and train.groups is not None:
        groups = np.asarray(train.groups, dtype=np.int64)
        large = np.bincount(groups) >= int(config.training.batch_size)
        sample = sample[large[groups[sample]]]
    sample = random.permutation(sample)
    of = decile[train.item_codes[sample]]
    # Turn by turn: the first of every decile, then the second, ...
    place = np.zeros(len(sample), dtype=np.int64)
    for number in range(10):
        place[of == number] = np.arange((of == number).sum())
    return np.sort(sample[np.argsort(place, kind="stable")[:rows]])


def warm_up(pool: Pool, stream: Iterator[Batch], epoch: int) -> None:
    """Let estimated frequencies and memories see batches first: an artifact does not hold their state."""
    if all(frequency.is_exact for frequency in pool.frequencies()) and not pool.state_dict():
        return
    for _ in range(min(max(epoch, 1), _WARM_UP)):
        batch = next(stream)
        follow(pool, batch, drawn=False)
        follow(pool, batch, drawn=True)


def masked_share(pool: Pool, stream: Iterator[Batch], subject: Subject, batches: int = 5) -> float:
    """Share of masked candidates over all rows of some real batches."""
    known = KnownPositives(subject.train) if masks_known_positives(subject.config.objective) else None
    hits, places = 0, 0
    training = pool.training
    pool.eval()
    for _ in range(batches):
        batch = next(stream)
        pairs = None if known is None else known.pairs(batch.queries)
        drawn = pool.draw(batch.items, known_positives=pairs, queries=batch.queries, group=batch.group)
        for mask in (drawn.hits, drawn.row_hits):
            if mask is not None:
                hits, places = hits + int(mask.sum()), places + mask.numel()
    pool.train(training)
    return hits / max(places, 1)
