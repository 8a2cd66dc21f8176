"""Weights of rows from a column and from age, against plain formulas, on training rows only."""

import math

import numpy as np
import polars as pl
import pytest

from twotower.data import Interactions
from twotower.data.loading.row_weights import weigh_rows
from twotower.data.splits import by_time
from twotower.errors import InputError

DAY = 86_400


def interactions(values, *, weight=None, days=None):
    count = len(values)
    frame = pl.DataFrame(
        {
            "user_id": np.arange(count) % 3,
            "item_id": np.arange(count) % 5,
            "timestamp": 1_600_000_000 + DAY * np.arange(count)
            if days is None
            else 1_600_000_000 + DAY * np.array(days),
            "dwell": values,
            **({} if weight is None else {"weight": weight}),
        }
    )
    return Interactions.from_frame(frame, context=["dwell"])


@pytest.mark.parametrize(
    ("rule", "cap", "formula"),
    [
        ("log1p", None, math.log1p),
        ("cap", 30.0, lambda x: min(x, 30.0)),
        ("none", None, float),
    ],
)
def test_each_rule_is_its_formula_times_the_weight_column(rule, cap, formula):
    values = [0.0, 3.5, 30.0, 31.0, 1e6, 0.25]
    data = interactions(values, weight=[1.0, 2.0, 0.5, 1.0, 3.0, 0.0])
    found, quantiles = weigh_rows(data, column="dwell", rule=rule, cap=cap)
    wanted = [formula(x) * w for x, w in zip(data.context["dwell"], data.weights, strict=True)]
    assert found.weights.tolist() == pytest.approx(wanted, rel=1e-6)
    assert quantiles is None and found.weights.dtype == np.float32


def test_a_quantile_is_the_share_of_the_training_rows_with_at_most_the_value():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, 400).astype(float)
    data = interactions(values.tolist())
    found, quantiles = weigh_rows(data, column="dwell", rule="quantile")
    ordered = data.context["dwell"].to_numpy()
    shares = np.array([(ordered <= x).mean() for x in ordered])
    assert np.abs(found.weights - shares).max() <= 0.01 + 1e-6
    assert found.weights.max() == 1.0
    half = np.arange(0, 400, 2)
    part, own = weigh_rows(data, rows=half, column="dwell", rule="quantile")
    shares = np.array([(ordered[half] <= x).mean() for x in ordered])
    assert np.abs(part.weights - shares).max() <= 0.01 + 1e-6 and own != quantiles
    again, kept = weigh_rows(data, rows=half, column="dwell", rule="quantile", quantiles=quantiles)
    assert kept == quantiles and np.array_equal(again.weights, found.weights)


def test_a_row_that_is_a_half_life_older_than_the_newest_training_row_has_half_the_weight():
    data = interactions([1.0] * 5, days=[0, 7, 14, 21, 24])
    found, _ = weigh_rows(data, half_life=7.0)
    times = np.asarray(data.timestamps)
    age = (times.max() - times) / 86_400e6
    assert found.weights.tolist() == pytest.approx((0.5 ** (age / 7.0)).tolist(), rel=1e-6)
    split = by_time(interactions([1.0] * 40), 0.1, 0.2)
    assert weigh_rows(split.train, half_life=7.0)[0].weights.max() == 1.0
    rows = np.flatnonzero(np.asarray(split.train.timestamps) < np.median(split.train.timestamps))
    assert weigh_rows(split.train, rows=rows, half_life=7.0)[0].weights[rows].max() == 1.0


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0, None, 2.0], {"column": "dwell"}, "has 1 value that is missing"),
        ([1.0, -1.0, 2.0], {"column": "dwell"}, "the first is -1.0"),
        (["a", "b", "c"], {"column": "dwell"}, "expected numbers"),
        ([1.0, 1.0, 2.0], {"column": "watched"}, "'watched' was not read"),
    ],
)
def test_messages(values, options, message):
    with pytest.raises(InputError, match=message) as error:
        weigh_rows(interactions(values), **options)
    assert "\n" not in str(error.value)


def test_a_half_life_needs_times():
    data = Interactions.from_frame(pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2]}))
    with pytest.raises(InputError, match="no timestamps"):
        weigh_rows(data, half_life=1.0)
