"""Histories, the shuffle and the batches, compared with plain loops."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from twotower.data import Account, Interactions, TrainingBatches, gather_histories, ragged_histories
from twotower.data.loading.histories import take_ranges
from twotower.data.loading.shuffle import Shuffle
from twotower.errors import InputError


def interactions(n: int, queries: int = 9, seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    return Interactions.from_frame(
        pl.DataFrame(
            {
                "user": rng.integers(0, queries, n),
                "item": rng.integers(0, 30, n),
                "weight": rng.random(n),
                "market": rng.integers(0, 2, n),
            }
        )
    )


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 10**6))
def test_histories_match_the_loops(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 5, 6))])
    items = rng.integers(0, 99, offsets[-1]).astype(np.int32)
    queries = rng.integers(0, 6, 8)
    ends = np.array([rng.integers(offsets[q], offsets[q + 1] + 1) for q in queries])
    expected = []
    for q, end in zip(queries, ends, strict=True):
        line = items[offsets[q] : end].tolist()[-length:] if length else []
        expected.append([-1] * (length - len(line)) + line)
    found = gather_histories(offsets, items, queries, ends, length)
    assert (found.shape, found.dtype) == ((8, length), np.int64)
    assert found.tolist() == expected
    whole = gather_histories(offsets, items, queries, offsets[queries + 1], length)
    assert ragged_histories(offsets, items, queries, length).tolist() == whole.tolist()


def test_ranges_are_concatenated() -> None:
    numbers, offsets = take_ranges(np.array([3, 9, 1]), np.array([5, 9, 4]))
    assert (numbers.tolist(), offsets.tolist()) == ([3, 4, 1, 2, 3], [0, 2, 2, 5])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 50))
def test_the_shuffle_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(Shuffle(n, seed, epoch)(np.arange(n)).tolist()) == list(range(n))


def test_the_shuffle_at_a_hundred_million_stays_inside_without_repeats() -> None:
    found = Shuffle(100_000_001, 1, 2)(np.arange(50_000_000, 50_200_000))
    assert found.min() >= 0
    assert found.max() < 100_000_001
    assert len(np.unique(found)) == len(found)


def pairs_by_chance(n: int, shuffle: Callable[[int], NDArray[np.int64]], epochs: int = 4000) -> float:
    """Compute the chi-square p-value of where positions 2 and 3 go, in quarters of the range, over many epochs."""
    cells = min(n, 4)
    quarter = np.arange(n) * cells // n
    sizes = np.bincount(quarter, minlength=cells)
    pairs = np.zeros((cells, cells))
    for epoch in range(epochs):
        a, b = quarter[shuffle(epoch)]
        pairs[a, b] += 1
    expected = epochs * sizes[:, None] * (sizes[None, :] - np.eye(cells)) / (n * (n - 1))
    return float(stats.chisquare(pairs[expected > 0], expected[expected > 0]).pvalue)


@pytest.mark.parametrize("n", [7, 64, 1000])
def test_pairs_of_the_shuffle_are_uniform(n: int) -> None:
    at = np.array([2, 3])
    assert pairs_by_chance(n, lambda epoch: Shuffle(n, 11, epoch)(at)) > 1e-4
    rng = np.random.default_rng(0)
    assert pairs_by_chance(n, lambda _: (at + rng.integers(n)) % n) < 1e-4, "the test must notice a mere rotation"


def test_an_order_differs_between_epochs_and_seeds() -> None:
    orders = {tuple(Shuffle(50, seed, epoch)(np.arange(50))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_batches_have_every_row_once_with_its_history() -> None:
    data = interactions(203)
    batches = TrainingBatches(data, 20, history_length=4, seed=5, drop_last=False)
    assert len(batches) == 11
    codes, rows = data.query_codes(), []
    assert data.weights is not None
    assert data.groups is not None
    for batch in batches:
        rows += batch.rows.tolist()
        assert batch.weights is not None
        assert batch.groups is not None
        assert {t.dtype for t in (batch.rows, batch.queries, batch.items, batch.history, batch.groups)} == {torch.int64}
        for b, row in enumerate(batch.rows.tolist()):
            past = data.item_codes[data.offsets[codes[row]] : row].tolist()[-4:]
            assert batch.queries[b] == codes[row]
            assert batch.items[b] == data.item_codes[row]
            assert batch.history[b].tolist() == [-1] * (4 - len(past)) + past
            assert batch.weights[b] == data.weights[row]
            assert batch.groups[b] == data.groups[row]
    assert Counter(rows) == Counter(range(203))


def test_the_last_batch_is_dropped_or_not_and_few_rows_are_one_batch() -> None:
    data = interactions(50)
    assert [len(b) for b in TrainingBatches(data, 20)] == [20, 20]
    assert [len(b) for b in TrainingBatches(data, 20, drop_last=False)] == [20, 20, 10]
    assert [len(b) for b in TrainingBatches(data, 999)] == [50]
    assert next(iter(TrainingBatches(data, 7))).history.shape == (7, 0)


def test_resuming_mid_epoch_gives_the_same_rows() -> None:
    data = interactions(100)
    whole = TrainingBatches(data, 8, seed=3)
    expected = [b.rows.tolist() for _ in range(3) for b in whole]
    first = TrainingBatches(data, 8, seed=3)
    got, state = [], {}
    for _ in range(2):
        for batch in first:
            got.append(batch.rows.tolist())
            state = first.state_dict()
            if len(got) == 17:
                break
    second = TrainingBatches(data, 8, seed=99)
    second.load_state_dict(state)
    second.set_epoch(1)
    for _ in range(2):
        got += [b.rows.tolist() for b in second]
    assert got == expected
    assert expected[:12] != expected[12:24]


def test_set_epoch_chooses_the_order() -> None:
    data = interactions(100)
    batches = TrainingBatches(data, 100)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append(next(iter(batches)).rows.tolist())
        batches.set_epoch(7)
    assert orders[0] == orders[2] != orders[1]


def test_the_global_random_state_is_not_used() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    list(TrainingBatches(interactions(100), 8))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_a_batch_moves_to_a_device() -> None:
    moved = next(iter(TrainingBatches(interactions(40), 8, history_length=2))).to("meta")
    assert moved.history.device.type == moved.weights.device.type == "meta"  # type: ignore[union-attr]


def test_states_and_sizes_that_do_not_fit_are_refused() -> None:
    data = interactions(40)
    for options in ({"batch_size": 0}, {"batch_size": 4, "history_length": -1}, {"batch_size": 4, "seed": -1}):
        with pytest.raises(InputError, match="expected at least"):
            TrainingBatches(data, **options)
    with pytest.raises(InputError, match="no interactions"):
        TrainingBatches(data.select(np.zeros(len(data), dtype=bool)), 4)
    with pytest.raises(InputError, match="batch_size 4, but here it is 5"):
        TrainingBatches(data, 5).load_state_dict(TrainingBatches(data, 4).state_dict())


def test_account_prints_in_columns_and_survives_json() -> None:
    account = Account()
    account.add("rows read", 12_345, "a.csv")
    account.add("said")
    assert str(account) == "rows read  12,345  a.csv\nsaid"
    assert Account.from_dict(account.to_dict()) == account
    assert (account.count("rows read"), account.count("none")) == (12_345, 0)
