"""Queries that are texts: the rows of a text, splits by text, and a query asked once for each text."""

import numpy as np
import polars as pl
import pytest

from support.search import searches
from twotower.config.features import TextFeature
from twotower.config.run import Config
from twotower.data import Interactions, by_time, held_out_queries, with_query_text
from twotower.errors import InputError


def texts(frame, **options):
    data = Interactions.from_frame(frame, columns={"query": "search", "item": "item_id", **options})
    return with_query_text(data, "search", texts_are_queries=True)


def beside_users(frame):
    data = Interactions.from_frame(frame, context=["search"])
    return with_query_text(data, "search", texts_are_queries=False)


def test_each_distinct_text_is_one_query_with_its_text_in_the_query_table():
    frame = searches().drop("user_id", "timestamp")
    data = texts(frame, timestamp=None)
    distinct = sorted(frame["search"].unique().to_list())
    assert data.num_queries == len(distinct)
    assert data.query_table["search"].to_list() == data.queries.ids.to_list() == distinct
    for code in (0, len(distinct) // 2, len(distinct) - 1):
        own = data.items.decode(data.item_codes[data.offsets[code] : data.offsets[code + 1]])
        assert sorted(own) == sorted(frame.filter(pl.col("search") == distinct[code])["item_id"])


def test_numbers_are_words():
    data = texts(pl.DataFrame({"search": [12, 12, 7], "item_id": [1, 2, 3]}))
    assert data.query_table["search"].to_list() == ["7", "12"]


def test_held_out_texts_have_all_their_items_as_targets_and_no_history():
    data = texts(searches().drop("user_id", "timestamp"), timestamp=None)
    split = held_out_queries(data, 0.1, 0.2, fold_in=0.0, cold="keep")
    trained = set(np.flatnonzero(np.diff(split.train.offsets)))
    for holdout in (split.validation, split.test):
        assert not len(holdout.history_items) and not trained & set(holdout.queries)
        for place, code in enumerate(holdout.queries):
            found = holdout.target_items[holdout.target_offsets[place] : holdout.target_offsets[place + 1]]
            assert set(found) == set(data.item_codes[data.offsets[code] : data.offsets[code + 1]])
    assert len(split.test) == round(0.2 * data.num_queries)


def test_texts_with_one_row_can_be_held_out():
    data = texts(pl.DataFrame({"search": [f"t{n}" for n in range(20)], "item_id": [n % 5 for n in range(20)]}))
    assert len(held_out_queries(data, 0.1, 0.2, fold_in=0.0).test) == 4
    with pytest.raises(InputError, match="0 queries have 2 rows or more"):
        held_out_queries(data, 0.1, 0.2)


def test_a_split_by_time_keeps_new_texts_only_if_they_are_known_by_their_words():
    frame = pl.DataFrame(
        {"search": ["a", "b", "a", "b", "a", "new"], "item_id": [1, 2, 2, 1, 1, 2], "timestamp": range(0, 6000, 1000)}
    )
    data = texts(frame)
    kept = by_time(data, 0, 0.4, new_queries=True).test
    dropped = by_time(data, 0, 0.4).test
    assert set(data.queries.decode(kept.queries)) == {"a", "new"} and set(data.queries.decode(dropped.queries)) == {"a"}


def test_a_query_is_asked_once_for_each_text_of_its_held_out_rows():
    data = beside_users(searches())
    split = by_time(data, 0.1, 0.2)
    for holdout in (split.validation, split.test):
        asked = list(zip(holdout.queries.tolist(), holdout.context["search"], strict=True))
        assert len(asked) == len(set(asked)) and holdout.query_text == "search"
        rows = {}  # by a slow loop over all rows
        cuts = [*split.settings["cuts"], np.inf]
        low, high = cuts[:2] if holdout is split.validation else cuts[1:]
        items = split.train.item_counts() > 0
        for code in range(data.num_queries):
            for row in range(data.offsets[code], data.offsets[code + 1]):
                if low <= data.timestamps[row] < high and items[data.item_codes[row]]:
                    rows.setdefault((code, data.context["search"][row]), set()).add(int(data.item_codes[row]))
        own = [set(part) for part in np.split(holdout.target_items, holdout.target_offsets[1:-1])]
        assert dict(zip(asked, [{int(one) for one in part} for part in own], strict=True)) == rows
    assert len(asked) > len(set(split.test.queries.tolist()))


def test_a_blank_text_is_no_text():
    frame = searches(40).with_columns(search=pl.when(pl.int_range(40) < 5).then(pl.lit(" ")).otherwise("search"))
    assert beside_users(frame).context["search"].null_count() == 5


def test_what_texts_need():
    data = Interactions.from_frame(searches(40))
    with pytest.raises(InputError, match=r"'search' was not read with the interactions; in Python pass context"):
        with_query_text(data, "search", texts_are_queries=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.query_ids=codes"], "the texts are the queries; expected query_ids: vocabulary"),
        (["data.query_ids={hashed: 100}"], "the texts are the queries; expected query_ids: vocabulary"),
        (["query_tower.context=[{column: search, kind: text}]"], "the texts are the queries; use query_tower.features"),
        (
            ["data.columns.query=user_id", "query_tower.features=[{column: search, kind: text}]"],
            "a text belongs to a row, not to a query id; use query_tower.context",
        ),
        (["data.columns.item=search"], "'search' is the column of the items"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Config.load(None, ["data.query_text=search", *settings])


def test_the_text_is_declared_where_it_is_read():
    alone = Config.load(None, ["data.query_text=search"])
    assert alone.query_tower.features == [TextFeature(column="search")] and alone.query_tower.history is None
    assert alone.data.split == "held-out-queries" and not alone.evaluation.exclude_seen
    beside = Config.load(None, ["data.query_text=search", "data.columns.query=user_id"])
    assert beside.query_tower.context == [TextFeature(column="search")] and beside.query_tower.features == "none"
    assert beside.query_tower.history is not None and beside.data.split == "time" and beside.evaluation.exclude_seen
    own = ["query_tower.features=[{column: age, kind: numeric}, {column: search, kind: text, model: m}]"]
    declared = Config.load(None, ["data.query_text=search", *own]).query_tower.features
    assert [(one.column, one.kind) for one in declared] == [("age", "numeric"), ("search", "text")]
    assert declared[1].model == "m"
    given = Config.load(None, ["data.query_text=search", "data.split=random", "query_tower.history.length=5"])
    assert given.data.split == "random" and given.query_tower.history.length == 5 and given.evaluation.exclude_seen


def test_complete_settings_are_unchanged():
    for changes in ([], ["data.columns.query=user_id"]):
        config = Config.load(None, ["data.query_text=search", *changes])
        assert Config.model_validate(config.model_dump()) == config
        assert Config(data=config.data).query_tower.features == config.query_tower.features
