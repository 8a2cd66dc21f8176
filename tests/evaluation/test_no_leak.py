"""Tests that a test query's history contains exactly what came before it: every split against plain loops."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data import Interactions, by_time, held_out_queries, leave_last_out
from twotower.errors import InputError


@st.composite
def rows_in_time(draw):
    """Draw (query, item, time) rows with few queries, repeats, and several rows with the same timestamp."""
    count = draw(st.integers(20, 60))
    column = lambda high: st.lists(st.integers(0, high), min_size=count, max_size=count)  # noqa: E731
    least = [(0, 0, 3), (0, 1, 9), (0, 2, 15)]  # without two items and a query of three rows nothing is held out
    return least + list(zip(draw(column(5)), draw(column(12)), draw(column(40)), strict=True))


def read(rows):
    query, item, time = zip(*rows, strict=True)
    return Interactions.from_frame(pl.DataFrame({"user_id": query, "item_id": item, "timestamp": time}))


def lines(data):
    """Return the (time, item) pairs of each query, in stored order."""
    times, items = np.asarray(data.timestamps), data.items.decode(data.item_codes).to_list()
    ids = data.queries.ids.to_list()
    cut = zip(data.offsets[:-1], data.offsets[1:], strict=True)
    return {ids[q]: [(int(times[i]), items[i]) for i in range(a, b)] for q, (a, b) in enumerate(cut)}


def questions(data, holdout):
    """Return for each holdout query its history, its targets and its timestamp."""
    ids, names = data.queries.ids.to_list(), data.items.ids.to_list()
    for e, query in enumerate(holdout.queries):
        history = holdout.history_items[holdout.history_offsets[e] : holdout.history_offsets[e + 1]]
        targets = holdout.target_items[holdout.target_offsets[e] : holdout.target_offsets[e + 1]]
        yield ids[query], [names[j] for j in history], [names[j] for j in targets], int(holdout.query_times[e])


def holdouts(split):
    return [holdout for holdout in (split.validation, split.test) if len(holdout)]


@settings(max_examples=30, deadline=None)
@given(rows_in_time())
def test_by_time_leaks_nothing_of_the_future(rows):
    data = read(rows)
    try:
        split = by_time(data, validation=0.2, test=0.3)
    except InputError:  # nothing held out: too few distinct timestamps
        return
    everything, train = lines(data), lines(split.train)
    trained = [time for row in train.values() for time, _ in row]
    for holdout in holdouts(split):
        first = min(time for *_, time in questions(data, holdout))
        assert max(trained) < first  # of any query
        cut = split.settings["cuts"][0 if holdout is split.validation else 1]
        for query, history, targets, time in questions(data, holdout):
            before = [item for stamp, item in everything[query] if stamp < cut]
            assert history == before
            assert cut <= time and targets
            after = [item for stamp, item in everything[query] if stamp >= cut]
            assert set(targets) <= set(after)
    # A test target is in no training row or validation target of the same query and timestamp.
    assert len(split.train) == sum(time < split.settings["cuts"][0] for _, _, time in
                                   ((q, i, t) for q, row in everything.items() for t, i in row))  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(rows_in_time())
def test_leave_last_out_history_is_what_came_before(rows):
    data = read(rows)
    split = leave_last_out(data)
    everything, train = lines(data), lines(split.train)
    long = {query for query, row in everything.items() if len(row) >= 3}
    queries = {query: (history, targets, time) for query, history, targets, time in questions(data, split.test)}
    checked = {query: (history, targets) for query, history, targets, _ in questions(data, split.validation)}
    assert set(queries) == set(checked) == long
    for query in long:
        row = everything[query]
        history, targets, time = queries[query]
        assert targets == [row[-1][1]] and time == row[-1][0]
        assert history == [item for _, item in row[:-1]]
        assert all(stamp <= time for stamp, _ in row[:-1])
        assert checked[query] == ([item for _, item in row[:-2]], [row[-2][1]])
        assert train[query] == row[:-2]  # neither the validation row nor the test row
    for query in set(everything) - long:
        assert train[query] == everything[query]


@settings(max_examples=20, deadline=None)
@given(rows_in_time())
def test_held_out_queries_are_not_in_training(rows):
    data = read(rows)
    try:
        split = held_out_queries(data, validation=0.3, test=0.3)
    except InputError:
        return
    everything, train = lines(data), lines(split.train)
    for holdout in holdouts(split):
        for query, history, targets, _ in questions(data, holdout):
            assert not train[query]
            items = [item for _, item in everything[query]]
            assert history == items[: len(history)]
            assert set(targets) <= set(items[len(history) :])


def test_leave_last_out_warns_and_names_the_alternative(planted_data):
    account = str(leave_last_out(planted_data).account)
    assert "leak through time" in account and "data.split=time avoids this" in account
    assert "leak" not in str(by_time(planted_data).account)


@pytest.mark.parametrize("leak", [0, 1])
def test_the_leak_test_can_fail(planted_data, leak):
    """With the target appended to the history, the comparison in the tests above fails."""
    split = leave_last_out(planted_data)
    everything = lines(planted_data)
    query, history, targets, _ = next(questions(planted_data, split.test))
    assert (history + targets[:leak] == [item for _, item in everything[query][:-1]]) == (leak == 0)
