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


def test_every_step_equals_the_loop():
    """Single and repeated occurrences, first occurrences, absent items."""
    frequency = StreamingFrequency(30, rate=0.2, patience=2.0)
    slow = StreamingGaps(0.2, 2.0)
    for batch in stream(zipf(25), 60, 9):
        frequency.observe(batch)
        slow.observe(batch.tolist())
        assert estimate(frequency).tolist() == pytest.approx([slow.probability(j) for j in range(30)], rel=1e-12)


@pytest.mark.parametrize("rows", [100, 900])
def test_within_an_epoch_every_step_equals_the_loop(rows):
    frequency = StreamingFrequency(30, rate=0.2, rows=rows)
    slow = StreamingGaps(0.2, rows=rows)
    for batch in stream(zipf(25), 60, 9):
        frequency.observe(batch)
        slow.observe(batch.tolist())
        assert estimate(frequency).tolist() == pytest.approx([slow.probability(j) for j in range(30)], rel=1e-9)


def weights_by_occurrence(share, *, before, seeds=4000, occurrences=60, rows=8, rate=0.05):
    """Follow an item that joins after `before` rows with a share of each later row; return its weight p / p_hat.

    Every seed is an item of one stream, so that one frequency follows all of them. Entry [n] is the mean weight at the
    step in which an item's n-th occurrence falls, as its in-batch candidates are weighed.
    """

    class Parallel(StreamingFrequency):
        """Several streams with one clock: a step has `rows` rows of each."""

        def _first_gap(self, elapsed, occurrences, _):
            return super()._first_gap(elapsed, occurrences, rows)

    rng = np.random.default_rng(0)
    total, number = np.zeros(occurrences), np.zeros(occurrences)
    frequency = Parallel(seeds + 1, rate=rate)
    frequency.clock += before
    seen = np.zeros(seeds, dtype=np.int64)
    while seen.min() < occurrences:
        # The same step for all seeds: each has its own rows, so the clock advances by the rows of one.
        times = rng.binomial(rows, share, seeds)
        items = torch.from_numpy(np.repeat(np.arange(seeds), times))
        frequency.clock += rows - len(items)
        frequency.observe(items)
        met = np.flatnonzero(times)
        weight = share / estimate(frequency).numpy()[met]
        first = seen[met]
        seen[met] += times[met]
        for place, at in enumerate(met):
            for occurrence in range(first[place], min(seen[at], occurrences)):
                total[occurrence] += weight[place]
                number[occurrence] += 1
    return total / number


@pytest.mark.parametrize("share", [0.01, 0.04])
def test_an_item_that_joins_late_is_right_after_a_few_occurrences(share):
    """The first gap is provisional: if 0.95 of it were kept at each occurrence, it would be 300 times too large."""
    weight = weights_by_occurrence(share, before=20_000)
    assert weight[4] == pytest.approx(1.0, abs=0.2)
    assert weight[5:].tolist() == pytest.approx([1.0] * 55, abs=0.2)
    assert weight[49:].tolist() == pytest.approx([1.0] * 11, abs=0.05)


@pytest.mark.parametrize("before", [100, 20_000])
@pytest.mark.parametrize("rows", [64, 256, 1024])
def test_an_item_whose_first_occurrences_share_a_step_is_right(rows, before):
    """With all rows so far over c, an item with ten occurrences in its first step would weigh 80 times too much."""
    weight = weights_by_occurrence(0.04, before=before, seeds=1500, rows=rows)
    assert weight[5:].tolist() == pytest.approx([1.0] * 55, abs=0.2)
    assert weight[49:].tolist() == pytest.approx([1.0] * 11, abs=0.05)


@pytest.mark.parametrize("times", range(2, 12))
def test_the_first_step_of_an_item_is_at_most_a_little_above_its_own_rows(times):
    """(B/t)^(c-1) t + (1 - (B/t)^(c-1)) B over B is at most 1.11 from c = 5 on, at any t."""
    for before in (0, 10, 40, 100, 1000, 10**6):
        frequency = StreamingFrequency(2)
        frequency.clock += before
        frequency.observe(torch.tensor([0] * times + [1] * (50 - times)))
        chance = (50 / (50 + before)) ** (times - 1)
        expected = (chance * (50 + before) + (1 - chance) * 50) / times
        assert 1 / float(estimate(frequency)[0]) == pytest.approx(expected)
        assert expected * times / 50 <= (1.11 if times >= 5 else 2.0)


def test_no_bias_in_steady_state():
    weight = weights_by_occurrence(0.04, before=0, seeds=1000, occurrences=400)
    assert float(weight[200:].mean()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_gap_of_an_epoch_has_the_mean_of_the_gaps(count):
    """Over all places in an epoch of R rows, and one row a step: the mean weight of the first occurrence is R / c."""
    rows = 60
    found = []
    for seed in range(3000):
        first = int(np.random.default_rng(seed).permutation(rows)[:count].min())
        frequency = StreamingFrequency(2, rows=rows)
        frequency.clock += first
        frequency.observe(torch.zeros(1, dtype=torch.int64))
        found.append(1.0 / float(estimate(frequency)[0]))
    error = float(np.std(found)) / math.sqrt(len(found))
    assert float(np.mean(found)) == pytest.approx(rows / count, abs=4 * error)
    assert 4 * error < 0.12 * rows / count
    if count == 1:
        assert (rows + 1) / 2 < 0.6 * float(np.mean(found)), "the rows so far would be half of it"


def test_the_partition_is_right_in_the_first_epochs():
    """In-batch candidates of a Zipf catalog, weighed by the streaming estimate of a run that has just begun."""
    counts = (40.0 / torch.arange(1, 401).double()).clamp(min=1.0).round().long()
    items, rows = torch.repeat_interleave(torch.arange(400), counts), int(counts.sum())
    size, ratio = 50, []
    for seed in range(12):
        frequency, rng = StreamingFrequency(400, rows=rows), torch.Generator().manual_seed(seed)
        for epoch in range(3):
            order, total, steps = torch.randperm(rows, generator=rng), 0.0, rows // size
            for step in range(steps):
                batch = items[order[step * size : (step + 1) * size]]
                frequency.observe(batch)
                total += float((1.0 / (size * estimate(frequency)[batch])).sum()) / steps
            ratio.append((epoch, total / 400))
    by_epoch = [float(np.mean([value for at, value in ratio if at == epoch])) for epoch in range(3)]
    print(by_epoch)
    assert by_epoch == pytest.approx([1.0] * 3, abs=0.1)


def test_settings_out_of_range_are_refused():
    for options in ({"rate": 0.0}, {"rate": 1.5}, {"patience": 0.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            StreamingFrequency(3, **options)


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
    report = compare_frequencies(frequency, torch.bincount(batches.flatten()))
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
    assert compare_frequencies(fast, torch.bincount(batches.flatten())).total_variation > 2 * report.total_variation


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
    # The second occurrence replaces the first gap. Both of item 2 are in the last 4 of 8 rows: by chance in half of all
    # cases, so the rows are taken for (8 + 4) / 2.
    assert estimate(frequency).tolist()[:3] == pytest.approx([1 / 4, 1 / 4, 2 / 6])
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


@pytest.mark.parametrize("hash_keys", [False, True])
def test_the_state_resumes_in_the_middle_of_a_stream(hash_keys):
    """Also from a checkpoint of a version that stored hash keys."""
    batches = stream(zipf(30), 40, 8)
    whole = StreamingFrequency(30)
    for batch in batches[:20]:
        whole.observe(batch)
    state = copy.deepcopy(whole.state_dict())
    if hash_keys:
        state["keys"] = torch.tensor([7])
        del state["gaps"]
        whole.gaps = torch.isfinite(whole.gap).double() / whole.rate
    resumed = StreamingFrequency(30)
    resumed.load_state_dict(state)
    for batch in batches[20:]:
        whole.observe(batch)
        resumed.observe(batch)
    assert torch.equal(estimate(whole), estimate(resumed))
    assert float(resumed.clock) == 320


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
