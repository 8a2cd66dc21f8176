"""Request context: read with the rows, kept with them through sorting, splits and joining, encoded as in serving."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from twotower.config.run import Config
from twotower.data import Interactions, SequenceBatches, TrainingBatches, by_time, from_parts, leave_last_out
from twotower.errors import InputError
from twotower.features.from_config import context_to_read, encode_context, encode_features, fit_features, with_features
from twotower.features.requests import encode_context_rows
from twotower.features.suggest import propose_context
from twotower.ranking.distributed import slice_holdout

DECLARED = """query_tower.context=[{column: device, kind: categorical}, {column: tags, kind: multi},
{column: price, kind: numeric}, {column: load, kind: numeric, scale: quantiles, bins: 4},
{column: at, kind: timestamp, parts: [hour, weekday]}, {column: vector, kind: dense},
{column: text, kind: text, min_count: 1}, {column: timestamp, kind: timestamp}]"""


def log(rows=400, seed=0):
    """Make rows in random order; each value identifies its row."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame({
        "user_id": [f"u{q:02d}" for q in rng.integers(0, 30, rows)],
        "item_id": rng.integers(0, 50, rows),
        "timestamp": 1_600_000_000 + rng.permutation(rows) * 5_000,
        "device": [["phone", "desk", None][d] for d in rng.integers(0, 3, rows)],
        "tags": [["a", "b", "c"][: int(n)] for n in rng.integers(0, 4, rows)],
        "price": np.arange(rows) * 0.5,
        "load": rng.random(rows),
        "at": [f"2024-05-{1 + r % 28:02d} {r % 24:02d}:00:00" for r in range(rows)],
        "vector": rng.random((rows, 3)).tolist(),
        "text": [f"word{r % 7} other" for r in range(rows)],
    })  # fmt: skip


def key_of(data, row):
    query = np.searchsorted(data.offsets, row, side="right") - 1
    return data.queries.ids[int(query)], data.items.ids[int(data.item_codes[row])], int(data.timestamps[row])


def expected(frame):
    """Map each (user, item, time) to its row."""
    return {(r["user_id"], r["item_id"], r["timestamp"] * 1_000_000): r for r in frame.to_dicts()}


def check(data, frame, names, holdouts=()):
    rows = expected(frame)
    assert data.context.columns == list(names) and len(data.context) == len(data)
    for row, found in enumerate(data.context.to_dicts()):
        wanted = rows[key_of(data, row)]
        for name in names:
            assert found[name] == wanted[name], (row, name)
    for holdout in holdouts:
        for place in range(len(holdout)):
            user = data.queries.ids[int(holdout.queries[place])]
            item = data.items.ids[int(holdout.target_items[holdout.target_offsets[place]])]
            wanted = rows[user, item, int(holdout.query_times[place])]
            assert holdout.context["price"][place] == wanted["price"]


def test_every_row_keeps_its_context_in_any_form(tmp_path):
    frame = log()
    flat = frame.drop("tags", "vector")
    flat.write_csv(tmp_path / "log.csv")
    frame.write_parquet(tmp_path / "log.parquet")
    names = ["price", "device", "load"]
    one = Interactions.from_frame(frame, context=names)
    check(one, frame, names)
    check(Interactions.read(tmp_path / "log.csv", context=names), frame, names)
    read = Interactions.read(tmp_path / "log.parquet", context=["tags", *names], cache=tmp_path / "cache")
    check(read, frame, ["tags", *names])
    again = Interactions.read(tmp_path / "log.parquet", context=["tags", *names], cache=tmp_path / "cache")
    check(again, frame, ["tags", *names])
    again.save(tmp_path / "saved")
    check(Interactions.open(tmp_path / "saved"), frame, ["tags", *names])
    assert Interactions.read(tmp_path / "log.parquet").context is None
    assert Interactions.read(tmp_path / "log.parquet").fingerprint == read.fingerprint


def test_several_files_buckets_duplicates_and_negatives(tmp_path, monkeypatch):
    """Small buckets, repeated rows, and rows below the label: the remaining rows keep their context."""
    monkeypatch.setattr("twotower.data.prepare.bucket_sort.BUCKET_ROWS", 50)
    frame = log().with_columns(rating=pl.Series(np.arange(400) % 5))
    frame.head(150).write_parquet(tmp_path / "a.parquet")
    # A repeated row with another context: the first is kept.
    repeated = frame.slice(100, 5).with_columns(price=pl.lit(-1.0))
    pl.concat([frame.slice(150), repeated]).write_parquet(tmp_path / "b.parquet")
    data = Interactions.read(
        [tmp_path / "a.parquet", tmp_path / "b.parquet"], context=["price", "tags"], positive_label=2
    )
    assert len(data) == int((frame["rating"] >= 2).sum()) and data.negatives is not None
    check(data, frame, ["price", "tags"])
    check(data.negatives, frame, ["price", "tags"])


def test_lists_of_items_have_lists_of_context():
    frame = pl.DataFrame({
        "user_id": ["a", "b"], "item_id": [[3, 1, 2], [1, 5]], "device": [["x", "y", "z"], ["v", "w"]],
        "country": ["FR", "DE"],
    })  # fmt: skip
    data = Interactions.from_frame(frame, context=["device", "country"])
    assert data.context["device"].to_list() == ["x", "y", "z", "v", "w"]
    assert data.context["country"].to_list() == ["FR", "FR", "FR", "DE", "DE"]
    assert Interactions.from_frame(frame, context="all").context is None
    uneven = frame.with_columns(device=pl.Series([["x"], ["v", "w"]]))
    with pytest.raises(InputError, match="column 'device', row 1: the list is not as long"):
        Interactions.from_frame(uneven, context=["device"])


def test_splits_parts_and_ranks_keep_the_context():
    frame = log()
    data = Interactions.from_frame(frame, context="all")
    assert "timestamp" in data.context.columns and "user_id" not in data.context.columns
    names = ["price", "device"]
    data = Interactions.from_frame(frame, context=names)
    for split in (leave_last_out(data), by_time(data, 0.1, 0.2)):
        check(split.train, frame, names, (split.validation, split.test))
        part = slice_holdout(split.test, slice(2, 5))
        assert part.context.equals(split.test.context[2:5])
    parts = [frame.slice(0, 300), frame.slice(300, 50), frame.slice(350)]
    given = from_parts(*(Interactions.from_frame(p, context=names) for p in parts))
    check(given.data, frame, names, (given.validation, given.test))
    chosen = data.select(np.arange(0, len(data), 7))
    check(chosen, frame, names)


def test_training_rows_are_encoded_like_requests():
    """For all kinds, a training row has the same arrays as a request with the same values."""
    frame = log()
    config = Config.load(None, [DECLARED])
    data = Interactions.from_frame(frame, context=context_to_read(config))
    train = leave_last_out(data).train
    features = fit_features(config, train)["context"]
    encoded = encode_context(features, train)
    by_key = expected(frame)
    batch = next(iter(TrainingBatches(train, 12, context=encoded)))
    for row, place in zip(batch.rows.tolist(), range(12), strict=True):
        values = {name: by_key[key_of(train, row)][name] for name in features.columns}
        values["timestamp"] = values["timestamp"] if place % 2 else str(train.context["timestamp"][row])
        alone = encode_context_rows(features, [values])
        for many, single in zip(batch.context, alone, strict=True):
            own = np.atleast_1d(many[place].numpy())
            one = np.atleast_1d(single[0])
            np.testing.assert_allclose(own, np.pad(one, (0, len(own) - len(one))), rtol=0, atol=1e-6)
    assert len({tuple(row) for row in batch.context[0].numpy()[:, None].tolist()}) == 3  # phone, desk, missing


def test_sequences_have_the_context_of_each_of_their_rows():
    data = Interactions.from_frame(log(), context=["price"])
    prices = data.context["price"].to_numpy()
    for batch in SequenceBatches(data, 60, history_length=4, context=[prices]):
        np.testing.assert_array_equal(batch.context[0].numpy(), prices[batch.rows.numpy()])
        assert len(batch.to("cpu").context[0]) == len(batch)


def test_requests_with_different_types_do_not_affect_each_other():
    config = Config.load(None, [DECLARED])
    data = Interactions.from_frame(log(), context=context_to_read(config))
    features = fit_features(config, data)["context"]
    rows = [
        {"device": "phone", "at": 1_717_000_000, "price": 3},
        {"device": 7, "at": "2024-05-02 10:00:00", "price": "12.5"},
        None,
        {"device": "desk", "at": 1_717_000_000_000, "tags": ["a"], "vector": [1.0, 2.0, 2.0]},
        {},
        {"device": "never seen", "tags": ["a", "zzz", "b"], "at": "1717000000"},
        {"at": "1717000000000"},
    ]
    together = encode_context_rows(features, rows)
    for place, row in enumerate(rows):
        for whole, alone in zip(together, encode_context_rows(features, [row]), strict=True):
            own = whole[place]
            assert np.array_equal(own[: alone.shape[1]], alone[0]) if alone.ndim == 2 else own == alone[0]
    device = together[0]
    assert device[1] == 1 and device[5] == 1 and device[2] == device[4] == 0  # unknown values, and missing ones
    seconds, *others = (together[4][place] for place in (0, 3, 5, 6))
    for other in others:  # milliseconds, and both as text
        np.testing.assert_array_equal(seconds, other)
    assert [len(one) for one in encode_context_rows(features, [])] == [0] * len(features.declared)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"devise": "phone"}, "context: the model has no column 'devise'; its context columns are 'device'"),
        ({"price": "cheap"}, "context: column 'price', row 2: expected a number"),
        ({"device": {"a": 1}}, "context: column 'device': expected one value in each row"),
        ({"at": "yesterday"}, "column 'at', row 2: expected unix time or ISO text"),
        ({"vector": [1.0]}, "column 'vector', row 2: expected 3 numbers"),
    ],
)
def test_an_invalid_request_is_refused(row, message):
    config = Config.load(None, [DECLARED])
    data = Interactions.from_frame(log(), context=context_to_read(config))
    with pytest.raises(InputError, match=message):
        encode_context_rows(fit_features(config, data)["context"], [{}, row])


def test_invalid_context_columns_are_refused():
    frame = log()
    with pytest.raises(InputError, match="context column 'browser' does not exist"):
        Interactions.from_frame(frame, context=["browser"])
    with pytest.raises(InputError, match="context column 'item_id' is the query id or the item id"):
        Interactions.from_frame(frame, context=["item_id"])
    with pytest.raises(InputError, match="expected a list of columns"):
        Interactions.from_frame(frame, context="device")
    config = Config.load(None, ["query_tower.context=[{column: price, kind: numeric}]"])
    with pytest.raises(InputError, match="column 'price' was not read with the interactions"):
        fit_features(config, Interactions.from_frame(frame))
    text = frame.with_columns(price=pl.when(pl.col("user_id") == "u03").then(pl.lit("dear")).otherwise(pl.lit("1")))
    data = Interactions.from_frame(text, context=["price"])
    with pytest.raises(InputError, match="context of the interactions: column 'price', query 'u03': expected a number"):
        fit_features(config, data)
    dense = Config.load(None, ["query_tower.context=[{column: v, kind: dense, file: v.npy, ids: ids.txt}]"])
    with pytest.raises(InputError, match="a file has vectors for ids, not for requests; expected a column"):
        fit_features(dense, data)


def test_proposals_leave_out_columns_that_leak_the_target():
    rng = np.random.default_rng(1)
    frame = log(2_000).with_columns(
        title=pl.concat_str(pl.lit("item "), pl.col("item_id")),
        unit_price=pl.col("item_id") * 1.5 + 0.25,
        session=pl.concat_str("user_id", pl.lit("/"), pl.Series(rng.integers(0, 5, 2_000))),
        hour=pl.Series(rng.integers(0, 24, 2_000)),
        one=pl.lit("always"),
    )
    data = Interactions.from_frame(frame.drop("vector", "at"), context="all")
    found = {one.column: one for one in propose_context(data)}
    assert found["timestamp"].declared.parts == ["hour", "weekday"]
    assert found["device"].declared.kind == found["hour"].declared.kind == "categorical"
    assert found["tags"].declared.kind == "multi"
    assert found["title"].declared is None and "determined by the item" in found["title"].why
    assert found["unit_price"].declared is None and "determined by the item" in found["unit_price"].why
    assert found["session"].declared is None and "identifies queries" in found["session"].why
    assert found["one"].declared is None
    assert found["price"].declared.kind == "numeric"  # every value is different, but it is no identifier
    settings = with_features(Config.load(None, ["query_tower.context=auto"]), data)
    columns = [one.column for one in settings.query_tower.context]
    assert "device" in columns and "title" not in columns
    encoded = encode_features(settings, data)["context"]
    assert all(len(array) == 0 for array in encoded.arrays)
    nothing = with_features(Config.load(None, ["query_tower.context=auto"]), replace(data, context=None))
    assert nothing.query_tower.context == "none"
