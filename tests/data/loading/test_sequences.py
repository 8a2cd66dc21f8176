"""Batches of whole sequences: every row once, in windows that see only their own rows; resumable."""

import numpy as np
import polars as pl
import pytest
import torch

from twotower.data import Interactions, SequenceBatches
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError


@pytest.fixture(scope="module")
def data():
    """Queries with 1 to 40 rows, whose items encode their query and position."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 41, 30)
    return Interactions.from_frame(
        pl.DataFrame(
            {
                "user_id": np.repeat(np.arange(30), sizes),
                "item_id": np.concatenate([query * 100 + np.arange(size) for query, size in enumerate(sizes)]),
                "timestamp": np.concatenate([np.arange(size) for size in sizes]),
                "weight": rng.random(int(sizes.sum())).astype(np.float32),
            }
        )
    )


def epoch_of(batches):
    return list(iter(batches))


def test_every_row_is_trained_once_per_epoch(data):
    batches = SequenceBatches(data, 1, history_length=6, seed=3)  # one window per batch: none is left out
    rows = torch.cat([batch.rows for batch in epoch_of(batches)])
    assert sorted(rows.tolist()) == list(range(len(data)))


def test_a_row_sees_only_earlier_rows_of_its_window(data):
    batches = SequenceBatches(data, 60, history_length=6, seed=3)
    codes = np.asarray(data.item_codes)
    for batch in epoch_of(batches):
        packed = batch.sequences
        assert len(batch) == len(packed.rows) == len(batch.items)
        at, inputs = 0, packed.tokens
        for sequences, longest in packed.shapes:
            assert longest <= 7
            at += sequences * longest
        assert at == len(inputs)
        for row, place, item, query, weight in zip(
            batch.rows.tolist(), packed.rows.tolist(), batch.items.tolist(), batch.queries.tolist(), batch.weights,
            strict=True,
        ):  # fmt: skip
            before = int(packed.positions[place])
            seen = inputs[place - before : place + 1].tolist()
            assert seen == [-1, *codes[row - before : row]]
            assert data.offsets[query] <= row - before and row < data.offsets[query + 1]
            assert item == codes[row] and float(weight) == float(data.weights[row])


def test_cuts_move_from_epoch_to_epoch(data):
    batches = SequenceBatches(data, 60, history_length=6, seed=3)
    numbers = np.arange(batches.num_windows)
    queries, starts, lengths = batches.windows(numbers, 0)
    assert (lengths >= 1).all() and (lengths <= 7).all()
    assert np.array_equal(np.bincount(queries, lengths), np.diff(data.offsets))
    assert np.array_equal(starts[1:], (starts + lengths)[:-1])  # windows are adjacent
    other = batches.windows(numbers, 1)
    assert np.array_equal(other[0], queries) and not np.array_equal(other[1], starts)
    # Over many epochs every cut occurs that the number of windows allows.
    longest = int(np.argmax(np.diff(data.offsets)))
    size = int(np.diff(data.offsets)[longest])
    first = numbers[queries == longest][:1]
    cuts = [int(batches.windows(first, epoch)[2][0]) for epoch in range(300)]
    assert set(cuts) == set(range(size - 7 * (-(-size // 7) - 1), 8)) and len(set(cuts)) > 1


def test_resumes_in_the_middle_of_an_epoch(data):
    def fresh():
        return SequenceBatches(data, 40, history_length=6, seed=1)

    batches = fresh()
    whole = [batch.rows.tolist() for batch in batches] + [batch.rows.tolist() for batch in batches]
    first = fresh()
    iterator = iter(first)
    part = [next(iterator).rows.tolist() for _ in range(3)]
    again = fresh()
    again.load_state_dict(first.state_dict())
    rest = [batch.rows.tolist() for batch in again] + [batch.rows.tolist() for batch in again]
    assert part + rest == whole
    assert whole[: len(again)] != whole[len(again) :]
    with pytest.raises(InputError, match="history_length 6, but here it is 5"):
        SequenceBatches(data, 40, history_length=5).load_state_dict({**first.state_dict(), "windows_per_batch": 8})


def test_prepared_data_gives_the_same_batches(data, tmp_path):
    data.save(tmp_path / "prepared")
    mapped = Interactions.open(tmp_path / "prepared")
    assert isinstance(mapped.item_codes, np.memmap)
    for one, other in zip(SequenceBatches(data, 50, history_length=9), SequenceBatches(mapped, 50, history_length=9),
                          strict=True):  # fmt: skip
        assert torch.equal(one.items, other.items) and torch.equal(one.sequences.tokens, other.sequences.tokens)


def test_batches_have_the_requested_size_on_average(data):
    batches = SequenceBatches(data, 60, history_length=6)
    sizes = [len(batch) for batch in batches]
    assert 45 < np.mean(sizes) < 75
    one = SequenceBatches(data, 10**6, history_length=6)
    assert len(one) == 1 and len(next(iter(one))) == len(data)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"history_length": 0}, {"seed": -1}])
def test_sizes_out_of_range(data, settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))}: .* expected at least"):
        SequenceBatches(data, **{"batch_size": 8, "history_length": 4, **settings})


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_rows_of_all_ranks_match_those_of_one_process_in_order(data, size):
    alone = SequenceBatches(data, 64, history_length=6, seed=2)
    ranks = [
        SequenceBatches(data, 64, history_length=6, seed=2, ranks=Communicator(rank, size)) for rank in range(size)
    ]
    assert {len(one) for one in ranks} == {len(alone)}
    for whole, *own in zip(alone, *ranks, strict=True):
        for name in ("rows", "queries", "items"):
            assert torch.equal(torch.cat([getattr(part, name) for part in own]), getattr(whole, name)), name
        sizes = [len(part) for part in own]
        assert {part.sizes for part in own} == {tuple(sizes)} and {part.total for part in own} == {len(whole)}
        assert max(sizes) - min(sizes) <= 2 * 7, "by rows, as nearly as whole windows of 7 allow"
        assert {part.sequences.windows for part in own} == {whole.sequences.windows}
        for part in own:
            packed = part.sequences
            assert len(packed.tokens) == sum(a * b for a, b in packed.shapes) and len(packed.rows) == len(part)
            place = packed.positions[packed.rows]
            assert torch.equal(packed.tokens[packed.rows][place > 0], part.items[:-1][place[1:] > 0])
    few = [one.batch(np.array([3]), 0) for one in ranks]
    assert sorted(len(part) > 0 for part in few) == [False] * (size - 1) + [True]
