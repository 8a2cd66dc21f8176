"""Batches and memories of real epochs are draws without replacement: their counts, against loops and real batches."""

import functools
import itertools
import math
from fractions import Fraction

import polars as pl
import pytest
import torch

from reference import epoch_absence, epoch_counts
from support.drawing import Observations, agreement, standard_errors_off
from twotower.data import Interactions, TrainingBatches
from twotower.errors import InputError
from twotower.negatives import CountedFrequency, CrossBatchMemory, InBatch, Pool, Sampled, Uniform
from twotower.negatives.sources import log_absence_in_epoch

#: Rows with each item; row 0 has item 1.
COUNTS = [20, 9, 8, 6, 4, 3, 3, 2, 2, 1, 1, 1]
R, N, POSITIVE = sum(COUNTS), len(COUNTS), 1


@functools.cache
def data():
    items = [POSITIVE]
    for item, count in enumerate(COUNTS):
        items += [item] * (count - (item == POSITIVE))
    frame = pl.DataFrame({"user_id": range(R), "item_id": items})
    found = Interactions.from_frame(frame, items=pl.DataFrame({"item_id": list(range(N))}), catalog="table")
    assert found.item_counts().tolist() == COUNTS
    return found


def real_batches(size, epochs):
    batches = TrainingBatches(data(), size, seed=3)
    return itertools.chain.from_iterable(iter(batches) for _ in range(epochs))


def observe_row(pool, size, epochs, *, after=0):
    """Train on real epochs; record the candidates of row 0 whenever it is in a batch."""
    counts, weights = [], []
    memories = [member for member in pool.members() if isinstance(member, CrossBatchMemory)]
    pool.train()
    for number, batch in enumerate(real_batches(size, epochs)):
        at = (batch.rows == 0).nonzero()
        if not len(at) or number < after:
            for memory in memories:  # all that a draw would change
                memory.remember(batch.items, epoch=batch.epoch)
            continue
        drawn = pool.draw(batch.items, epoch=batch.epoch)
        live = ~drawn.mask[int(at)]
        items, weight = drawn.items[live], torch.exp(-drawn.log_expected_count[live].double())
        counts.append(torch.bincount(items, minlength=N).double())
        weights.append(torch.zeros(N, dtype=torch.float64).index_add_(0, items, weight))
    return Observations(torch.stack(counts), torch.stack(weights))


POOLS = {
    "in-batch kept": (lambda f: [InBatch(f)], False),
    "in-batch unique": (lambda f: [InBatch(f)], True),
    "own duplicates removed": (lambda f: [InBatch(f, unique=True)], False),
    "mixed unique": (lambda f: [InBatch(f), Sampled(Uniform(N), 5)], True),
    "memory kept": (lambda f: [CrossBatchMemory(f, 7)], False),
    "memory unique": (lambda f: [CrossBatchMemory(f, 7)], True),
    "in-batch and memory unique": (lambda f: [InBatch(f), CrossBatchMemory(f, 7)], True),
    "memory, then in-batch unique": (lambda f: [CrossBatchMemory(f, 7), InBatch(f)], True),
}


@pytest.mark.parametrize("size", [pytest.param(6, marks=pytest.mark.slow), 30])
@pytest.mark.parametrize("name", POOLS)
def test_the_partition_is_unbiased_over_real_epochs(name, size):
    """With 1 - (1-p)^(B-1), a half-epoch batch would be 21 % off for an item that occurs once."""
    make, unique = POOLS[name]
    torch.manual_seed(0)
    seen = observe_row(Pool(*make(CountedFrequency(data())), unique=unique), size, 600 if size == 6 else 400, after=12)
    scores = torch.linspace(1.5, -1.0, N, dtype=torch.float64).flip(0)  # the rare items weigh most
    assert standard_errors_off(seen.partition(scores, POSITIVE), float(scores.exp().sum())) < 3.5
    each = (seen.weights.mean(0) - 1.0).abs() / (seen.weights.std(0) / math.sqrt(len(seen.weights))).clamp(min=1e-5)
    assert float(each[torch.arange(N) != POSITIVE].max()) < 4.2


@pytest.mark.parametrize("name", ["in-batch unique", "in-batch and memory unique"])
def test_counts_of_independent_draws_are_biased_over_real_epochs(name):
    make, unique = POOLS[name]
    frequency = CountedFrequency(data(), replacement=True)
    seen = observe_row(Pool(*make(frequency), unique=unique), 30, 400, after=12)
    scores = torch.linspace(1.5, -1.0, N, dtype=torch.float64).flip(0)
    estimates, truth = seen.partition(scores, POSITIVE), float(scores.exp().sum())
    assert standard_errors_off(estimates, truth) > 5
    assert float(estimates.mean()) / truth > 1.07


def test_counts_equal_the_loop_and_appearances_follow_them():
    """By hand: 29 of the other 59 rows; a memory of 7 within the epoch, and split over two epochs."""
    frequency = CountedFrequency(data())
    seen = observe_row(Pool(InBatch(frequency), unique=True), 30, 400)
    kappa = torch.tensor(epoch_counts([(29, R - 1)], unique=True, counts=COUNTS), dtype=torch.float64)
    kappa[POSITIVE] = 0.0
    assert agreement(seen.counts, kappa) > 1e-4
    memory = CrossBatchMemory(frequency, 40)
    rows = torch.arange(3).repeat(4)
    request = {"epoch": 5}
    memory.remember(rows[:10], epoch=4)
    memory.remember(rows[:7], epoch=5)
    for unique in (False, True):
        pool = Pool(InBatch(frequency), memory, unique=unique).eval()
        drawn = pool.draw(torch.tensor([1, 3, 4, 5]), **request)
        # Without the row there are 59 rows of this epoch: 3 in the batch and 7 in the memory are ten of them.
        expected = epoch_counts([(10, R - 1), (10, R)], unique=unique, counts=COUNTS)
        found = drawn.log_expected_count.double().exp()
        assert found.tolist() == pytest.approx([expected[j] for j in drawn.items.tolist()], rel=1e-6)


@pytest.mark.parametrize("others", [12, 59, 1000, 40_000])
def test_the_absence_equals_the_loop(others):
    for draws in {0, 1, 2, others // 10, others // 2, others - 11, others - 1, others}:
        if others > 5000 and draws > 5000:
            continue
        counts = [0, 1, 2, 5, min(others // 3, 400), others - 1, others]
        found = log_absence_in_epoch(draws, torch.tensor(counts, dtype=torch.float64), others).tolist()
        for count, value in zip(counts, found, strict=True):
            absent = epoch_absence(draws, count, others)
            if absent == 0:
                assert value == -math.inf
            else:
                log_absent = _log(absent)
                assert value == pytest.approx(log_absent, rel=1e-9, abs=1e-12), (draws, count)


def _log(value: Fraction) -> float:
    """Compute the log of a fraction that may be too small for a float, or too close to 1."""
    if value > Fraction(1, 2):
        return math.log1p(-float(1 - value))
    return math.log(value.numerator) - math.log(value.denominator)


def test_a_rare_item_among_a_hundred_million_rows_is_precise():
    """One, or three, of 10^8 rows: n c / m to ten digits, where gamma functions would lose all of them."""
    found = log_absence_in_epoch(1000, torch.tensor([1.0, 3.0], dtype=torch.float64), 1e8)
    exact = [math.log1p(-1e-5), sum(math.log1p(-1000 / (1e8 - i)) for i in range(3))]
    assert found.tolist() == pytest.approx(exact, rel=1e-10)


def test_a_batch_larger_than_the_epoch_is_refused():
    pool = Pool(InBatch(CountedFrequency(torch.tensor([3, 2]))))
    with pytest.raises(InputError, match="6 rows cannot be drawn without replacement from the 5 rows"):
        pool.draw(torch.tensor([0, 0, 0, 1, 1, 1]))
    weights = CountedFrequency(torch.tensor([0.3, 0.2]))
    assert weights.epoch_rows() is None
    Pool(InBatch(weights)).draw(torch.tensor([0, 0, 0, 1, 1, 1]))


def test_two_sources_with_the_same_rows_are_refused():
    frequency = CountedFrequency(torch.tensor([3, 2]))
    with pytest.raises(InputError, match="memory is listed twice"):
        Pool(CrossBatchMemory(frequency, 4), CrossBatchMemory(frequency, 8))
    with pytest.raises(InputError, match="in_batch is listed twice"):
        Pool(InBatch(frequency), InBatch(frequency))


def test_the_memory_of_an_earlier_version_is_restored():
    """It wrote the newest rows over the oldest ones, and knew no epochs."""
    frequency = CountedFrequency(data())
    memory = CrossBatchMemory(frequency, 5)
    old = {
        "items": torch.tensor([5, 6, 2, 3, 4]),
        "groups": torch.zeros(5, dtype=torch.int64),
        "steps": torch.tensor([2, 2, 0, 1, 1]),
        "state": torch.tensor([5, 2, 3]),
    }
    old |= {f"frequency.{name}": value for name, value in frequency.state_dict().items()}
    memory.load_state_dict(old)
    assert memory.items.tolist() == [2, 3, 4, 5, 6]
    assert memory.age == pytest.approx((3 + 2 + 2 + 1 + 1) / 5)
    memory.remember(torch.tensor([7, 8]), epoch=1)
    assert memory.items.tolist() == [4, 5, 6, 7, 8]
    resumed = CrossBatchMemory(frequency, 5)
    resumed.load_state_dict(memory.state_dict())
    assert list(resumed._batches) == list(memory._batches)
