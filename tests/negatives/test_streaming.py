"""The streaming frequency compared with loops, counted truth and the published form; the report of its error."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import StreamingGaps, popularity_decile, step_gaps
from twotower.errors import InputError
from twotower.negatives import CountedFrequency, StreamingFrequency, compare_frequencies, popularity_deciles


def stream(weights, steps, rows, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights.double(), steps * rows, replacement=True, generator=rng).reshape(steps, rows)


def estimate(frequency):
    return frequency.log_prob(torch.arange(frequency.num_items)).exp()


def zipf(size):
    return 1.0 / torch.arange(1, size + 1).double()


@pytest.mark.parametrize("options", [{}, {"buckets": 7}, {"buckets": 7, "tables": 3}, {"buckets": 40, "tables": 2}])
def test_every_step_equals_the_loop(options):
    """Single and repeated occurrences, first occurrences, absent items; the loop shares only the hash function."""
    frequency = StreamingFrequency(30, rate=0.2, patience=2.0, **options)
    slots = {item: [int(s) for s in torch.stack(frequency._slots(torch.tensor([item])))] for item in range(30)}
    slow = StreamingGaps(0.2, 2.0, slots.__getitem__)
    for batch in stream(zipf(25), 60, 9):
        frequency.observe(batch)
        slow.observe(batch.tolist())
        assert estimate(frequency).tolist() == pytest.approx([slow.probability(j) for j in range(30)], rel=1e-12)


def test_it_converges_to_the_counted_truth():
    """Rate 0.01 averages a hundred occurrences: the spread is sqrt(a/2), 7 %, for one estimate, and less for a mean."""
    weights = zipf(40)
    truth = weights / weights.sum()
    batches = stream(weights, 2000, 64)
    frequency = StreamingFrequency(40, rate=0.01)
    gaps = torch.zeros(40, dtype=torch.float64)
    for number, batch in enumerate(batches):
        frequency.observe(batch)
        if number >= 1000:
            gaps += 1.0 / estimate(frequency) / 1000
    report = frequency.compare_to(torch.bincount(batches.flatten()))
    assert report.total_variation < 0.05
    assert np.nanmax(report.worst_log_ratio) < 0.3  # forty items at four times their spread
    assert report.mass == pytest.approx(1.0, abs=0.05)
    assert np.nanmax(report.unseen) == 0.0
    # E[G] = 1/p at every p, from 0.23 to 0.006. Rare items were seen about 400 times: 5 % is one standard error.
    assert (gaps * truth).tolist() == pytest.approx([1.0] * 40, abs=0.15)
    assert (gaps * truth)[:4].tolist() == pytest.approx([1.0] * 4, abs=0.03)
    # A faster rate forgets faster and has more variance: the comparison can detect it.
    fast = StreamingFrequency(40, rate=0.5)
    for batch in batches[-200:]:
        fast.observe(batch)
    assert fast.compare_to(torch.bincount(batches.flatten())).total_variation > 2 * report.total_variation


def test_frequent_items_are_distinguished_where_the_published_form_saturates():
    """With gaps in steps, items with 30 % and with 60 % are both in every batch and look the same."""
    weights = torch.tensor([0.6, 0.3, 0.08, 0.02])
    batches = stream(weights, 600, 16)
    published = step_gaps(batches.tolist(), 0.02)
    assert published[0] > 0.99
    assert published[1] > 0.98
    frequency = StreamingFrequency(4, rate=0.02)
    total = torch.zeros(4, dtype=torch.float64)
    for number, batch in enumerate(batches):
        frequency.observe(batch)
        if number >= 200:
            total += 1.0 / estimate(frequency) / 400
    assert (1.0 / total).tolist() == pytest.approx(weights.tolist(), rel=0.1)


def test_edge_cases():
    frequency = StreamingFrequency(5, rate=0.1)
    assert estimate(frequency).tolist() == [0.0] * 5
    frequency.observe(torch.zeros(0, dtype=torch.int64))
    assert float(frequency.clock) == 0
    frequency.observe(torch.tensor([0, 0, 0, 1]))
    # First occurrence: rows seen so far, divided by occurrences.
    assert estimate(frequency).tolist() == pytest.approx([0.75, 0.25, 0.0, 0.0, 0.0])
    frequency.observe(torch.tensor([2, 2, 1, 0]))
    assert estimate(frequency)[2] == pytest.approx(2 / 8)
    assert estimate(frequency)[3:].tolist() == [0.0, 0.0]
    always = StreamingFrequency(2)
    for _ in range(50):
        always.observe(torch.ones(8, dtype=torch.int64))
    assert estimate(always).tolist() == [0.0, 1.0]


def test_an_item_that_no_longer_occurs_decays():
    frequency = StreamingFrequency(2, rate=0.1, patience=5.0)
    for _ in range(20):
        frequency.observe(torch.tensor([0, 1]))
    seen = []
    for _ in range(100):
        frequency.observe(torch.tensor([1, 1]))
        seen.append(float(estimate(frequency)[0]))
    # No change for 5 gaps of 2 rows, then 5 divided by the rows since its last occurrence.
    assert seen[:5] == pytest.approx([0.5] * 5)
    assert seen[-1] == pytest.approx(5 / 200)
    assert seen == sorted(seen, reverse=True)


def test_drift_is_followed():
    """Popularity is reversed: after about 1/a occurrences the estimate follows the new popularity, not the old one."""
    weights = zipf(8)
    frequency = StreamingFrequency(8, rate=0.05)
    for batch in stream(weights, 300, 32, seed=1):
        frequency.observe(batch)
    before = compare_frequencies(frequency, (weights * 1000).long())
    for batch in stream(weights.flip(0), 300, 32, seed=2):
        frequency.observe(batch)
    after = compare_frequencies(frequency, (weights.flip(0) * 1000).long())
    stale = compare_frequencies(frequency, (weights * 1000).long())
    assert max(before.total_variation, after.total_variation) < 0.1 < 0.3 < stale.total_variation


def test_collisions_only_overestimate_and_more_tables_reduce_the_error():
    weights = zipf(400)
    batches = stream(weights, 400, 64)
    own = StreamingFrequency(400, rate=0.05)
    hashed = {d: StreamingFrequency(400, rate=0.05, buckets=64, tables=d) for d in (1, 4)}
    for batch in batches:
        own.observe(batch)
        for frequency in hashed.values():
            frequency.observe(batch)
    counts = torch.bincount(batches.flatten(), minlength=400)
    common = counts > 200
    ratio = {d: estimate(f) / estimate(own).clamp(min=1e-12) for d, f in hashed.items()}
    # Up to the noise of the estimates, a shared slot has at least the probability of its item.
    assert float(ratio[4][common].min()) > 0.5
    excess = {d: float(estimate(f).sum()) for d, f in hashed.items()}
    assert excess[1] > 2 * excess[4] > 2.0
    worst = {d: hashed[d].compare_to(counts).total_variation for d in hashed}
    assert worst[4] < 0.7 * worst[1]


def test_the_tables_of_a_hash_are_independent():
    frequency = StreamingFrequency(1, buckets=50, tables=2)
    first, second = frequency._slots(torch.arange(20_000))
    cells = torch.bincount(first * 50 + second, minlength=2500).double()
    chi_square = float(((cells - 8) ** 2 / 8).sum())
    assert abs(chi_square - 2499) < 5 * math.sqrt(2 * 2499)


@pytest.mark.parametrize("options", [{}, {"buckets": 16, "tables": 2}])
def test_the_state_resumes_in_the_middle_of_a_stream(options):
    batches = stream(zipf(30), 40, 8)
    whole = StreamingFrequency(30, seed=1, **options)
    for batch in batches[:20]:
        whole.observe(batch)
    state = copy.deepcopy(whole.state_dict())
    resumed = StreamingFrequency(30, seed=2, **options)
    resumed.load_state_dict(state)
    for batch in batches[20:]:
        whole.observe(batch)
        resumed.observe(batch)
    assert torch.equal(estimate(whole), estimate(resumed))
    assert float(resumed.clock) == 320


def test_two_merged_ranks_equal_one_that_saw_all_rows():
    weights = zipf(20)
    truth = weights / weights.sum()
    left, right = (StreamingFrequency(21, rate=0.01) for _ in range(2))
    for batch in stream(weights, 700, 32, seed=1):
        left.observe(batch)
    for batch in stream(weights, 700, 32, seed=2):
        right.observe(batch)
    apart = [float((estimate(one)[:20] / truth).log().abs().mean()) for one in (left, right)]
    left.merge([right])
    assert float(left.clock) == 2 * 700 * 32
    merged = estimate(left)
    assert float(merged[20]) == 0.0, "never seen by either"
    assert float((merged[:20] / truth).log().abs().mean()) < min(apart)
    assert merged[:20].tolist() == pytest.approx(truth.tolist(), rel=0.25)


def test_merging_ranks_with_different_numbers_of_rows_weights_by_rows():
    long, short = StreamingFrequency(3), StreamingFrequency(3)
    for _ in range(30):
        long.observe(torch.tensor([0, 1]))
    for _ in range(10):
        short.observe(torch.tensor([0, 0]))
    long.merge([short])
    # Item 0: 1/2 of 60 rows and 1 of 20; item 1: 1/2 of 60 rows and none of 20.
    assert estimate(long).tolist() == pytest.approx([0.5 * 0.75 + 0.25, 0.5 * 0.75, 0.0])


def test_merging_before_the_first_row_leaves_everything_unseen():
    fresh = StreamingFrequency(3)
    fresh.merge([StreamingFrequency(3)])
    assert estimate(fresh).tolist() == [0.0] * 3
    with pytest.raises(InputError, match="same tables"):
        fresh.merge([StreamingFrequency(4)])
    with pytest.raises(InputError, match="same hash keys"):
        StreamingFrequency(3, buckets=2).merge([StreamingFrequency(3, buckets=2, seed=1)])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any))
def test_deciles_equal_the_loop(counts):
    assert popularity_deciles(torch.tensor(counts)).tolist() == popularity_decile(counts)


def test_the_report_equals_a_loop():
    counts = torch.tensor([40, 25, 12, 9, 6, 4, 2, 1, 1, 0])
    guess = torch.tensor([30, 30, 10, 10, 0, 4, 4, 0, 1, 5])
    report = compare_frequencies(CountedFrequency(guess), counts)
    truth = [c / 100 for c in counts.tolist()]
    found = [g / int(guess.sum()) for g in guess.tolist()]
    assert report.total_variation == pytest.approx(0.5 * sum(abs(a - b) for a, b in zip(truth, found, strict=True)))
    decile = popularity_decile(counts.tolist())
    for number in range(10):
        members = [j for j in range(10) if decile[j] == number and counts[j] > 0]
        seen = [j for j in members if found[j] > 0]
        if seen:
            worst = max(abs(math.log(found[j] / truth[j])) for j in seen)
            assert report.worst_log_ratio[number] == pytest.approx(worst)
        else:
            assert math.isnan(report.worst_log_ratio[number])
        if members:
            assert report.unseen[number] == pytest.approx(1 - len(seen) / len(members))
        else:
            assert math.isnan(report.unseen[number])
    plain = report.to_dict()
    assert None in plain["worst_log_ratio"]
    assert plain["mass"] == pytest.approx(1.0)
    nothing = compare_frequencies(StreamingFrequency(10), counts)
    assert (nothing.total_variation, nothing.mass) == (1.0, 0.0)
