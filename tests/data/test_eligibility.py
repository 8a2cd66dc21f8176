"""The rule for the items that may be offered: its columns, its account, and the rows and targets that contradict it."""

from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import polars as pl
import pytest
import torch

from support.markets import DAY, EPOCH, allowed, frame, item_table, markets
from twotower.config.run import EligibilityConfig
from twotower.data import Interactions, by_time, with_eligibility
from twotower.data.eligibility import Eligibility
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError

NAMES = Vocabulary(["DE", "FR"])


def of(table, names=NAMES, **columns):
    return Eligibility.of_table(EligibilityConfig(**columns), table, len(table), names)


@pytest.mark.parametrize(
    "column",
    [
        [["FR"], ["DE", "FR"], None, []],
        ["FR", "DE|FR", None, ""],
        ["FR", "DE | FR", None, "|"],
    ],
)
def test_groups_are_lists_values_or_text_and_a_null_is_every_group(column):
    rule = of(pl.DataFrame({"in": column}), item_groups="in")
    assert rule.member.tolist() == [[False, True, True, False], [True, True, True, False]]


def test_integer_groups_and_unknown_groups():
    table = pl.DataFrame({"in": [[1, 9], [2], None]})
    rule = of(table, Vocabulary([1, 2]), item_groups="in")
    assert rule.member.tolist() == [[True, False, True], [False, True, True]]
    with pytest.raises(InputError, match="'x', but the groups of the rows are integers"):
        of(pl.DataFrame({"in": ["1", "x"]}), Vocabulary([1, 2]), item_groups="in")
    with pytest.raises(InputError, match=r"type Float64; expected text, integers"):
        of(pl.DataFrame({"in": [1.5]}), Vocabulary([1, 2]), item_groups="in")


@pytest.mark.parametrize(
    "column",
    [
        [date(2024, 1, 2), None],
        [datetime(2024, 1, 2, tzinfo=UTC), None],
        ["2024-01-02", None],
        [int(datetime(2024, 1, 2, tzinfo=UTC).timestamp()), None],
    ],
)
def test_an_interval_is_half_open_and_a_null_is_open(column):
    at = int(datetime(2024, 1, 2, tzinfo=UTC).timestamp()) * 1_000_000
    begins = of(pl.DataFrame({"t": column}), available_from="t")
    assert [begins.mask(None, at + step).tolist() for step in (-1, 0, 1)] == [[False, True], [True, True], [True, True]]
    ends = of(pl.DataFrame({"t": column}), available_until="t")
    assert [ends.mask(None, at + step).tolist() for step in (-1, 0, 1)] == [[True, True], [False, True], [False, True]]
    assert begins.last_change(at - 1) != begins.last_change(at) == begins.last_change(at + 10**12)


@pytest.mark.parametrize(
    "column",
    [[3, 0, -1, None], [0.5, 0.0, -2.0, None], [True, False, False, None], ["true", "False", " false", None]],
)
def test_an_item_is_in_stock_above_0_and_a_null_is_in_stock(column):
    rule = of(pl.DataFrame({"left": column}), stock="left")
    assert rule.in_stock.tolist() == rule.mask(None, None).tolist() == [True, False, False, True]
    assert rule.select(np.array([3, 1])).in_stock.tolist() == [True, False]
    assert not rule.governs_rows


def test_the_stock_of_today_limits_answers_and_nothing_else():
    table = pl.DataFrame({"in": [["FR"], ["DE", "FR"], ["DE"]], "left": [0, 2, 2]})
    rule = of(table, item_groups="in", stock="left")
    assert rule.mask(1, None).tolist() == [False, True, False]
    assert rule.allows(np.arange(3), np.array(1), None).tolist() == [True, True, False]
    assert rule.rows(np.array([1]), None).blocked(slice(None)).tolist() == [[False, False, True]]
    data = markets()
    left = pl.Series("left", np.arange(data.num_items) % 2)
    with_stock = replace(data, item_table=data.item_table.with_columns(left))
    ruled = with_eligibility(with_stock, stock="left")
    assert len(ruled) == len(data)
    assert by_time(ruled).test.eligible is None
    assert "items out of stock" in str(ruled.account)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["yes", "true"], "column 'left' has values of type String; expected a number, or true and false"),
        ([float("nan")], "column 'left' has NaN; leave unknown values empty"),
    ],
)
def test_a_stock_that_cannot_be_read_is_rejected(column, message):
    with pytest.raises(InputError, match=message):
        of(pl.DataFrame({"left": column}), stock="left")


def test_saved_rows_keep_their_rule(tmp_path):
    data = markets()
    data.save(tmp_path / "saved")
    again = Interactions.open(tmp_path / "saved")
    assert again.eligibility.settings == data.eligibility.settings
    for name in ("member", "start", "end"):
        assert np.array_equal(getattr(again.eligibility, name), getattr(data.eligibility, name))
    assert again.eligibility.names.ids.equals(data.eligibility.names.ids)
    groups = by_time(again).test
    assert groups.eligible is not None and np.array_equal(groups.query_groups, by_time(data).test.query_groups)
    # A folder of an older version has no rule.
    replace(data, eligibility=None).save(tmp_path / "plain")
    assert Interactions.open(tmp_path / "plain").eligibility is None


def test_rows_against_items_agree_with_single_tests():
    rng = np.random.default_rng(0)
    rule = Eligibility(NAMES, rng.random((2, 9)) < 0.5, rng.integers(0, 20, 9), rng.integers(0, 20, 9), None)
    groups, times = rng.integers(0, 2, 30), rng.integers(0, 20, 30)
    rows = rule.rows(groups, times)
    slow = np.array([
        [not (rule.member[g, j] and rule.start[j] <= t < rule.end[j]) for j in range(9)]
        for g, t in zip(groups, times, strict=True)
    ])  # fmt: skip
    assert np.array_equal(rows.blocked(slice(0, 30)).numpy(), slow)
    assert np.array_equal(rows.blocked(slice(3, 8), slice(2, 7)).numpy(), slow[3:8, 2:7])
    order = torch.from_numpy(rng.permutation(9))
    assert np.array_equal(rows.select(order).of_rows(slice(5, 9)).blocked(slice(0, 4)).numpy(), slow[5:9][:, order])
    items = rng.integers(-1, 9, (30, 4))
    each = np.where(items >= 0, np.take_along_axis(slow, items.clip(0), 1), False)
    assert np.array_equal(rows.blocked_of_rows(torch.from_numpy(items)).numpy(), each)
    assert np.array_equal(rule.select(order.numpy()).rows(groups, times).blocked(slice(0, 30)).numpy(), slow[:, order])


def test_rows_that_contradict_the_table_are_dropped_and_counted():
    rows, table = frame(), item_table()
    data = markets()
    fits = allowed(table, rows["item_id"].to_numpy(), rows["market"].to_numpy(), rows["timestamp"].to_numpy())
    assert 0 < (~fits).sum() < len(rows) / 2
    assert len(data) == fits.sum()
    assert data.account.count("rows not eligible") == (~fits).sum()
    assert data.account.count("items in every group") == 1 + sum(len(g) == 3 for g in table["markets"].drop_nulls())
    kept = rows.filter(pl.Series(fits)).sort("user_id", "timestamp", maintain_order=True)
    assert kept.group_by("user_id").agg(pl.col("market").n_unique())["market"].max() == 2
    assert np.array_equal(data.items.decode(data.item_codes), kept["item_id"])
    names = data.group_names.ids
    assert names.to_list() == ["AT", "DE", "FR"], "a group without rows, in which items are offered, has a code"
    assert [names[int(g)] for g in data.groups] == kept["market"].to_list()


def test_the_group_of_a_query_from_its_table():
    rows = frame()
    queries = rows.group_by("user_id", maintain_order=True).agg(pl.col("market").first())
    plain = Interactions.from_frame(
        rows.drop("market"), items=item_table(), queries=queries, catalog="table", columns={"group": None}
    )
    ruled = with_eligibility(plain, item_groups="markets", query_group="market")
    home = dict(queries.iter_rows())
    users = ruled.queries.decode(ruled.query_codes())
    assert [ruled.group_names.ids[int(g)] for g in ruled.groups] == [home[user] for user in users]
    with pytest.raises(InputError, match="query_group: the data has no query table"):
        with_eligibility(replace(plain, query_table=None), item_groups="markets", query_group="market")
    for value in (b"\xff", ["FR"]):
        table = plain.query_table.with_columns(market=pl.Series([value] * plain.num_queries))
        with pytest.raises(InputError, match=r"query_group: column 'market' has .*; expected text"):
            with_eligibility(replace(plain, query_table=table), item_groups="markets", query_group="market")


def test_every_mistake_is_one_line_that_says_what_to_use():
    plain = Interactions.from_frame(frame(), items=item_table(), catalog="table", columns={"group": "market"})
    for columns, words in (
        ({"item_groups": "market"}, "no column 'market' in the item table; columns found: 'item_id', 'markets'"),
        ({}, "expected at least one of item_groups, available_from, available_until and stock"),
        ({"available_from": "since", "query_group": "market"}, "query_group needs item_groups"),
        ({"available_from": "markets"}, "values of type List"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            with_eligibility(plain, **columns)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"needs the group of each row; name the column with data\.columns\.group"):
        with_eligibility(replace(plain, groups=None, group_names=None), item_groups="markets")
    with pytest.raises(InputError, match=r"need the time of each row; name the column with data\.columns\.timestamp"):
        with_eligibility(replace(plain, timestamps=None), available_from="since")
    with pytest.raises(InputError, match="the data has no item table"):
        with_eligibility(replace(plain, item_table=None), available_from="since")
    never = plain.item_table.with_columns(pl.lit([], dtype=pl.List(pl.String)).alias("markets"))
    with pytest.raises(InputError, match="none of the .* rows has an item that was eligible"):
        with_eligibility(replace(plain, item_table=never), item_groups="markets")


def test_targets_are_those_that_could_be_shown_at_the_query_in_its_group():
    split = by_time(markets(), 0.1, 0.2, cold="keep")
    table, test = item_table(), split.test
    names, ids = split.data.group_names.ids, split.data.items.decode(test.target_items).to_numpy()
    owner = np.repeat(np.arange(len(test)), np.diff(test.target_offsets))
    groups = np.array([names[int(g)] for g in test.query_groups])
    seconds = test.query_times // 1_000_000
    assert allowed(table, ids, groups[owner], seconds[owner]).all()
    assert split.account.count("test: targets not eligible") > 0
    # The rule is what drops them: without it they would be targets.
    free = by_time(replace(split.data, eligibility=None), 0.1, 0.2, cold="keep").test
    dropped = free.target_offsets[-1] - test.target_offsets[-1]
    assert dropped > 0
    assert (seconds >= EPOCH + 70 * DAY).any()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            pl.Series([2**31 - 1], dtype=pl.Int32).cast(pl.Date),
            "row 1: 2147483647 d since 1970",
        ),
        (pl.Series([0, 2**62]).cast(pl.Datetime("ms")), "row 2: 4611686018427387904 ms since 1970"),
        (pl.Series([float("inf")]), "an infinite number"),
        (pl.Series([1e9, float("-inf")]), "an infinite number"),
    ],
)
def test_times_beyond_every_calendar_are_refused(times, message):
    with pytest.raises(InputError, match=rf"available_until: column 'end'.*{message}"):
        of(pl.DataFrame({"end": times}), available_until="end")


def test_times_of_every_unit_and_zone_are_microseconds_in_utc():
    moment = datetime(2024, 5, 31, 12, tzinfo=UTC)
    wanted = int(moment.timestamp()) * 1_000_000
    naive = pl.Series([moment.replace(tzinfo=None)])
    zoned = naive.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    for times in (naive, zoned, *(naive.cast(pl.Datetime(unit)) for unit in ("ns", "ms"))):
        assert of(pl.DataFrame({"end": times}), available_until="end").end.tolist() == [wanted]
