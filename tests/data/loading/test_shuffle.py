"""Prefetching: the order of the results, errors, and that no thread is left behind."""

import gc
import threading
import time

import numpy as np
import polars as pl
import pytest

from twotower.data import Interactions, TrainingBatches
from twotower.data.loading.shuffle import ahead


@pytest.fixture(autouse=True)
def _of_others() -> None:
    """Note the threads of earlier tests: those of interrupted training runs may not be collected yet."""
    BEFORE[:] = threading.enumerate()


BEFORE: list[threading.Thread] = []


def threads() -> list[str]:
    new = (thread for thread in threading.enumerate() if thread not in BEFORE)
    return [thread.name for thread in new if thread.name.startswith("batches")]


def waited(condition) -> bool:
    deadline = time.monotonic() + 200  # seconds; generous, because the machine may be busy
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_results_come_in_order_from_another_thread(depth: int) -> None:
    makers = set()

    def make(number: int) -> int:
        makers.add(threading.get_ident())
        return number * number

    assert list(ahead(make, 3, 20, depth=depth)) == [n * n for n in range(3, 20)]
    assert len(makers) == 1
    assert threading.get_ident() not in makers
    assert not threads()


def test_no_more_than_depth_results_are_made_ahead() -> None:
    made: list[int] = []
    numbers = ahead(lambda n: made.append(n) or n, 0, 100, depth=3)
    assert next(numbers) == 0
    assert waited(lambda: len(made) >= 3)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    assert next(numbers) == 1
    assert waited(lambda: len(made) == 4)
    numbers.close()


def test_an_error_is_raised_when_due_and_ends_the_thread() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("the disk is gone")
        return number

    numbers = ahead(make, 0, 10)
    assert [next(numbers), next(numbers)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(numbers)
    assert not threads()


def test_ctrl_c_in_the_consumer_or_a_dropped_iterator_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in ahead(lambda n: n, 0, 1000):
            assert threads()
            raise KeyboardInterrupt
    gc.collect()
    assert waited(lambda: not threads())
    numbers = ahead(lambda n: n, 0, 1000)
    next(numbers)
    del numbers
    gc.collect()
    assert waited(lambda: not threads())


def test_the_state_counts_batches_yielded_not_batches_made() -> None:
    rng = np.random.default_rng(0)
    data = Interactions.from_frame(pl.DataFrame({"user": rng.integers(0, 9, 200), "item": rng.integers(0, 30, 200)}))
    batches = TrainingBatches(data, 10, history_length=3, seed=1)
    expected = [(batch.rows.tolist(), batch.history.tolist()) for batch in batches]
    batches = TrainingBatches(data, 10, history_length=3, seed=1)
    running = iter(batches)
    for given in range(1, 7):
        next(running)
        time.sleep(0.01)  # time to make more
        assert batches.state_dict()["position"] == given
    state = batches.state_dict()
    running.close()
    resumed = TrainingBatches(data, 10, history_length=3, seed=77)
    resumed.load_state_dict(state)
    assert [(batch.rows.tolist(), batch.history.tolist()) for batch in resumed] == expected[6:]
    assert not threads()


def test_an_error_of_the_data_reaches_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Interactions.from_frame(pl.DataFrame({"user": [1, 1, 2, 2], "item": [1, 2, 3, 4]}))
    batches = TrainingBatches(data, 2)

    def broken(rows: object) -> None:
        raise OSError(f"cannot read {rows}")

    monkeypatch.setattr(batches, "batch", broken)
    with pytest.raises(OSError, match="cannot read"):
        next(iter(batches))
    assert batches.state_dict()["position"] == 0
    assert not threads()
