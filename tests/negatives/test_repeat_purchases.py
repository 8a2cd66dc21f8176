"""Whole sequences with repeat purchases: windows that hold an item are counted, not rows; batches and memories."""

import itertools

import numpy as np
import polars as pl
import pytest
import torch

from reference import epoch_counts
from support.drawing import Observations, agreement, standard_errors_off
from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives, SequenceBatches
from twotower.errors import InputError
from twotower.negatives import CountedFrequency, CrossBatchMemory, InBatch, Pool, Sampled, Uniform
from twotower.objectives.build import build_objective, needs_known_positives

#: The first row is observed. Item 6 is bought again and again, often in one window; item 7 in two windows of a query.
SEQUENCES = [
    [0, 1], [6, 6, 6, 2], [6, 3, 6, 6], [6, 6, 4], [7, 2, 3, 4, 4, 7, 5, 5], [8, 8], [8, 8, 8, 9], [6, 9, 9, 3],
    [5, 5, 5], [2, 2], [4, 3, 3], [8, 2, 5],
]  # fmt: skip
N, L = 10, 3


@pytest.fixture(scope="module")
def train():
    rows = [(q, j, t) for q, items in enumerate(SEQUENCES) for t, j in enumerate(items)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return Interactions.from_frame(frame, items=pl.DataFrame({"item_id": list(range(N))}), catalog="table")


def windows_with(batches, epoch):
    """Count the windows that hold each item, one window at a time."""
    counts = [0] * N
    _, starts, lengths = batches.windows(np.arange(batches.num_windows), epoch)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        for item in set(batches.interactions.item_codes[start : start + length].tolist()):
            counts[item] += 1
    return counts


def test_windows_that_hold_an_item_equal_the_loop_in_every_epoch():
    rows = [(q, j, t) for q, items in enumerate([*SEQUENCES, [3, 1, 2, 3, 6, 6, 1]]) for t, j in enumerate(items)]
    train = Interactions.from_frame(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))
    batches = SequenceBatches(train, 12, history_length=L, seed=2)
    found = set()
    for epoch in range(20):
        windows = batches.batch(np.array([0, 1]), epoch).sequences.windows
        counts = windows.holding.of(torch.arange(N)).tolist()
        assert counts == windows_with(batches, epoch)
        found.add(tuple(counts))
    assert len(found) > 1, "the cut moves from epoch to epoch"
    assert sum(counts) < len(train)


def observe(train, pool, epochs, size=12):
    """Train on real epochs; record the candidates of row 0, whose query has items 0 and 1, in every batch with it."""
    batches = SequenceBatches(train, size, history_length=L, seed=2)
    known, counts, weights = KnownPositives(train), [], []
    memories = [member for member in pool.members() if isinstance(member, CrossBatchMemory)]
    pool.train()
    for number, batch in enumerate(itertools.chain.from_iterable(iter(batches) for _ in range(epochs))):
        windows, at = batch.sequences.windows, (batch.rows == 0).nonzero()
        if not len(at) or number < 10:
            for memory in memories:
                memory.remember(batch.items, epoch=batch.epoch, windows=windows)
            continue
        drawn = pool.draw(batch.items, known_positives=known.pairs(batch.queries), windows=windows, epoch=batch.epoch)
        live = ~drawn.mask[int(at)]
        items, weight = drawn.items[live], torch.exp(-drawn.log_expected_count[live].double())
        counts.append(torch.bincount(items, minlength=N).double())
        weights.append(torch.zeros(N, dtype=torch.float64).index_add_(0, items, weight))
    return Observations(torch.stack(counts), torch.stack(weights)), batches


POOLS = {
    "in-batch unique": (lambda f: [InBatch(f)], True),
    "own duplicates removed": (lambda f: [InBatch(f, unique=True)], False),
    "in-batch kept": (lambda f: [InBatch(f)], False),
    "mixed unique": (lambda f: [InBatch(f), Sampled(Uniform(N), 3)], True),
    "memory kept": (lambda f: [CrossBatchMemory(f, 13)], False),
    "memory unique": (lambda f: [CrossBatchMemory(f, 13)], True),
    "in-batch and memory unique": (lambda f: [InBatch(f), CrossBatchMemory(f, 13)], True),
}
SCORES = torch.tensor([0.5, 0.0, -1.0, -0.5, 0.0, 0.2, 1.5, 0.5, 1.0, 0.0], dtype=torch.float64)
LEFT = [0, 2, 3, 4, 5, 6, 7, 8, 9]  # without item 1, another positive of the query


#: The others run with the slow tests.
FAST = {"in-batch kept", "mixed unique"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in POOLS]
)
def test_the_partition_is_unbiased_over_real_epochs(train, name):
    make, unique = POOLS[name]
    torch.manual_seed(0)
    seen, _ = observe(train, Pool(*make(CountedFrequency(train)), unique=unique), 700)
    reached = [j for j in LEFT if j == 0 or bool((seen.counts[:, j] > 0).any())]
    assert reached == LEFT
    assert standard_errors_off(seen.partition(SCORES, 0), float(SCORES[LEFT].exp().sum())) < 3.5


@pytest.mark.slow
def test_rows_in_place_of_windows_are_biased(train):
    """As it was: an item bought four times by one query was taken for one that four sequences hold."""
    frequency = CountedFrequency(train)
    seen, batches = observe(train, Pool(InBatch(frequency), unique=True), 700)
    drawn, total = batches.windows_per_batch - 1, batches.num_windows - 1
    rows = torch.tensor(epoch_counts([(drawn, total)], unique=True, counts=train.item_counts().tolist()))
    estimates = SCORES[0].exp() + (seen.counts / rows) @ SCORES.exp()
    truth = float(SCORES[LEFT].exp().sum())
    assert standard_errors_off(estimates, truth) > 8
    assert float(estimates.mean()) / truth < 0.9


def test_appearances_follow_the_counts_by_hand(train):
    """Windows differ between epochs only for the query with eight rows; its items are left out."""
    seen, batches = observe(train, Pool(InBatch(CountedFrequency(train)), unique=True), 700)
    drawn, total = batches.windows_per_batch - 1, batches.num_windows - 1
    kappa = torch.tensor(epoch_counts([(drawn, total)], unique=True, counts=windows_with(batches, 0)))
    items = [6, 8, 9]
    assert agreement(seen.counts[:, items], kappa[items]) > 1e-4


def test_a_memory_holds_whole_batches_and_is_restored(train):
    batches = SequenceBatches(train, 12, history_length=L, seed=2)
    memory = CrossBatchMemory(CountedFrequency(train), 13)
    sizes = []
    for batch in itertools.islice(batches, 3):
        sizes.append(len(batch.items))
        memory.remember(batch.items, epoch=batch.epoch, windows=batch.sequences.windows)
    windows = batches.windows_per_batch
    kept = max(round(13 * batches.num_windows / (windows * len(train))), 1)
    assert len(memory._batches) == kept
    assert memory._filled == sum(sizes[-kept:])
    other = CrossBatchMemory(CountedFrequency(train), 13)
    other.load_state_dict(memory.state_dict())
    assert list(other._batches) == list(memory._batches)
    assert torch.equal(other.items, memory.items)


def test_a_memory_of_sequences_needs_known_positives(train):
    batch = SequenceBatches(train, 12, history_length=L).batch(np.array([0, 1, 2]))
    pool = Pool(CrossBatchMemory(CountedFrequency(train), 13))
    with pytest.raises(InputError, match="in_batch or memory"):
        pool.draw(batch.items, windows=batch.sequences.windows)
    changes = [
        "query_tower.history={length: 5, sequence: {kind: gru, blocks: 1}}",
        "objective.sources=[{memory: {size: 9}}, {uniform: {size: 4}}]",
    ]
    assert needs_known_positives(Config.load(None, changes))
    with pytest.raises(InputError, match="with in_batch or memory, the rows of whole sequences"):
        build_objective(Config.load(None, [*changes, "objective.rows_per_draw=4"]), train)
