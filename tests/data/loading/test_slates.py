"""Slates: joined as a loop over rows and impressions does it, never from after a row, bounded."""

import numpy as np
import polars as pl
import pytest

from twotower.data import Interactions, Slates, leave_last_out, with_impressions
from twotower.data.splits import by_time, random_rows
from twotower.errors import InputError

SECOND = 1_000_000


@pytest.fixture(scope="module")
def frames():
    """Rows of 12 queries over 200 seconds, and impressions in up to 60 requests, some of them of no row."""
    rng = np.random.default_rng(3)
    rows = pl.DataFrame(
        {
            "user_id": rng.integers(0, 12, 120),
            "item_id": rng.integers(0, 15, 120),
            "timestamp": 1_600_000_000 + rng.integers(0, 200, 120),
            "request": [None if r == 0 else f"r{r}" for r in rng.integers(0, 8, 120)],
        }
    ).unique(["user_id", "item_id", "timestamp"], maintain_order=True)
    shown = pl.DataFrame(
        {
            "user_id": rng.integers(0, 14, 500),
            "item_id": rng.integers(0, 17, 500),
            "timestamp": 1_600_000_000 + rng.integers(0, 220, 500),
            "label": rng.integers(0, 2, 500).astype(float),
            "action": np.array(["skip", "click", "report"])[rng.integers(0, 3, 500)],
            "request": [None if r == 0 else f"r{r}" for r in rng.integers(0, 9, 500)],
        }
    ).unique(["user_id", "item_id", "timestamp"], maintain_order=True)
    return rows, shown


@pytest.fixture
def files(frames, tmp_path):
    rows, shown = frames
    rows.write_parquet(tmp_path / "rows.parquet")
    shown.write_parquet(tmp_path / "shown.parquet")
    return tmp_path


def read(files, *, request=None, columns=None, passed_over=1.0):
    data = Interactions.read(files / "rows.parquet", context=["request"])
    return with_impressions(data, files / "shown.parquet", columns=columns, passed_over=passed_over, request=request)


def expected(data, shown, *, passed_over, length, window=None, request=None, known_left_out=False):
    """Return the slate of every row, by a loop over rows and impressions."""
    users, items = data.queries.ids.to_list(), data.items.ids.to_list()
    codes = data.query_codes()
    positives = {(users[q], items[j]) for q, j in zip(codes, data.item_codes, strict=True)}
    slates = []
    for row in range(len(data)):
        now, user = int(data.timestamps[row]), users[codes[row]]
        found = []
        for one in shown.iter_rows(named=True):
            moment = one["timestamp"] * SECOND
            joined = one["user_id"] == user and moment <= now and one["item_id"] in items and passed_over(one)
            if request is not None:
                own = data.context[request][row]
                joined = joined and own is not None and one[request] == own
            if window is not None:
                joined = joined and moment >= now - window
            if known_left_out:
                joined = joined and (user, one["item_id"]) not in positives
            if joined:
                found.append((moment, one["item_id"]))
        found.sort(key=lambda pair: pair[0])
        slates.append(found[max(len(found) - length, 0) :])
    return slates


def as_sets(data, slates):
    """Return the items of every row's slate, sorted: impressions of one moment have no order."""
    found = slates.of(np.arange(len(data))).items.numpy()
    return [sorted(data.items.decode(row[row >= 0]).to_list()) for row in found]


def is_skip(one):
    return one["label"] < 1.0


@pytest.mark.parametrize("request_column", [None, "request"])
@pytest.mark.parametrize("window", [None, 40 * SECOND])
def test_a_slate_is_what_a_loop_over_the_impressions_finds(files, frames, request_column, window):
    data = read(files, request=request_column)
    slates = Slates.of_negatives(data, length=100, window=window, request=request_column)
    wanted = expected(data, frames[1], passed_over=is_skip, length=100, window=window, request=request_column)
    assert as_sets(data, slates) == [sorted(item for _, item in row) for row in wanted]
    assert sum(map(len, wanted)) > (10 if request_column else 200)


def test_the_newest_items_are_kept_and_the_others_counted(files, frames):
    data = read(files)
    slates = Slates.of_negatives(data, length=3)
    whole = expected(data, frames[1], passed_over=is_skip, length=1000)
    found = slates.of(np.arange(len(data))).items.numpy()
    assert found.shape == (len(data), 3)
    for row, wanted in zip(found, whole, strict=True):
        times = sorted(moment for moment, _ in wanted)[-3:]
        kept = data.items.decode(row[row >= 0]).to_list()
        assert len(kept) == len(times)
        # Impressions of one moment may be kept in any order.
        assert set(kept) <= {item for moment, item in wanted if not times or moment >= times[0]}
    cut = sum(max(len(row) - 3, 0) for row in whole)
    assert f"{cut:,} further items are cut" in str(slates) and cut > 100


def test_outcomes_are_numbers_values_or_none(files, frames):
    data = read(files, columns={"label": "action"}, passed_over=["skip", "report"])
    slates = Slates.of_negatives(data, length=100)
    wanted = expected(data, frames[1], passed_over=lambda one: one["action"] != "click", length=100)
    assert as_sets(data, slates) == [sorted(item for _, item in row) for row in wanted]
    data = read(files, columns={"label": "none"})
    slates = Slates.of_negatives(data, length=100)
    wanted = expected(data, frames[1], passed_over=lambda one: True, length=100, known_left_out=True)
    assert as_sets(data, slates) == [sorted(item for _, item in row) for row in wanted]


def test_outcomes_with_weights(files, frames):
    data = read(files, columns={"label": "action"}, passed_over={"skip": 1.0, "report": 5.0})
    slates = Slates.of_negatives(data, length=100)
    found = slates.of(np.arange(len(data)))
    actions = {(u, i, t): a for u, i, t, _, a, _ in frames[1].iter_rows()}
    weight = {"skip": 1.0, "report": 5.0}
    for row, (query, now) in enumerate(zip(data.query_codes(), np.asarray(data.timestamps), strict=True)):
        live = found.items[row] >= 0
        wanted = [
            (item, weight[action])
            for (user, item, moment), action in actions.items()
            if user == data.queries.ids[int(query)] and moment * SECOND <= now and action in weight
            and data.items.encode([item])[0] >= 0
        ]  # fmt: skip
        ids = data.items.decode(found.items[row][live].numpy()).to_list()
        assert sorted(zip(ids, found.weights[row][live].tolist(), strict=True)) == sorted(wanted)
    assert {1.0, 5.0} <= set(found.weights[found.items >= 0].tolist())


def test_impressions_of_unknown_ids_are_counted(files, frames):
    data, shown = read(files), frames[1]
    known = pl.col("user_id").is_in(data.queries.ids.implode()) & pl.col("item_id").is_in(data.items.ids.implode())
    skipped = shown.filter(pl.col("label") < 1)
    assert data.account.count("impressions: unknown ids") == len(skipped.filter(~known)) > 0
    assert data.account.count("impressions passed over") == len(data.negatives) == len(skipped.filter(known))


def test_nothing_after_the_cut_is_in_a_training_slate(files):
    data = read(files)
    split = by_time(data, 0.1, 0.2)
    cut = split.settings["cuts"][0]
    assert split.train.negatives.timestamps.max() < cut <= data.negatives.timestamps.max()
    slates = Slates.of_negatives(split.train, length=100)
    later = np.asarray(data.negatives.timestamps)[len(data.negatives) - 1]
    assert slates.ends.max() <= len(split.train.negatives) and later >= cut
    last = leave_last_out(data).train
    times = np.asarray(last.timestamps)
    ends = [int(times[e - 1]) if e > s else -1 for s, e in zip(last.offsets[:-1], last.offsets[1:], strict=True)]
    found = Slates.of_negatives(last, length=1000)
    kept = np.asarray(last.negatives.timestamps)
    used = np.zeros(len(kept), dtype=bool)
    for start, end in zip(found.starts, found.ends, strict=True):
        used[start:end] = True
    assert (kept[used] <= np.array(ends)[last.negatives.query_codes()[used]]).all() and used.any()
    parts = random_rows(data, 0.1, 0.2)
    held = parts.test
    pairs = {(q, j) for q, n in zip(held.queries, np.arange(len(held)), strict=True)
             for j in held.target_items[held.target_offsets[n] : held.target_offsets[n + 1]]}  # fmt: skip
    below = parts.train.negatives
    assert pairs and pairs.isdisjoint(zip(below.query_codes(), below.item_codes, strict=True))


def frame_with_lists(shown):
    return pl.DataFrame(
        {"user_id": [1, 1, 2, 3], "item_id": [10, 11, 12, 13], "timestamp": [5, 6, 7, 8], "shown": shown}
    )


@pytest.mark.parametrize(
    "shown",
    [
        [[12, 11, 10, 99], [13, 12, 13], [], None],
        ["[12, 11, 10, 99]", "13|12|13", "", None],
        ["12 11 10 99", "13 12 13", " ", None],
    ],
)
def test_a_list_column_has_the_first_items_of_its_row(shown):
    data = Interactions.from_frame(frame_with_lists(shown), context=["shown"])
    slates = Slates.of_column(data, "shown", length=2)
    found = slates.of(np.arange(4)).items.numpy()
    # 10 and 11 are training items of query 1, 99 is not in the catalog; the first place is last.
    kept = [data.items.decode(row[row >= 0]).to_list() for row in found]
    assert kept == [[12], [12, 13], [], []]
    assert "1 further item is cut" in str(slates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: Slates.of_column(data, "seen", length=2), "'seen' was not read"),
        (lambda data: Slates.of_column(data, "number", length=2), "expected lists of ids"),
        (lambda data: Slates.of_negatives(data, length=2), "the training data has no items that were passed over"),
        (lambda data: Slates.of_column(data, "nothing", length=2), "no training row has an item"),
        (lambda data: Slates.of_column(data, "words", length=2), "no training row has an item"),
    ],
)
def test_messages(change, message):
    frame = frame_with_lists([[10]] * 4).with_columns(number=pl.lit(1), nothing=pl.lit(""), words=pl.lit("a b"))
    data = Interactions.from_frame(frame, context=["shown", "number", "nothing", "words"])
    with pytest.raises(InputError, match=message) as error:
        change(data)
    assert "\n" not in str(error.value)


def test_messages_of_impressions(files, frames):
    rows, shown = frames
    shown.drop("timestamp").write_parquet(files / "untimed.parquet")
    rows.drop("timestamp").write_parquet(files / "rows without time.parquet")
    data = Interactions.read(files / "rows.parquet", context=["request"])
    with pytest.raises(InputError, match="untimed.parquet: no timestamps"):
        with_impressions(data, files / "untimed.parquet", request="request")
    bare = Interactions.read(files / "rows without time.parquet", context=["request"])
    timed = with_impressions(bare, files / "shown.parquet", request="request")
    with pytest.raises(InputError, match="no timestamps in the interactions"):
        Slates.of_negatives(timed, length=2)
    untimed = with_impressions(bare, files / "untimed.parquet", request="request")
    with pytest.raises(InputError, match="no timestamps in the interactions and the feedback"):
        Slates.of_negatives(untimed, length=2, window=SECOND, request="request")
    assert len(Slates.of_negatives(untimed, length=2, request="request").items)
    assert len(Slates.of_negatives(untimed, length=2).items), "without any times, all of a query's feedback"
    with pytest.raises(InputError, match="'request' was not read with the feedback"):
        Slates.of_negatives(with_impressions(data, files / "shown.parquet"), length=2, request="request")
    with pytest.raises(InputError, match="already have observed negatives"):
        with_impressions(untimed, files / "shown.parquet")
    with pytest.raises(InputError, match="name it with data.feedback.columns.label"):
        with_impressions(data, files / "shown.parquet", passed_over=["skip"])
    with pytest.raises(InputError, match="none of the .* impressions is a passed-over item"):
        with_impressions(data, files / "shown.parquet", passed_over=-1.0)


@pytest.mark.parametrize("value", [b"\xff", ["r1"]])
def test_requests_that_are_no_text_are_named(files, frames, value):
    rows, shown = (one.with_columns(request=pl.Series([value] * len(one))) for one in frames)
    rows.write_parquet(files / "odd rows.parquet")
    shown.write_parquet(files / "odd.parquet")
    data = Interactions.read(files / "odd rows.parquet", context=["request"])
    both = with_impressions(data, files / "odd.parquet", request="request")
    with pytest.raises(InputError, match=r"data\.feedback\.request: column 'request' has .*; expected text"):
        Slates.of_negatives(both, length=2, request="request")
