"""Each kind of feature compared with an encoding by hand; missing, unknown and invalid values; JSON round trip."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from twotower.config.features import (
    CategoricalFeature,
    DenseFeature,
    MultiFeature,
    NumericFeature,
    TextFeature,
    TimestampFeature,
)
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable, FeatureSet

IDS = pl.Series("item_id", ["a", "b", "c", "d"])


def fitted(declared, values, known=None, ids=None):
    table = pl.DataFrame({"item_id": IDS[: len(values)], declared.column: values}, strict=False)
    return FeatureSet.fit("item", [declared], table, ids=table["item_id"], known=known)


def encoded(declared, values, new=None, known=None):
    features = fitted(declared, values, known)
    return features.encode([{declared.column: value} for value in (values if new is None else new)])[0].tolist()


@pytest.mark.parametrize(
    ("declared", "values", "new", "expected"),
    [
        # blue and red in ascending order are 2 and 3; 1 is unknown, 0 missing
        (CategoricalFeature(column="x"), ["red", "blue", "red"], ["blue", "red", "green", None, " "], [2, 3, 1, 0, 0]),
        (CategoricalFeature(column="x", min_count=2), ["red", "blue", "red"], ["blue", "red"], [1, 2]),
        (CategoricalFeature(column="x"), [3, None, 10], [3, 10, 3.0, None], [3, 2, 3, 0]),  # "10" < "3"
        (CategoricalFeature(column="x"), [True, False], [True, False], [3, 2]),
        (
            MultiFeature(column="x", separator="|"),
            ["b|a", "c"],
            ["a|c", "b", "z|y|a", "", None, "a| a"],
            [[2, 4], [3, 0], [1, 2], [0, 0], [0, 0], [2, 0]],
        ),
        (MultiFeature(column="x"), [["b", "a"], ["a"]], [["a", "b"], [], None], [[2, 3], [0, 0], [0, 0]]),
        (MultiFeature(column="x", max_values=1), [["b", "a"]], [["a", "b"]], [[2]]),
        # mean 4, deviation 2; clipped to 2..6
        (NumericFeature(column="x"), [2, 6, None], [4, 6, None, 100, "5"], [[0, 0], [1, 0], [0, 1], [1, 0], [0.5, 0]]),
        (NumericFeature(column="x"), [7, 7], [7, 7.5], [[0, 0], [0, 0]]),
        (NumericFeature(column="x", scale="log"), [0, math.e**2 - 1], [math.e - 1], [[0, 0]]),
        # quartiles of 1, 2, 3, 4, without interpolating beyond them: edges 1.75, 2.5, 3.25
        (NumericFeature(column="x", scale="quantiles", bins=4), [1, 2, 3, 4], [0, 1.8, 2.5, 9, None], [1, 2, 3, 4, 0]),
        (NumericFeature(column="x", scale="quantiles", bins=4), [1, 1, 1, 5], [1, 5, None], [1, 2, 0]),
        (DenseFeature(column="x"), [[3.0, 4.0]], [[3.0, 4.0], None, [0, 0]], [[0.6, 0.8, 0], [0, 0, 1], [0, 0, 0]]),
        (DenseFeature(column="x", normalise=False), [[3.0, 4.0]], [[3, 4]], [[3, 4, 0]]),
        (TextFeature(column="x", min_count=1), ["Red MUG", "a mug!"], ["MUG, red", "a cup"], [[3, 4], [2, 1]]),
        (TextFeature(column="x"), ["Red mug", "a mug"], ["red mug"], [[1, 2]]),
    ],
)  # fmt: skip
def test_encodings_match_those_by_hand(declared, values, new, expected):
    assert np.allclose(encoded(declared, values, new), expected, atol=1e-6)


def test_timestamps_are_cyclic():
    """Noon of Monday 1 January 2024, six hours later, and a missing value: sine and cosine of the time of day."""
    declared = TimestampFeature(column="x", parts=["hour", "weekday", "season", "age"])
    noon, evening = "2024-01-01 12:00:00", "2024-01-01T18:00:00Z"
    found = np.array(encoded(declared, [noon, evening, None, "2023-12-31 18:00"]))
    quarter = 2 * math.pi / 4
    assert np.allclose(found[0, :6], [math.sin(2 * quarter), math.cos(2 * quarter), 0, 1, 0, 1], atol=1e-6)
    assert np.allclose(found[1, :2], [math.sin(3 * quarter), math.cos(3 * quarter)], atol=1e-6)
    sunday, turn = 2 * math.pi * 6 / 7, 2 * math.pi * 364 / 365.25
    assert np.allclose(found[3, 2:6], [math.sin(sunday), math.cos(sunday), math.sin(turn), math.cos(turn)], atol=1e-6)
    assert found[2].tolist() == [0] * 7 + [1], "missing: zeros, and 1 in the last column"
    ages = np.log1p([0.25, 0.0, 1.0])  # days before the evening
    assert np.allclose(found[[0, 1, 3], 6], (ages - ages.mean()) / ages.std(), atol=1e-5)


@pytest.mark.parametrize("unit", [1, 1000, 1_000_000])
def test_unix_time_in_any_unit_is_the_same_time(unit):
    declared = TimestampFeature(column="x")
    seconds = [1_704_110_400, 1_704_132_000, 1_703_000_000]
    dates = [pl.Series([s * 1_000_000]).cast(pl.Datetime("us"))[0] for s in seconds]
    assert np.allclose(encoded(declared, [s * unit for s in seconds]), encoded(declared, dates), atol=1e-6)


def test_rows_outside_training_are_not_used_in_fitting():
    known = np.array([True, True, False])
    table = pl.DataFrame({"item_id": IDS[:3], "colour": ["red", "blue", "green"], "price": [1.0, 3.0, 1000.0]})
    declared = [CategoricalFeature(column="colour"), NumericFeature(column="price")]
    whole = EncodedTable.fit("item", declared, table, ids=table["item_id"], known=known)
    assert whole.arrays[0].tolist() == [3, 2, 1], "green is unknown"
    assert np.allclose(whole.arrays[1], [[-1, 0], [1, 0], [1, 0]]), "mean 2, deviation 1, and 1000 clipped to 3"


def test_buckets_match_blake2b_and_are_the_same_in_every_process():
    words = ["red", "blue", "grün", None]
    declared = CategoricalFeature(column="x", buckets=7)
    by_hand = [
        1 + int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "little") % 7 if w else 0 for w in words
    ]
    assert encoded(declared, ["anything"], words) == by_hand
    code = (
        "import polars as pl; from twotower.features.categorical import ValueVocabulary; "
        f"print(ValueVocabulary(buckets=7).encode(pl.Series({words!r})).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout == f"{by_hand}\n", done.stderr


def test_the_collision_rate_is_reported():
    """1,000 values in 1,000 buckets: a value is alone with probability (1 - 1/1000)^999, 37 %."""
    table = pl.DataFrame({"item_id": range(1000), "x": [f"value {j}" for j in range(1000)]})
    declared = CategoricalFeature(column="x", buckets=1000)
    note = FeatureSet.fit("item", [declared], table, ids=table["item_id"]).encoders[0].note
    rate = float(note.split("buckets, ")[1].split("%")[0])
    assert "1,000 values in 1,000 buckets" in note
    assert rate == pytest.approx(63.2, abs=5)


def test_vectors_from_a_file_are_found_by_id(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[0.0, 2.0], [5.0, 0.0]], dtype=np.float16))
    (tmp_path / "ids.txt").write_text("c\na\n")
    declared = DenseFeature(column="image", file=str(tmp_path / "v.npy"), ids=str(tmp_path / "ids.txt"))
    whole = EncodedTable.fit("item", [declared], None, ids=IDS)
    assert whole.arrays[0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert whole.features.encode([{"image": [0.0, 7.0]}])[0].tolist() == [[0, 1, 0]], "a new item comes with its vector"
    (tmp_path / "ids.txt").write_text("c\n")
    with pytest.raises(InputError, match=r"ids\.txt: 1 ids, .*v\.npy has 2 rows"):
        EncodedTable.fit("item", [declared], None, ids=IDS)


ALL = [
    CategoricalFeature(column="colour"),
    CategoricalFeature(column="shop", buckets=5),
    MultiFeature(column="tags", separator=","),
    NumericFeature(column="price", scale="log"),
    NumericFeature(column="size", scale="quantiles", bins=3),
    DenseFeature(column="image"),
    TimestampFeature(column="since"),
    TextFeature(column="title", min_count=1),
]
TABLE = pl.DataFrame(
    {
        "item_id": IDS,
        "colour": ["red", None, "blue", "red"],
        "shop": [1, 2, 3, None],
        "tags": ["a,b", "b", None, "c"],
        "price": [1.0, None, 3.0, 9.0],
        "size": [1, 2, 3, 4],
        "image": [[1.0, 0.0], None, [0.0, 1.0], [1.0, 1.0]],
        "since": pl.Series(["2024-01-01", None, "2023-05-05", "2022-01-02"]).str.to_date(),
        "title": ["red mug", "a cup", "mug", None],
    }
)


def test_a_fitted_set_is_the_same_after_json_and_files(tmp_path):
    whole = EncodedTable.fit("item", ALL, TABLE, ids=IDS)
    whole.write(tmp_path)
    read = EncodedTable.read(tmp_path, "item")
    assert read.features.declared == whole.features.declared
    for before, after in zip(whole.arrays, read.arrays, strict=True):
        assert before.dtype == after.dtype and np.array_equal(before, after)
    again = read.features.encode(TABLE)
    for before, after in zip(whole.arrays, again, strict=True):
        assert np.array_equal(before, after), "encoding the frame again gives the same arrays"
    assert EncodedTable.read(tmp_path, "query") is None


def test_frames_of_other_libraries_and_dicts_are_the_same():
    features = FeatureSet.fit("item", ALL, TABLE, ids=IDS)
    expected = features.encode(TABLE)
    for rows in (TABLE.to_dicts(), TABLE.to_arrow(), TABLE.to_pandas()):
        for one, other in zip(expected, features.encode(rows), strict=True):
            assert np.allclose(one, other, atol=1e-6)


def test_a_row_with_all_values_missing():
    features = FeatureSet.fit("item", ALL, TABLE, ids=IDS)
    nothing = features.encode([dict.fromkeys(features.columns)])
    for one, other in zip(features.missing(), nothing, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("declared", "value", "message"),
    [
        (NumericFeature(column="price"), "cheap", "column 'price', row 2: expected a number.*found 'cheap'"),
        (NumericFeature(column="price"), float("inf"), "column 'price', row 2: expected a finite number"),
        (NumericFeature(column="price", scale="log"), -2.0, "column 'price', row 2: expected a number above -1"),
        (DenseFeature(column="image"), [1.0], "column 'image', row 2: expected 2 numbers, found 1"),
        (DenseFeature(column="image"), [1.0, float("nan")], "column 'image', row 2: expected only finite numbers"),
        (TimestampFeature(column="since"), "soon", "column 'since', row 2: expected unix time or ISO text.*'soon'"),
    ],
)
def test_an_invalid_value_is_reported_with_column_and_row(declared, value, message):
    features = FeatureSet.fit("item", [declared], TABLE, ids=IDS)
    good = {"price": 2.0, "image": [1.0, 2.0], "since": "2024-01-01"}[declared.column]
    with pytest.raises(InputError, match=f"item features: {message}"):
        features.encode([{declared.column: good}, {declared.column: value}])


def test_an_invalid_value_in_the_table_is_reported_with_the_id():
    table = TABLE.with_columns(price=pl.Series(["1", "2", "much", "3"]))
    with pytest.raises(InputError, match=r"item table: column 'price', item 'c': expected a number.*'much'"):
        FeatureSet.fit("item", [NumericFeature(column="price")], table, ids=IDS)


def test_a_missing_column_is_reported():
    with pytest.raises(InputError, match=r"column 'prize', declared in item_tower\.features, does not exist.*'price'"):
        FeatureSet.fit("item", [NumericFeature(column="prize")], TABLE, ids=IDS)
    with pytest.raises(InputError, match=r"column 'price' needs the item table; give data\.items"):
        FeatureSet.fit("item", [NumericFeature(column="price")], None, ids=IDS)
    features = FeatureSet.fit("item", [NumericFeature(column="price")], TABLE, ids=IDS)
    with pytest.raises(InputError, match="column 'price'"):
        features.encode([{"prize": 3}])
    with pytest.raises(InputError, match="no rows"):
        features.encode([])


@pytest.mark.parametrize(
    ("declared", "values", "message"),
    [
        (MultiFeature(column="x"), ["a|b"], "set the separator"),
        (MultiFeature(column="x"), [3], "expected lists"),
        (CategoricalFeature(column="x"), [["a"]], "kind multi takes lists"),
        (DenseFeature(column="x"), ["[1, 2]"], "expected a list of numbers"),
        (NumericFeature(column="x"), [[1.0]], "expected numbers"),
        (TimestampFeature(column="x"), [[1]], "expected dates"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(declared, values, message):
    with pytest.raises(InputError, match=message):
        fitted(declared, values)
