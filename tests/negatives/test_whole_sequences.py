"""In-batch candidates with batches of whole sequences: expected counts, masks, and the partition estimate."""

import numpy as np
import polars as pl
import pytest
import torch

from support.drawing import Observations, agreement, standard_errors_off
from twotower.data import Interactions, KnownPositives, SequenceBatches
from twotower.data.loading.packing import Windows
from twotower.data.loading.shuffle import Shuffle
from twotower.errors import InputError
from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Uniform
from twotower.negatives.sources import DrawRequest

EPOCHS = 400

#: Seven sequences; the first, whose row is observed, is cut into two windows.
SEQUENCES = [[0, 1, 2, 3, 4, 5], [0, 6, 7], [6, 8], [0, 7, 9, 6], [1, 6, 0], [2, 9, 8, 0], [9, 6]]
N = 11  # item 10 never occurs


@pytest.fixture(scope="module")
def train():
    rows = [(q, j, t) for q, items in enumerate(SEQUENCES) for t, j in enumerate(items)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return Interactions.from_frame(
        frame, items=pl.DataFrame({"item_id": list(range(N))}), catalog="table", positive_label=None
    )


@pytest.fixture(scope="module")
def batches(train):
    return SequenceBatches(train, 9, history_length=3, seed=5)


@pytest.fixture(scope="module")
def met(batches):
    """Every batch of many epochs that contains row 2, the observed row, and its position there."""
    size, found = batches.windows_per_batch, []
    for epoch in range(EPOCHS):
        order = Shuffle(batches.num_windows, batches.seed, epoch)
        for position in range(len(batches)):
            batch = batches.batch(order(np.arange(position * size, (position + 1) * size)), epoch)
            found += [(batch, int(at)) for at in (batch.rows == 2).nonzero()]
    return found


def observe_row(train, pool, met, *, as_sequences=True):
    """Record the row's candidates in every batch; with `as_sequences=False` the pool assumes independent rows."""
    known = KnownPositives(train)
    counts, weights = [], []
    for batch, at in met:
        drawn = pool.draw(
            batch.items,
            known_positives=known.pairs(batch.queries) if as_sequences else None,
            windows=batch.sequences.windows if as_sequences else None,
        )
        live = ~drawn.mask[at]
        items, weight = drawn.items[live], torch.exp(-drawn.log_expected_count[live].double())
        counts.append(torch.bincount(items, minlength=N).double())
        weights.append(torch.zeros(N, dtype=torch.float64).index_add_(0, items, weight))
    return Observations(torch.stack(counts), torch.stack(weights))


def sources(name, train):
    in_batch = InBatch(CountedFrequency(train))
    uniform = Sampled(Uniform(N), 4)
    return {
        "kept": lambda: Pool(in_batch),
        "own duplicates removed": lambda: Pool(InBatch(CountedFrequency(train), unique=True)),
        "removed": lambda: Pool(in_batch, unique=True),
        "mixed": lambda: Pool(in_batch, uniform),
        "mixed, removed": lambda: Pool(in_batch, uniform, unique=True),
    }[name]()


def others(train):
    """Return the item counts with the items of query 0 set to zero."""
    counts = torch.from_numpy(train.item_counts()).double()
    counts[SEQUENCES[0]] = 0.0
    return counts


@pytest.mark.parametrize("name", ["kept", "own duplicates removed", "removed", "mixed", "mixed, removed"])
def test_counts_are_as_expected(train, batches, met, name):
    """By hand: each of the other windows is in the batch with probability (S-1)/(W-1)."""
    torch.manual_seed(0)
    pool = sources(name, train)
    seen = observe_row(train, pool, met)
    drawn, total = batches.windows_per_batch - 1, batches.num_windows - 1
    assert 2 <= drawn < total
    held = others(train)
    expected = torch.zeros(N, dtype=torch.float64)
    for item in range(N):
        if item in SEQUENCES[0]:
            continue
        # The drawn windows contain the item unless all of them are among the windows without it.
        absent = np.prod([(total - held[item].item() - k) / (total - k) for k in range(drawn)])
        uniform = 4 / N if "mixed" in name else 0.0
        if "removed" in name:
            expected[item] = 1 - absent * ((1 - 1 / N) ** 4 if "mixed" in name else 1.0)
        else:
            expected[item] = held[item] * drawn / total + uniform
    assert agreement(seen.counts, expected) > 0.001
    claimed = torch.where(seen.counts > 0, 1.0, 0.0).sum(0) > 0
    found = (seen.counts.sum(0) / seen.weights.sum(0))[claimed]
    torch.testing.assert_close(found, expected[claimed], atol=1e-6, rtol=1e-5)
    assert bool((seen.counts[:, SEQUENCES[0]] == 0).all())  # no item of the query itself


@pytest.mark.parametrize("name", ["mixed", "mixed, removed"])
def test_the_partition_is_unbiased(train, met, name):
    torch.manual_seed(1)
    scores = torch.linspace(-1, 1.5, N, dtype=torch.float64)[torch.randperm(N)]
    positive = SEQUENCES[0][2]
    kept = [j for j in range(N) if j == positive or j not in SEQUENCES[0]]
    truth = float(scores[kept].exp().sum())
    seen = observe_row(train, sources(name, train), met)
    assert standard_errors_off(seen.partition(scores, positive), truth) < 3.5


def test_counts_of_independent_rows_would_be_biased(train, met):
    """With the counts of B - 1 independent rows and its own sequence unmasked, the same batch is far from the truth."""
    torch.manual_seed(2)
    scores = torch.zeros(N, dtype=torch.float64)
    seen = observe_row(train, sources("mixed", train), met, as_sequences=False)
    assert standard_errors_off(seen.partition(scores, SEQUENCES[0][2]), float(N)) > 5


def test_a_batch_of_one_sequence_has_no_in_batch_candidates(train):
    batch = SequenceBatches(train, 1, history_length=3).batch(np.array([0]))
    pool = sources("mixed", train)
    drawn = pool.draw(
        batch.items, known_positives=KnownPositives(train).pairs(batch.queries), windows=batch.sequences.windows
    )
    assert len(drawn.items) == 4
    torch.testing.assert_close(drawn.log_expected_count.exp(), torch.full((4,), 4 / N))


def test_known_positives_are_required(train):
    batch = SequenceBatches(train, 9, history_length=3).batch(np.array([0, 1]))
    with pytest.raises(InputError, match="known_positives: rows of one sequence"):
        sources("mixed", train).draw(batch.items, windows=batch.sequences.windows)
    Pool(Sampled(Uniform(N), 4)).draw(
        batch.items, windows=batch.sequences.windows
    )  # sampled candidates do not depend on the batch


def test_rare_items_of_many_sequences_are_precise():
    """3 of 10^8 sequences contain the item: 1 - (1 - 3e-8)^n, where factorials would lose all precision."""
    counts = torch.tensor([3.0, 4e8 - 3.0])
    source = InBatch(CountedFrequency(counts), unique=True)
    request = DrawRequest(torch.zeros(4, dtype=torch.int64), windows=Windows(1001, 10**8 + 1, int(4e8)))
    found = source.log_expected_count(torch.tensor([0]), request).exp().item()
    assert found == pytest.approx(1000 * 3e-8, rel=1e-4)
