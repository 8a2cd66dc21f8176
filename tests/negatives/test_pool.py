"""Pools: what is drawn follows the claimed counts, the partition estimate is unbiased, and wrong counts are caught."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from reference import pooled_kappa
from twotower.errors import InputError
from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Uniform
from twotower.negatives.sources import Request, log_absence_after, log_complement

COUNTS = torch.tensor([50, 20, 10, 8, 5, 3, 2, 1, 1, 0])
N = len(COUNTS)
B = 6
SIZE = 5


def pools():
    frequency = CountedFrequency(COUNTS)
    return {
        "in-batch kept": Pool(InBatch(frequency)),
        "in-batch unique": Pool(InBatch(frequency, unique=True)),
        "uniform kept": Pool(Sampled(Uniform(N), SIZE)),
        "uniform unique": Pool(Sampled(Uniform(N), SIZE, unique=True)),
        "mixed kept": Pool(InBatch(frequency), Sampled(Uniform(N), SIZE)),
        "mixed unique": Pool(InBatch(frequency), Sampled(Uniform(N), SIZE), unique=True),
        "mixed, only in-batch unique": Pool(InBatch(frequency, unique=True), Sampled(Uniform(N), SIZE)),
    }


def rows(rng, count=B):
    return torch.multinomial(COUNTS.double(), count, replacement=True, generator=rng)


def appearances(pool, draws, positive):
    """How often each item stands among the live candidates of a row whose positive is `positive`, over many batches."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    counts = torch.zeros(draws, N)
    for draw in range(draws):
        positives = rows(rng)
        positives[0] = positive
        drawn = pool.draw(positives, generator=rng)
        live = drawn.items[~drawn.hits[0]]
        counts[draw].index_add_(0, live, torch.ones(len(live)))
    return counts


def claimed(pool):
    items = torch.arange(N)
    return pool.log_expected_count(items, Request(torch.zeros(B, dtype=torch.int64))).exp()


def z_scores(counts, kappa, positive):
    """Standardised difference between observed and claimed counts of every item but the row's own."""
    error = counts.std(0) / math.sqrt(len(counts))
    z = (counts.mean(0) - kappa) / error.clamp(min=1e-12)
    keep = (torch.arange(N) != positive) & (kappa > 0)
    return z[keep].double()


@pytest.mark.parametrize("name", list(pools()))
@pytest.mark.parametrize("positive", [0, 6])
def test_observed_counts_follow_claimed_counts(name, positive):
    pool = pools()[name]
    counts = appearances(pool, 3000, positive)
    z = z_scores(counts, claimed(pool), positive)
    assert stats.chi2.sf(float((z**2).sum()), len(z)) > 1e-4
    assert float(counts[:, positive].sum()) == 0, "the row's own positive must be masked wherever it came from"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda kappa: kappa * B / (B - 1),  # B instead of B-1
        lambda kappa: claimed(pools()["mixed kept"]),  # the count where the probability belongs
        lambda kappa: kappa.clamp(max=0.8),
    ],
)
def test_a_wrong_count_is_caught(wrong):
    pool = pools()["mixed unique"]
    counts = appearances(pool, 3000, 6)
    z = z_scores(counts, wrong(claimed(pool)), 6)
    assert stats.chi2.sf(float((z**2).sum()), len(z)) < 1e-6


@pytest.mark.parametrize("unique", [False, True])
def test_claimed_counts_equal_the_table_of_the_theory(unique):
    pool = pools()["mixed unique" if unique else "mixed kept"]
    expected = [
        pooled_kappa(j, counts=COUNTS.tolist(), rows=B, uniform_size=SIZE, num_items=N, unique=unique) for j in range(N)
    ]
    assert claimed(pool).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in pools() if "uniform" in name or "mixed" in name])
def test_the_partition_estimate_is_unbiased(name):
    pool = pools()[name]
    scores = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rng = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    positive = 1
    estimates = []
    for _ in range(6000):
        positives = rows(rng)
        positives[0] = positive
        drawn = pool.draw(positives, generator=rng)
        terms = (scores[drawn.items] - drawn.log_expected_count.double()).masked_fill(drawn.hits[0], -torch.inf)
        estimates.append(float(scores[positive].exp() + terms.exp().sum()))
    truth = float(scores.exp().sum())
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 4 * error
    # The same draws without the correction are far off: the test can fail.
    assert error < 0.05 * truth


def test_collapse_keeps_every_row_sum():
    frequency = CountedFrequency(COUNTS)
    pool = Pool(InBatch(frequency), Sampled(Uniform(N), 30))
    rng = torch.Generator().manual_seed(5)
    drawn = pool.draw(rows(rng, 20), generator=rng)
    merged = drawn.collapse()
    assert len(merged.items) == len(set(drawn.items.tolist())) < len(drawn.items)
    assert int(merged.multiplicity.sum()) == len(drawn.items)
    scores = torch.randn(N, generator=rng, dtype=torch.float64)
    for candidates in (drawn, merged):
        weight = (scores[candidates.items] - candidates.log_expected_count.double()).exp()
        total = (weight * ~candidates.hits).sum(1)
        if candidates is drawn:
            expected = total
    assert total.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("unique", [True, False])
def test_known_positives_are_masked_in_their_row_alone(padded, unique):
    pool = Pool(InBatch(CountedFrequency(COUNTS)), Sampled(Uniform(N), 40), unique=unique)
    rng = torch.Generator().manual_seed(2)
    positives = rows(rng)
    known = torch.tensor([[0, 3, -1], [-1, -1, -1], [9, 9, 4], [1, -1, 2], [5, 6, 7], [8, -1, -1]])
    given = known
    if not padded:
        row, place = torch.nonzero(known >= 0, as_tuple=True)
        given = (row, known[row, place])
    drawn = pool.draw(positives, known_positives=given, generator=rng)
    for row in range(B):
        for place, item in enumerate(drawn.items.tolist()):
            expected = item == int(positives[row]) or item in known[row].tolist()
            assert bool(drawn.hits[row, place]) == expected


def test_a_drawn_item_without_probability_is_refused():
    pool = Pool(InBatch(CountedFrequency(COUNTS)))
    with pytest.raises(InputError, match="expected count is zero"):
        pool.draw(torch.tensor([9, 1]))


def test_bad_calls_are_refused():
    with pytest.raises(InputError, match="at least one source"):
        Pool()
    with pytest.raises(InputError, match="int64 item codes"):
        pools()["mixed kept"].draw(torch.tensor([0.5]))
    with pytest.raises(InputError, match="all are zero"):
        CountedFrequency(torch.zeros(3))
    with pytest.raises(InputError, match="finite numbers"):
        CountedFrequency(torch.tensor([1, -1]))
    with pytest.raises(InputError, match="draws >= 0"):
        Sampled(Uniform(3), -1)
    with pytest.raises(InputError, match="at least 1"):
        Uniform(0)


def test_ids_above_two_to_the_24th_stay_exact():
    big = 2**24 + 1
    pool = Pool(Sampled(Uniform(2**40), 50))
    drawn = pool.draw(torch.tensor([big, big + 1]), generator=torch.Generator().manual_seed(0))
    assert drawn.items.dtype == torch.int64
    frequency_items = torch.tensor([big, big + 1])
    shared = Pool(InBatch(_Flat(2**25))).draw(frequency_items)
    assert shared.hits.tolist() == [[True, False], [False, True]]


class _Flat(CountedFrequency):
    """A frequency over a huge catalog that needs no table."""

    def __init__(self, num_items):
        super().__init__(torch.ones(1))
        self.num_items = num_items

    def log_prob(self, items, group=None):
        return torch.full(items.shape, -math.log(self.num_items), dtype=torch.float64)


def test_log_space_keeps_tiny_probabilities():
    tiny = torch.tensor([1e-12], dtype=torch.float64).log()
    inclusion = log_complement(log_absence_after(1000, tiny)).exp()
    assert float(inclusion) == pytest.approx(1e-9, rel=1e-6)
    assert float(log_complement(torch.tensor([0.0], dtype=torch.float64))) == -math.inf
    assert float(log_complement(torch.tensor([-math.inf], dtype=torch.float64))) == 0.0
    sure = log_absence_after(3, torch.zeros(1, dtype=torch.float64))
    assert float(log_complement(sure).exp()) == 1.0


def test_one_row_and_one_item():
    pool = Pool(InBatch(CountedFrequency(torch.tensor([4]))), Sampled(Uniform(1), 3), unique=True)
    drawn = pool.draw(torch.tensor([0]))
    assert drawn.hits.all()
    assert torch.isfinite(drawn.log_expected_count).all()
