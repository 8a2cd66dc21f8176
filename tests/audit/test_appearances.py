"""Tests of the appearance audit: correct claims of sources pass, every kind of wrong claim is detected."""

from itertools import chain, repeat

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch
from reference_study.catalogs import random_batches

from support.sources import SamePart
from twotower.audit import AuditedRows, appearances, measure
from twotower.audit.appearances import equal_bins, survival
from twotower.data import GroupedBatches, Interactions, TrainingBatches
from twotower.negatives import (
    CountedFrequency,
    CrossBatchMemory,
    FrequencyPower,
    GroupedFrequency,
    InBatch,
    LogUniform,
    Pool,
    Sampled,
    StreamingFrequency,
    Uniform,
)
from twotower.objectives import SampledSoftmax

COUNTS = torch.from_numpy(np.round(3000 / np.arange(1, 301)).astype(np.int64))


def endless(batches):
    return chain.from_iterable(repeat(batches))


def audited(*sources, count=150, counts=COUNTS, batch_size=64):
    generator = torch.Generator().manual_seed(3)
    batches = random_batches(counts, batch_size, generator)
    return appearances(Pool(*sources), batches, count, item_counts=counts, generator=generator)


def test_correct_claims_pass():
    frequency = CountedFrequency(COUNTS)
    found = audited(
        InBatch(frequency),
        Sampled(Uniform(300), 50),
        Sampled(Uniform(300), 50, unique=True),
        Sampled(FrequencyPower(COUNTS, 0.5), 80, per_row=True),
        Sampled(LogUniform(COUNTS), 80),
        CrossBatchMemory(frequency, 100),
    )
    assert found[-1].source == "all sources"
    assert [one.as_claimed for one in found] == [True] * 7, [one.verdict for one in found]
    (distinct,) = audited(InBatch(frequency, unique=True))
    assert distinct.as_claimed, distinct.to_dict()
    assert all(0.8 < one.dispersion < 1.2 for one in found if one.dispersion is not None)
    assert sum(found[0].observed) == pytest.approx(sum(found[0].claimed), rel=0.01)


def test_a_source_whose_counts_differ_by_row_is_audited(monkeypatch):
    (found,) = audited(SamePart(300, 100, 40))
    assert found.as_claimed, found.verdict
    assert sum(found.observed) == pytest.approx(sum(found.claimed), rel=1e-6)
    monkeypatch.setattr(SamePart, "factor", 1.2)
    (wrong,) = audited(SamePart(300, 100, 40))
    assert wrong.has_wrong_count and wrong.ratio == pytest.approx(1 / 1.2, rel=1e-3)


class Overstated(InBatch):
    """A source that claims a tenth more than it draws."""

    def log_expected_count(self, items, request):
        return super().log_expected_count(items, request) + np.log(1.1)


@pytest.mark.parametrize(
    "source",
    [
        Overstated(CountedFrequency(COUNTS)),
        Overstated(CountedFrequency(COUNTS), unique=True),
        InBatch(CountedFrequency(COUNTS.double() ** 0.9)),
        InBatch(CountedFrequency(torch.where(torch.arange(300) < 3, 0, COUNTS))),
    ],
    ids=["count", "inclusion", "flattened frequency", "items that must not occur"],
)
def test_a_wrong_kappa_is_caught(source):
    (found,) = audited(source)
    assert not found.as_claimed


def test_an_epoch_without_replacement_passes():
    frame = pl.DataFrame({"query_id": range(int(COUNTS.sum())), "item_id": np.repeat(np.arange(300), COUNTS.numpy())})
    data = Interactions.from_frame(frame)
    counts = torch.from_numpy(data.item_counts())
    batches = endless(TrainingBatches(data, 64))
    (found,) = appearances(Pool(InBatch(CountedFrequency(counts))), batches, 150, item_counts=counts)
    assert found.as_claimed


def test_a_streaming_frequency_need_only_be_close():
    frequency = StreamingFrequency(300)
    for batch, _ in zip(random_batches(COUNTS, 64, torch.Generator()), range(300), strict=False):
        frequency.observe(batch.items)
    (found,) = audited(InBatch(frequency))
    assert found.estimated and found.as_claimed and "close" in found.verdict


@pytest.fixture(scope="module")
def markets():
    """Make three markets that share no item and have the same popularity profile."""
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, 101)
    rows = 9000
    market = rng.integers(0, 3, rows)
    item = market * 100 + rng.choice(100, rows, p=weights / weights.sum())
    frame = pl.DataFrame({"query_id": rng.integers(0, 500, rows), "item_id": item, "market": market})
    return Interactions.from_frame(frame, columns={"group": "market"})


def frequencies(markets):
    return {"global": CountedFrequency(markets), "grouped": GroupedFrequency.counted(markets)}


def in_markets(markets):
    return endless(GroupedBatches(TrainingBatches(markets, 64, seed=1)))


def test_batches_built_by_market_are_caught_with_the_global_frequency(markets):
    counts = torch.from_numpy(markets.item_counts())
    found = {
        name: appearances(Pool(InBatch(frequency)), in_markets(markets), 120, item_counts=counts)[0]
        for name, frequency in frequencies(markets).items()
    }
    assert found["grouped"].as_claimed
    assert found["global"].differs_by_batch and found["global"].dispersion > 1.5
    assert "not random draws" in found["global"].verdict


def test_a_wrong_total_is_no_sign_of_batches_that_are_not_random():
    """Take dispersion about the observed mean: claims of twice or half as much leave it at 1."""

    class Doubled(Sampled):
        def draws(self, request):
            return 2 * self.size

    for source in (Doubled(Uniform(300), 50), Doubled(Uniform(300), 50, unique=True)):
        (found,) = audited(source)
        assert found.has_wrong_count and not found.differs_by_batch and 0.8 < found.dispersion < 1.2
        assert found.verdict.startswith("wrong count") and "not random" not in found.verdict


class OneMore(InBatch):
    """A source that claims B rows in place of B - 1."""

    def draws(self, request):
        return super().draws(request) + 1

    def epoch_draws(self, request):
        return super().epoch_draws(request) + 1


def test_b_in_place_of_b_minus_1_is_noticed_with_enough_batches():
    """With B = 256 it is 0.4 %: 20 batches may miss it and say so, 200 notice it."""
    few, many = (audited(OneMore(CountedFrequency(COUNTS)), count=count, batch_size=256)[0] for count in (20, 200))
    assert many.verdict.startswith("wrong count: 0.99")
    assert many.missed < 1 / 256 < few.missed or not few.as_claimed
    assert few.missed > 2 * many.missed


def test_the_gradient_by_market_is_biased_with_the_global_frequency(markets):
    counts = torch.from_numpy(markets.item_counts())
    generator = torch.Generator().manual_seed(0)
    groups = torch.zeros(markets.num_items, dtype=torch.int64)
    groups[torch.from_numpy(markets.item_codes.astype(np.int64))] = torch.from_numpy(markets.groups.astype(np.int64))
    positives = torch.stack([torch.nonzero(groups == group)[40, 0] for group in range(3)])
    rows = torch.arange(3)
    # A model that has learnt to avoid the items of other markets.
    reach = torch.where(groups == groups[positives][:, None], 0.0, -12.0).double()
    logits = 0.5 * counts.double().log() + torch.randn(300, generator=generator, dtype=torch.float64) + reach
    logits[rows, positives] = -torch.inf
    logits[rows, positives] = torch.logsumexp(logits, 1)
    audited_rows = AuditedRows(logits, positives, groups=groups[positives])
    bias = {
        name: measure(
            SampledSoftmax(Pool(InBatch(frequency))), audited_rows, in_markets(markets), draws=200
        ).corrected_bias()
        for name, frequency in frequencies(markets).items()
    }
    assert bias["grouped"][0] < 0.06
    assert bias["global"][0] > 0.3


def test_survival_equals_scipy():
    for x, freedom in [(3.0, 2), (150.0, 100), (1e4, 9000), (0.0, 5)]:
        assert survival(x, freedom) == pytest.approx(scipy.stats.chi2.sf(x, freedom), rel=1e-9)
    assert survival(float("inf"), 3) == 0.0


def test_every_bin_expects_enough_and_impossible_items_have_their_own():
    expected = torch.cat([torch.tensor([50.0, 7.0]), torch.full((100,), 0.3), torch.zeros(4)]).double()
    bins = equal_bins(expected)
    totals = torch.zeros(int(bins.max()) + 1).double().index_add_(0, bins, expected)
    assert totals[-1] == 0 and float(totals[:-1].min()) >= 4.5
    assert totals.max() == 50.0 and len(bins) == 106
