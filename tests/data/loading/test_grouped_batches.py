"""Batches built within groups: one group each, every full batch once per epoch, resumable."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch

from twotower.data import GroupedBatches, Interactions, TrainingBatches
from twotower.errors import InputError

SIZES = (53, 7, 30, 16)  # with batches of 8: 6, one of 7 rows, 3 and 2


def interactions(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    market = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(market)
    return Interactions.from_frame(
        pl.DataFrame({"user": rng.integers(0, 12, n), "item": rng.integers(0, 20, n), "market": market})
    )


def batches(data: Interactions, **options: int) -> GroupedBatches:
    return GroupedBatches(TrainingBatches(data, 8, **options))


def test_each_batch_has_one_group_and_every_full_batch_comes_once() -> None:
    data = interactions()
    assert data.groups is not None
    groups = np.asarray(data.groups)
    found = batches(data, history_length=3)
    sizes = np.bincount(groups)
    full = {group: max(int(size) // 8, 1) for group, size in enumerate(sizes)}
    assert sorted(full.values()) == [1, 2, 3, 6]
    for epoch in range(4):
        rows: list[int] = []
        count: Counter[int] = Counter()
        for batch in found:
            assert batch.group is not None
            size = min(8, int(sizes[batch.group]))
            assert len(batch) == size
            assert set(groups[batch.rows.numpy()].tolist()) == {batch.group}
            assert batch.groups is not None
            assert batch.groups.tolist() == [batch.group] * size
            assert batch.items.tolist() == data.item_codes[batch.rows.numpy()].tolist()
            rows += batch.rows.tolist()
            count[batch.group] += 1
        assert dict(count) == full, epoch
        assert len(rows) == len(set(rows)) == 8 * 11 + 7
    assert len(found) == 12


def test_over_many_epochs_every_row_of_a_group_is_drawn_equally_often() -> None:
    """The rows of the last, incomplete batch, which is left out, change with the epoch, so that all rows are used."""
    data = interactions()
    found = batches(data)
    seen = np.zeros(len(data))
    for _ in range(60):
        for batch in found:
            seen[batch.rows.numpy()] += 1
    groups = np.asarray(data.groups)
    for group, size in enumerate(np.bincount(groups)):
        share = max((size // 8) * 8, min(size, 8)) / size
        of_group = seen[groups == group] / 60
        assert abs(of_group - share).max() < 5 * np.sqrt(share * (1 - share) / 60) + 1e-12


def test_groups_are_mixed_within_an_epoch_and_the_order_changes() -> None:
    found = batches(interactions())
    orders = [[batch.group for batch in found] for _ in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert all(order != sorted(order) for order in orders)  # type: ignore[type-var]
    first = batches(interactions(), seed=1)
    assert [b.rows.tolist() for b in first] != [b.rows.tolist() for b in batches(interactions(), seed=2)]


def test_resuming_mid_epoch_gives_the_same_batches() -> None:
    data = interactions()
    whole = batches(data, seed=5)
    expected = [(b.group, b.rows.tolist()) for _ in range(3) for b in whole]
    first, got, state = batches(data, seed=5), [], {}
    for _ in range(2):
        for batch in first:
            got.append((batch.group, batch.rows.tolist()))
            state = first.state_dict()
            if len(got) == 15:
                break
    second = batches(data, seed=99)
    second.load_state_dict(state)
    second.set_epoch(1)
    for _ in range(2):
        got += [(b.group, b.rows.tolist()) for b in second]
    assert got == expected


def test_data_that_cannot_be_grouped_is_refused() -> None:
    data = interactions()
    with pytest.raises(InputError, match="every row is alone in its group"):
        GroupedBatches(TrainingBatches(interactions((1, 1, 1)), 2), in_batch_alone=True)
    plain = Interactions.from_frame(pl.DataFrame({"user": [1, 2, 2], "item": [1, 2, 3]}))
    with pytest.raises(InputError, match="need a group column"):
        GroupedBatches(TrainingBatches(plain, 2))
    with pytest.raises(InputError, match="batch_size"):
        batches(data).load_state_dict(TrainingBatches(data, 4).state_dict())


def test_a_grouped_batch_keeps_its_group_on_a_device() -> None:
    moved = next(iter(batches(interactions()))).to(torch.device("meta"))
    assert isinstance(moved.group, int)
    assert moved.rows.device.type == "meta"


def test_rows_that_are_alone_in_their_group_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    data = interactions((1, 20, 1, 0, 3))
    found = GroupedBatches(TrainingBatches(data, 8), in_batch_alone=True)
    assert found.left_out == 2
    assert "2 rows are not used for training" in caplog.text
    assert sorted(len(batch) for batch in found) == [3, 8, 8]
    caplog.clear()
    found = batches(data)
    assert found.left_out == 0
    assert caplog.text == ""
    assert sorted(len(batch) for batch in found) == [1, 1, 3, 8, 8]
