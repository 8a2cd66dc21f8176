"""Types of events: their weights, their held-out rows, and the counts of candidates by type."""

from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from twotower.data import (
    Interactions,
    by_time,
    from_parts,
    held_out_queries,
    leave_last_out,
    random_rows,
)
from twotower.data.events import with_events
from twotower.data.impressions import with_impressions
from twotower.data.query_text import with_query_text
from twotower.errors import InputError

WEIGHTS = {"click": 1.0, "cart": 3.0, "purchase": 10.0}


def log(seed=0, rows=2400, queries=60, items=20):
    """Make rows whose items depend on the type of event, in time order."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, rows, p=[0.7, 0.2, 0.1])
    popularity = np.stack([np.roll(1.0 / np.arange(1, items + 1), 6 * one) for one in range(3)])
    popularity /= popularity.sum(1, keepdims=True)
    item = np.array([rng.choice(items, p=popularity[one]) for one in kind])
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, queries, rows),
            "item_id": item,
            "timestamp": 1_700_000_000 + np.arange(rows) * 60,
            "event": np.array(list(WEIGHTS))[kind],
        }
    )


def read(frame, weights=WEIGHTS, held_out=None, **options):
    return with_events(
        Interactions.from_frame(frame, context=["event"], **options), "event", weights, held_out=held_out
    )


def test_the_weight_of_the_type_multiplies_the_weight_of_the_row():
    frame = log().with_columns(weight=pl.Series(np.random.default_rng(1).random(2400).round(3)))
    data, plain = read(frame), read(frame.drop("weight"))
    by_row = np.array([WEIGHTS[name] for name in data.context["event"]])
    assert data.weights == pytest.approx(np.asarray(Interactions.from_frame(frame).weights) * by_row)
    assert plain.weights == pytest.approx(by_row) and plain.weights.dtype == np.float32
    assert read(frame.drop("weight"), weights=None).weights is None
    assert data.account.count("events cart") == int((frame["event"] == "cart").sum())
    assert data.fingerprint == Interactions.from_frame(frame).fingerprint


def test_saved_rows_keep_their_types_and_are_not_weighed_twice(tmp_path):
    data = read(log(), held_out="cart")
    data.save(tmp_path / "saved")
    again = Interactions.open(tmp_path / "saved")
    assert again.event == data.event and np.array_equal(again.weights, data.weights)
    with pytest.raises(InputError, match="already weighted by their types, in .event.; pass the rows"):
        with_events(again, "event", WEIGHTS)


def test_integer_types_are_text():
    frame = log().with_columns(event=pl.col("event").replace_strict({"click": 1, "cart": 2, "purchase": 3}))
    data = read(frame, weights={"1": 1.0, "2": 2.0, "3": 4.0})
    assert data.context["event"].dtype == pl.String and set(data.weights.tolist()) == {1.0, 2.0, 4.0}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (pl.lit("refund"), {}, "'refund' in 2,400 rows; expected 'click', 'cart', 'purchase'; add its weight"),
        (pl.lit(None, pl.String), {}, "is empty in 2,400 rows"),
        (pl.col("event"), {"held_out": "refund"}, "held_out: 'refund'; expected a type in the data"),
    ],
)
def test_rows_that_cannot_be_weighed_are_rejected_in_one_line(change, options, message):
    with pytest.raises(InputError, match=message) as error:
        read(log().with_columns(event=change), **options)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"was not read .*context=\['event'\]"):
        with_events(Interactions.from_frame(log()), "event", WEIGHTS)


def held(data, holdout):
    """Return {(query id, type): target ids} of a holdout, and check that entries ascend by query and type."""
    ids, types = data.queries.decode(holdout.queries).to_list(), holdout.context["event"].to_list()
    assert list(zip(ids, types, strict=True)) == sorted(set(zip(ids, types, strict=True)))
    return {
        (ids[e], types[e]): set(
            data.items.decode(holdout.target_items[holdout.target_offsets[e] : holdout.target_offsets[e + 1]]).to_list()
        )
        for e in range(len(holdout))
    }


@pytest.mark.parametrize("held_out", [None, "purchase"])
def test_a_query_is_asked_once_for_each_type_of_its_held_out_rows(held_out):
    frame = log()
    data = read(frame, held_out=held_out)
    split = by_time(data, 0.1, 0.2)
    cuts = [cut // 1_000_000 for cut in split.settings["cuts"]]
    early = frame.filter(pl.col("timestamp") < cuts[0])
    users, items = set(early["user_id"]), set(early["item_id"])
    for holdout, low, high in ((split.validation, cuts[0], cuts[1]), (split.test, cuts[1], 2**60)):
        wanted = {}
        for user, item, time, kind in frame.rows():
            if low <= time < high and user in users and item in items and held_out in (None, kind):
                wanted.setdefault((user, kind), set()).add(item)
        assert held(data, holdout) == wanted
        assert holdout.event == "event"
        for e, (user, _) in enumerate(wanted and sorted(wanted)):
            history = holdout.history_items[holdout.history_offsets[e] : holdout.history_offsets[e + 1]]
            before = frame.filter((pl.col("user_id") == user) & (pl.col("timestamp") < low))["item_id"].to_list()
            assert data.items.decode(history).to_list() == before


def test_other_splits_ask_by_type_too():
    frame = log()
    data = read(frame)
    last = leave_last_out(data)
    rows = {u: k for u, _, _, k in frame.rows()}  # the type of each user's last row
    assert dict(held(data, last.test).keys()) == rows
    for split in (random_rows(data, 0.1, 0.2), held_out_queries(data, 0.2, 0.2)):
        found = held(data, split.test)
        kinds = {(u, i): set() for u, i, *_ in frame.rows()}
        for user, item, _, kind in frame.rows():
            kinds[user, item].add(kind)
        assert len({kind for _, kind in found}) == 3
        assert all(kind in kinds[user, item] for (user, kind), targets in found.items() for item in targets)
    parts = [read(part) for part in (frame.slice(0, 1600), frame.slice(1600, 400), frame.slice(2000))]
    given = from_parts(*parts)
    assert set(given.test.context["event"]) == set(WEIGHTS) and given.test.event == "event"
    assert given.train.weights is not None and given.data.event == data.event


def test_weights_are_kept_if_another_part_has_only_rows_of_weight_one():
    frame = log()
    clicks = frame.slice(1600).filter(pl.col("event") == "click")
    split = from_parts(read(frame.slice(0, 1600)), None, read(clicks))
    assert set(split.train.weights.tolist()) == set(WEIGHTS.values())


@pytest.mark.parametrize("value", [["a"], [1], b"\xff", timedelta(1)])
def test_types_and_texts_that_are_no_text_are_refused(tmp_path, value):
    frame = log(rows=4).with_columns(event=pl.Series([value] * 4))
    data = Interactions.from_frame(frame, context=["event"])
    with pytest.raises(InputError, match=r"data\.events: column 'event' has .*; expected text"):
        with_events(data, "event")
    with pytest.raises(InputError, match=r"data\.query_text: column 'event' has .*; expected text"):
        with_query_text(data, "event", texts_are_queries=False)
    frame.write_parquet(tmp_path / "shown.parquet")
    with pytest.raises(InputError, match=r"shown\.parquet: column 'event' has .*; expected text"):
        with_impressions(data, tmp_path / "shown.parquet", columns={"label": "event"}, passed_over=["skip"])
