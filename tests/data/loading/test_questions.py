"""Batches of questions: made like those of the evaluation, counted as they are drawn, resumable, shared by ranks."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch

from twotower.data import Interactions, KnownPositives
from twotower.data.loading.histories import first_at
from twotower.data.loading.questions import QuestionBatches, QuestionRule, first_occurrences
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.negatives import CountedFrequency, InBatch, Pool

DAY = 86_400_000_000
HORIZON = QuestionRule("horizon", 5 * DAY)
SET = QuestionRule("set", share=0.3)
ALL = QuestionRule("set", share=1.0)


@pytest.fixture(scope="module")
def data():
    """Queries of 1 to 12 rows over 40 days with several rows a day, items drawn by popularity, some of them twice."""
    rng = np.random.default_rng(1)
    rows = []
    for query in range(40):
        size = int(rng.integers(1, 13))
        items = rng.choice(15, size, p=np.arange(15, 0, -1) / 120)
        rows += [
            (query, int(item), int(day) * 86_400) for item, day in zip(items, rng.integers(0, 40, size), strict=True)
        ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return Interactions.from_frame(frame.with_columns(pl.col("timestamp") + 1_600_000_000))


def epochs(batches, count):
    for epoch in range(count):
        batches.set_epoch(epoch)
        yield from batches


def by_question(batch):
    for question, query in enumerate(batch.asked.queries.tolist()):
        rows = batch.rows[batch.asked.of == question].tolist()
        yield query, rows, [item for item in batch.history[question].tolist() if item >= 0]


def test_a_horizon_question_is_the_history_before_a_cut_and_all_new_items_after_it(data):
    batches = QuestionBatches(data, 20, HORIZON, history_length=20)
    times, items = np.asarray(data.timestamps), np.asarray(data.item_codes)
    asked = 0
    for batch in epochs(batches, 3):
        for query, rows, history in by_question(batch):
            start, end = data.offsets[query], data.offsets[query + 1]
            cut = times[rows[0]]
            assert history == items[start:end][times[start:end] < cut].tolist()
            seen, expected = set(), []
            for row in range(start, end):
                if items[row] not in seen and cut <= times[row] < cut + 5 * DAY:
                    expected.append(row)
                seen.add(items[row])
            assert rows == expected and history
            asked += 1
    assert asked > 50


def test_a_set_question_divides_the_items_of_a_query(data):
    batches = QuestionBatches(data, 20, SET, history_length=20)
    items = np.asarray(data.item_codes)
    for batch in epochs(batches, 3):
        for query, rows, history in by_question(batch):
            own = items[data.offsets[query] : data.offsets[query + 1]].tolist()
            assert history and rows
            assert Counter(items[rows].tolist() + history) == Counter(set(own))


def test_a_set_history_has_the_newest_items_that_fit(data):
    whole = QuestionBatches(data, 20, SET, history_length=20)
    short = QuestionBatches(data, 20, SET, history_length=2)
    for one, other in zip(whole, short, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.history[:, -2:], other.history)


def test_all_items_of_a_query_are_targets_at_a_share_of_one(data):
    """Also of queries with a single row, which have nothing to divide."""
    batches = QuestionBatches(data, 20, ALL)
    items, asked = np.asarray(data.item_codes), []
    assert (np.diff(data.offsets) == 1).any()
    whole = batches.batch(np.arange(len(batches.queries)))
    for query, rows, history in by_question(whole):
        assert not history
        assert sorted(items[rows]) == sorted(set(items[data.offsets[query] : data.offsets[query + 1]].tolist()))
        asked.append(query)
    assert asked == np.flatnonzero(np.diff(data.offsets)).tolist()
    counts = np.bincount(whole.items.numpy(), minlength=data.num_items)
    assert batches.item_counts() == pytest.approx(counts) and batches.question_counts() == pytest.approx(counts)
    repeats = QuestionBatches(data, 20, QuestionRule("set", share=1.0, new_only=False))
    assert repeats.item_counts() == pytest.approx(data.item_counts())
    assert repeats.question_counts() == pytest.approx(counts)
    with pytest.raises(InputError, match="leaves no item for the history"):
        QuestionBatches(data, 20, ALL, history_length=5)


@pytest.mark.parametrize("rule", [HORIZON, SET, QuestionRule("horizon", 90 * DAY, new_only=False)])
@pytest.mark.parametrize("some", [False, True])
def test_items_appear_as_often_as_claimed(data, rule, some):
    rows = np.flatnonzero(np.random.default_rng(0).random(len(data)) < 0.6) if some else None
    batches = QuestionBatches(data, 10, rule, history_length=5, rows=rows)
    appeared, count, asked = np.zeros(data.num_items), 150, 0
    for batch in epochs(batches, count):
        appeared += np.bincount(batch.items.numpy(), minlength=data.num_items)
        asked += len(batch.asked.queries)
        assert rows is None or np.isin(batch.rows.numpy(), rows).all()
    expected = batches.item_counts() * asked / len(batches.queries)
    assert abs(appeared.sum() / expected.sum() - 1) < 0.04
    # Draws are of 0 or 1 rows per question for most items, so the variance is at most about the mean.
    off = (appeared - expected) / np.sqrt(np.maximum(expected, 1.0))
    assert (off**2).sum() < 2.0 * data.num_items
    # Counting rows, as for batches of single rows, is rejected.
    plain = np.bincount(np.asarray(data.item_codes), minlength=data.num_items).astype(float)
    wrong = plain * expected.sum() / plain.sum()
    assert (((appeared - wrong) ** 2) / np.maximum(wrong, 1.0)).sum() > 2.0 * data.num_items


@pytest.mark.parametrize("rule", [HORIZON, SET, ALL])
def test_in_batch_candidates_have_the_claimed_expected_count(data, rule):
    batches = QuestionBatches(data, 25, rule, history_length=0 if rule is ALL else 5)
    assert batches.questions_per_batch > 3 or len(batches) > 1
    batches.questions_per_batch = 8
    pool, plain = Pool(InBatch(CountedFrequency(batches))), Pool(InBatch(CountedFrequency(data)))
    known = KnownPositives(data)
    met, claimed, other, rows = (np.zeros(data.num_items) for _ in range(4))
    for batch in epochs(batches, 150):
        drawn = np.bincount(batch.items.numpy(), minlength=data.num_items)
        for query in batch.asked.queries.tolist():
            foreign = np.ones(data.num_items, dtype=bool)
            foreign[np.asarray(data.item_codes[data.offsets[query] : data.offsets[query + 1]])] = False
            met[foreign] += drawn[foreign]
            rows[foreign] += 1
        request = {"queries": batch.queries, "known_positives": known.pairs(batch.queries), "windows": batch.windows}
        for one, sums in ((pool, claimed), (plain, other)):
            found = one.draw(batch.items, **request)
            kappa = np.full(data.num_items, np.nan)
            kappa[found.items.numpy()] = found.log_expected_count.exp().numpy()
            sums[:] = np.where(np.isnan(kappa), sums, kappa)
    mean = met / rows
    error = np.sqrt(mean / (rows / 8))  # the questions of a batch share its rows: count batches
    assert (np.abs(mean - claimed) < 4 * error + 0.01).all()
    assert (np.abs(mean - other) > 4 * error + 0.01).any()


def test_in_batch_candidates_without_known_positives_are_refused(data):
    batch = next(iter(QuestionBatches(data, 25, HORIZON)))
    with pytest.raises(InputError, match="known positives"):
        Pool(InBatch(CountedFrequency(data))).draw(batch.items, windows=batch.windows)


@pytest.mark.parametrize("rule", [HORIZON, SET])
def test_batches_depend_on_seed_and_epoch_alone_and_resume_in_the_middle(data, rule):
    def take(batches, count):
        found = iter(batches)
        return [next(found) for _ in range(count)]

    one, other = (QuestionBatches(data, 10, rule, history_length=4, seed=3) for _ in range(2))
    expected = [*epochs(one, 2)]
    first = take(other, 2)
    resumed = QuestionBatches(data, 10, rule, history_length=4, seed=3)
    resumed.load_state_dict(other.state_dict())
    rest = [*resumed, *resumed]
    for a, b in zip(expected, first + rest, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.history, b.history)
    again = [batch.rows.tolist() for batch in epochs(QuestionBatches(data, 10, rule, seed=4), 1)]
    assert again != [batch.rows.tolist() for batch in expected[: len(again)]]
    with pytest.raises(InputError, match="questions_per_batch"):
        QuestionBatches(data, 3, rule, history_length=4, seed=3).load_state_dict(
            {**other.state_dict(), "questions_per_batch": 99}
        )


@pytest.mark.parametrize("rule", [HORIZON, SET])
def test_ranks_divide_the_questions_of_a_batch(data, rule):
    whole = QuestionBatches(data, 30, rule, history_length=4)
    parts = [QuestionBatches(data, 30, rule, history_length=4, ranks=Communicator(rank, 3)) for rank in range(3)]
    for one, *some in zip(whole, *parts, strict=True):
        assert torch.equal(one.rows, torch.cat([part.rows for part in some]))
        assert torch.equal(one.history, torch.cat([part.history for part in some]))
        assert {part.total for part in some} == {len(one)}
        assert [len(part) for part in some] == list(some[0].sizes)
        assert all(part.windows == one.windows for part in some)


def test_a_question_with_m_targets_weighs_m_to_the_a(data):
    for power in (0.0, 0.5, 1.0):
        batch = next(iter(QuestionBatches(data, 30, QuestionRule("set", weight=power))))
        sums = torch.zeros(len(batch.asked.queries)).index_add_(0, batch.asked.of, batch.weights)
        counts = torch.bincount(batch.asked.of)
        assert torch.allclose(sums, counts.float() ** power)


def test_what_cannot_be_asked_is_refused(data):
    unordered = Interactions.from_frame(pl.DataFrame({"user_id": [1, 1, 2], "item_id": [1, 2, 1]}))
    with pytest.raises(InputError, match="needs timestamps"):
        QuestionBatches(unordered, 10, HORIZON)
    single = Interactions.from_frame(pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [5, 6]}))
    for rule in (HORIZON, SET):
        with pytest.raises(InputError, match="no query has rows"):
            QuestionBatches(single, 10, rule)
    with pytest.raises(InputError, match="horizon 0"):
        QuestionBatches(data, 10, QuestionRule("horizon", 0))


def test_first_occurrences_are_found_in_blocks(data, monkeypatch):
    expected = first_occurrences(data)
    seen = set()
    for row, (query, item) in enumerate(zip(data.query_codes(), data.item_codes, strict=True)):
        assert expected[row] == ((query, item) not in seen)
        seen.add((query, item))
    monkeypatch.setattr("twotower.data.loading.questions.BLOCK", 7)
    assert np.array_equal(first_occurrences(data), expected)


def test_bisection_finds_the_first_place(data):
    times = np.array([1, 3, 3, 7, 2, 2, 9])
    first, last = np.array([0, 0, 0, 4, 4]), np.array([4, 4, 4, 7, 4])
    assert first_at(times, first, last, np.array([3, 4, 8, 9, 1])).tolist() == [1, 3, 4, 6, 4]


@pytest.mark.parametrize(
    "rule",
    [
        QuestionRule("horizon", 15 * DAY, new_only=False),
        QuestionRule("set", share=0.3, new_only=False),
        QuestionRule("set", share=0.8, new_only=False),
    ],
)
def test_the_questions_that_have_an_item_are_counted_once_with_repeats(data, rule):
    """Without duplicates a candidate's inclusion counts questions: an item that a question has twice is in one."""
    batches = QuestionBatches(data, 20, rule, seed=1)
    everything = np.arange(len(batches.queries))
    count = 500
    found = np.zeros((count, data.num_items))
    rows = np.zeros(data.num_items)
    for epoch in range(count):
        batch = batches.batch(everything, epoch)
        pairs = np.unique(np.stack([batch.asked.of.numpy(), batch.items.numpy()]), axis=1)
        found[epoch] = np.bincount(pairs[1], minlength=data.num_items)
        rows += np.bincount(batch.items.numpy(), minlength=data.num_items) / count
    expected = batches.question_counts()
    error = found.std(0) / np.sqrt(count)
    assert (np.abs(found.mean(0) - expected) < 4.5 * error + 1e-9).all()
    assert (rows - found.mean(0) > 8 * error).any(), "some questions have an item twice"
    assert (batches.item_counts() >= expected - 1e-9).all()
    assert batch.windows.holding.of(torch.arange(3)).tolist() == pytest.approx(expected[:3].tolist())
    plain = QuestionBatches(data, 20, QuestionRule(rule.kind, rule.horizon, rule.share), seed=1)
    assert plain.batch(everything).windows.holding is None
    assert plain.question_counts() == pytest.approx(plain.item_counts())
