"""New data joined to the past, compared with a join by ids in plain dictionaries; withdrawn items; refused data."""

import numpy as np
import polars as pl
import pytest

from twotower.config.features import CategoricalFeature, DenseFeature, MultiFeature, NumericFeature, TextFeature
from twotower.data import Interactions, by_time, held_out_queries, leave_last_out
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.incremental.features import extend_encoded_table
from twotower.incremental.split import PastData, continued
from twotower.incremental.vocabularies import joined_table

DAY = 86_400


def days(first, last, *, queries, items, seed, rows=400):
    """Make rows spread over days `first` to `last`, with queries and items from half-open ranges."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame({
        "user_id": [f"u{q:03d}" for q in rng.integers(*queries, rows)],
        "item_id": rng.integers(*items, rows),
        "timestamp": np.sort(rng.integers(first * DAY, last * DAY, rows)) + 1_600_000_000,
    })  # fmt: skip


OLD = days(0, 30, queries=(0, 40), items=(0, 50), seed=0)
NEW = days(30, 40, queries=(20, 60), items=(30, 80), seed=1, rows=300)
PROTOCOLS = {
    "time": lambda data: by_time(data, cold="keep"),
    "leave-last-out": leave_last_out,
    "held-out-queries": lambda data: held_out_queries(data, cold="keep"),
}


def past_of(frame, *, learnt=0.8, items=None):
    """Make the past of a model that was trained on the first rows of every query."""
    data = Interactions.from_frame(frame, items=items)
    sizes = np.diff(data.offsets)
    return PastData(
        data.queries, data.items, data.offsets, data.item_codes, np.floor(learnt * sizes).astype(np.int64),
        {"timestamps": data.timestamps}, item_table=data.item_table, fingerprint="old", last=int(data.timestamps.max()),
    )  # fmt: skip


def histories(frame, without=()):
    """Map each query id to its item ids in time order."""
    found = {}
    for query, item, _ in sorted(frame.iter_rows(), key=lambda row: row[2]):
        if item not in without:
            found.setdefault(query, []).append(item)
    return found


def rows_by_id(data):
    items = data.items.decode(data.item_codes).to_list()
    return {q: items[data.offsets[code] : data.offsets[code + 1]] for code, q in enumerate(data.queries.ids)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_rows_match_a_join_by_ids(protocol):
    gone = [3, 31, 44]
    made = continued(past_of(OLD), Interactions.from_frame(NEW), PROTOCOLS[protocol], withdrawn=gone)
    whole = {q: rows for q, rows in rows_by_id(made.data).items() if rows}
    assert whole == histories(pl.concat([OLD, NEW]).unique(maintain_order=True), without=gone)
    assert not set(gone) & set(made.data.items.ids)
    assert (np.diff(made.data.offsets) >= 0).all()
    for query in range(made.data.num_queries):
        times = made.data.timestamps[made.data.offsets[query] : made.data.offsets[query + 1]]
        assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_targets_follow_their_whole_history_and_are_not_trained_on(protocol):
    made = continued(past_of(OLD), Interactions.from_frame(NEW), PROTOCOLS[protocol])
    whole, trained = rows_by_id(made.data), rows_by_id(made.train)
    for holdout in (made.validation, made.test):
        assert len(holdout)
        for row, query in enumerate(made.data.queries.decode(holdout.queries)):
            part = slice(holdout.history_offsets[row], holdout.history_offsets[row + 1])
            own = slice(holdout.target_offsets[row], holdout.target_offsets[row + 1])
            history = made.data.items.decode(holdout.history_items[part]).to_list()
            targets = made.data.items.decode(holdout.target_items[own]).to_list()
            assert whole[query][: len(history)] == history
            assert set(targets) <= set(whole[query][len(history) :])
            assert len(trained[query]) <= len(history)


def test_cold_targets_are_left_out_if_the_protocol_drops_them():
    made = continued(past_of(OLD), Interactions.from_frame(NEW), PROTOCOLS["time"])
    assert (made.train.item_counts()[made.test.target_items] > 0).all()
    assert (np.diff(made.train.offsets)[made.test.queries] > 0).all()
    kept = continued(past_of(OLD), Interactions.from_frame(NEW), PROTOCOLS["time"], cold="keep")
    assert len(kept.test.target_items) >= len(made.test.target_items)


def test_the_whole_log_gives_the_same_as_the_new_rows_alone():
    alone = continued(past_of(OLD), Interactions.from_frame(NEW), PROTOCOLS["time"])
    log = continued(past_of(OLD), Interactions.from_frame(pl.concat([OLD, NEW])), PROTOCOLS["time"])
    assert rows_by_id(alone.train) == rows_by_id(log.train)
    assert np.array_equal(alone.test.target_items, log.test.target_items)
    assert log.account.count("known rows") == len(OLD.unique())


def test_rows_to_learn_are_new_or_drawn_from_the_past():
    past = past_of(OLD)
    made = continued(past, Interactions.from_frame(NEW), PROTOCOLS["time"])
    assert int(made.learnt.sum()) == int(past.learnt.sum())  # nothing was withdrawn
    new = np.flatnonzero(~made.learnt)
    for replay in (0.0, 0.5, 100.0):
        rows = made.rows_to_learn(replay, seed=0)
        assert (np.diff(rows) > 0).all() and set(new) <= set(rows)
        assert len(rows) - len(new) == min(round(replay * len(new)), int(made.learnt.sum()))
    assert np.array_equal(made.rows_to_learn(0.5, seed=1), made.rows_to_learn(0.5, seed=1))
    assert not np.array_equal(made.rows_to_learn(0.5, seed=1), made.rows_to_learn(0.5, seed=2))


@pytest.mark.parametrize("replay", [0.0, 1.0, 3.0])
def test_whole_queries_are_chosen_for_a_tower_that_reads_sequences(replay):
    made = continued(past_of(OLD), Interactions.from_frame(NEW), PROTOCOLS["time"])
    rows = made.rows_to_learn(replay, seed=0, whole=True)
    chosen = made.train.select(rows)
    sizes, all_sizes = np.diff(chosen.offsets), np.diff(made.train.offsets)
    assert (sizes[sizes > 0] == all_sizes[sizes > 0]).all()
    assert set(np.flatnonzero(~made.learnt)) <= set(rows)
    replayed = len(rows) - int((~made.learnt).sum())
    active = np.zeros(made.train.num_queries, dtype=bool)
    active[made.train.query_codes()[~made.learnt]] = True
    least = int(made.learnt[active[made.train.query_codes()]].sum())
    wanted = min(replay * int((~made.learnt).sum()), int(made.learnt.sum()))
    assert max(least, wanted) <= replayed <= max(least, wanted) + all_sizes.max()


def test_an_item_table_as_catalog_withdraws_items_that_it_does_not_list():
    table = pl.DataFrame({"item_id": [*range(10, 60), 200], "title": [f"t{j}" for j in [*range(10, 60), 200]]})
    data = Interactions.from_frame(NEW, items=table, catalog="table")
    made = continued(past_of(OLD), data, PROTOCOLS["time"], catalog="table")
    new_ids = set(NEW["item_id"])
    assert set(made.data.items.ids) == set(range(10, 60)) | {200} | new_ids
    same = continued(past_of(OLD), data, PROTOCOLS["time"], catalog="interactions")
    assert set(same.data.items.ids) == set(OLD["item_id"]) | new_ids


def test_the_new_table_takes_precedence_over_the_old_one():
    old = pl.DataFrame({"item_id": [1, 2, 3], "title": ["one", "two", "three"], "price": [1.0, 2.0, 3.0]})
    new = pl.DataFrame({"item_id": [2, 4, 5], "title": ["TWO", "four", None], "colour": ["red", "blue", None]})
    ids = [Vocabulary(table["item_id"]) for table in (old, new)]
    both = joined_table(old, ids[0], new, ids[1], Vocabulary([1, 2, 4, 5]))
    assert both["title"].to_list() == ["one", "TWO", "four", None]
    assert both["colour"].to_list() == [None, "red", "blue", None]
    with pytest.raises(InputError, match="column 'price' is String in the new table and Float64"):
        joined_table(old, ids[0], new.with_columns(price=pl.lit("cheap")), ids[1], Vocabulary([1, 2, 4, 5]))


def test_features_gain_new_values_without_changing_the_old_ones():
    declared = [
        CategoricalFeature(column="colour"), MultiFeature(column="tags"), TextFeature(column="words", min_count=1),
        NumericFeature(column="price"), CategoricalFeature(column="shop", buckets=7), DenseFeature(column="v"),
    ]  # fmt: skip
    old = pl.DataFrame({
        "item_id": [1, 2, 3], "colour": ["red", "blue", None], "tags": [["a", "c"], ["c"], []],
        "words": ["big thing", "small thing", ""], "price": [1.0, 3.0, None], "shop": ["x", "y", None],
        "v": [[1.0, 0.0], [0.0, 1.0], None],
    })  # fmt: skip
    before = EncodedTable.fit("item", declared, old, ids=old["item_id"])
    ids = Vocabulary([1, 3, 4, 5])
    new = pl.DataFrame({
        "item_id": [1, 3, 4, 5], "colour": [None, None, "amber", "violet"],
        "tags": [None, None, ["b", "c", "d"], ["c"]], "words": [None, None, "a big new thing", "odd"],
        "price": [None, None, 5.0, 7.0], "shop": [None, None, "x", "z"], "v": [None, None, [3.0, 4.0], None],
    })  # fmt: skip
    known = np.array([True, True, True, False])
    after = extend_encoded_table(before, np.array([0, -1, 1]), new, ids, known)
    for place, encoder in enumerate(before.features.encoders):
        kept = before.arrays[place][[0, 2]]
        if place in after.value_maps:
            kept = after.value_maps[place][kept]
        now = after.table.arrays[place][[0, 1]]
        width = now.shape[1] if now.ndim == 2 else 0
        assert np.array_equal(np.pad(kept, ((0, 0), (0, width - kept.shape[1]))) if width else kept, now), encoder
    colours, tags = after.table.features.encoders[0].values, after.table.features.encoders[1].values
    assert colours.known.ids.to_list() == ["amber", "blue", "red"]  # violet occurs in no training row
    assert tags.known.ids.to_list() == ["a", "b", "c", "d"]
    assert after.table.arrays[0].tolist() == [4, 0, 2, 1]
    assert sorted(after.table.arrays[1][2].tolist()) == [3, 4, 5]
    assert after.table.arrays[3][2, 0] == pytest.approx(before.features.encode([{"price": 5.0, **dict.fromkeys(
        ["colour", "tags", "words", "shop", "v"])}])[3][0, 0])  # fmt: skip
    assert np.allclose(after.table.arrays[5][2], [0.6, 0.8, 0.0])
    with pytest.raises(InputError, match="set data.items"):
        extend_encoded_table(before, np.array([0, -1, 1]), None, ids, known)
    with pytest.raises(InputError, match="column 'price'"):
        extend_encoded_table(before, np.array([0, -1, 1]), new.drop("price"), ids, known)


@pytest.mark.parametrize(
    ("data", "withdrawn", "message"),
    [
        (OLD, None, "nothing to train on"),
        (NEW.drop("timestamp"), None, "has timestamps and the new data has none"),
        (NEW, [777], "none of the 1 ids is in the catalog"),
        (NEW.filter(pl.col("item_id") < 40), list(range(30, 40)), "nothing to train on"),
    ],
)
def test_unsuitable_new_data_is_refused_with_the_reason(data, withdrawn, message):
    with pytest.raises(InputError, match=message):
        continued(past_of(OLD), Interactions.from_frame(data), PROTOCOLS["time"], withdrawn=withdrawn)
