"""Tests of intervals and comparisons against scipy, closed forms, simulation and loops over the definitions."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from twotower.evaluation import bootstrap_interval, holm, paired_comparison, significance
from twotower.evaluation.significance import bootstrap_intervals

TOLERANCE = 4  # standard errors of a simulated share: one false failure in 16,000


def like_ndcg(random, shape):
    """Draw skewed values like metrics of single queries: 75 % zeros, the rest in (0, 1], mostly small."""
    return np.where(random.random(shape) < 0.75, 0.0, random.beta(1.0, 3.0, shape))


MEAN_LIKE_NDCG = 0.25 * 0.25


def covered(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def assert_share(found, expected, count):
    assert abs(found - expected) < TOLERANCE * math.sqrt(expected * (1 - expected) / count), (found, expected)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_an_interval_covers_the_true_mean_at_its_level(level):
    # The columns share the resampling draws and are otherwise independent data sets.
    intervals = bootstrap_intervals(like_ndcg(np.random.default_rng(1), (400, 1500)), level=level)
    assert_share(covered(intervals, MEAN_LIKE_NDCG), level, 1500)


def test_the_coverage_test_can_fail():
    """The same tolerance rejects an interval that is a fifth too narrow and one that ignores query differences."""
    intervals = bootstrap_intervals(like_ndcg(np.random.default_rng(1), (400, 1500)))
    narrow = [
        significance.Interval(i.mean, i.mean + 0.8 * (i.low - i.mean), i.mean + 0.8 * (i.high - i.mean), 0.95)
        for i in intervals
    ]
    with pytest.raises(AssertionError):
        assert_share(covered(narrow, MEAN_LIKE_NDCG), 0.95, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [200, 1000, 3000])
def test_coverage_of_many_data_sets(queries):
    random = np.random.default_rng(queries)
    shares = [
        covered(bootstrap_intervals(like_ndcg(random, (queries, 1000)), seed=s), MEAN_LIKE_NDCG) for s in range(10)
    ]
    # With few queries the remaining skew is known to cost up to one point of coverage, and may not cost more.
    assert abs(np.mean(shares) - 0.95) < (0.01 if queries < 1000 else 0.006), shares


def test_the_ends_are_those_of_an_independent_library():
    values = np.random.default_rng(0).exponential(size=120)
    mine = bootstrap_interval(values, resamples=40_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert mine.mean == pytest.approx(values.mean())
    assert abs(mine.low - theirs.low) < 0.02 * width and abs(mine.high - theirs.high) < 0.02 * width
    # Right-skewed: the upper side is longer, unlike in a normal-theory interval.
    assert mine.high - mine.mean > 1.1 * (mine.mean - mine.low)


def test_intervals_of_few_values():
    assert math.isnan(bootstrap_interval([]).mean)
    assert math.isnan(bootstrap_interval([math.nan]).mean)
    one = bootstrap_interval([0.5, math.nan])
    assert one.mean == 0.5 and math.isnan(one.low) and math.isnan(one.high)
    assert one.to_dict() == {"mean": 0.5, "low": None, "high": None, "level": 0.95}
    same = bootstrap_interval([0.1] * 7)
    assert (same.low, same.high) == (same.mean, same.mean) and same.mean == pytest.approx(0.1)


def test_nan_is_ignored_and_the_seed_decides():
    values = like_ndcg(np.random.default_rng(3), 200)
    holes = np.insert(values, [5, 90, 200], np.nan)
    assert bootstrap_interval(holes) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_blocks_change_nothing(monkeypatch):
    a, b = np.random.default_rng(4).random((2, 150))
    whole = bootstrap_interval(a), paired_comparison(a, b)
    monkeypatch.setattr(significance, "_BLOCK", 1000)
    split = bootstrap_interval(a), paired_comparison(a, b)
    assert [round(x, 12) for one in whole for x in vars(one).values()] == [
        round(x, 12) for one in split for x in vars(one).values()
    ]


def differences(random, queries, shift=0.0):
    """Draw two models' values on the same queries: queries differ much, models little."""
    query = random.exponential(size=queries)
    return query + random.exponential(size=queries) + shift, query + random.exponential(size=queries)


def rejected(method, count, queries, seed, shift=0.0, make=differences):
    random = np.random.default_rng(seed)
    found = [
        paired_comparison(*make(random, queries, shift), method=method, resamples=399, seed=run) for run in range(count)
    ]
    return np.mean([comparison.p_value < 0.05 for comparison in found])


@pytest.mark.parametrize("method", ["bootstrap", "t-test"])
def test_false_positives_of_equal_models(method):
    assert_share(rejected(method, 1000, 100, seed=5), 0.05, 1000)


@pytest.mark.parametrize("method", ["bootstrap", "t-test"])
def test_power_against_the_closed_form(method):
    """d_z = 0.3 over 100 queries: Student's noncentral distribution gives the power."""
    shift = 0.3 * math.sqrt(2)  # the difference of two exponentials has variance 2
    limit = stats.t.ppf(0.975, 99)
    power = stats.nct.sf(limit, 99, 3.0) + stats.nct.cdf(-limit, 99, 3.0)
    found = rejected(method, 500, 100, seed=6, shift=shift)
    assert abs(found - power) < TOLERANCE * math.sqrt(power * (1 - power) / 500) + 0.01
    assert found > 0.75


def test_the_false_positive_test_can_fail():
    """Copied queries are not new queries: a test that counts them has too many false positives, which is detected."""

    def copied(random, queries, shift):
        a, b = differences(random, queries // 3, shift)
        return np.tile(a, 3), np.tile(b, 3)

    with pytest.raises(AssertionError):
        assert_share(rejected("t-test", 1000, 99, seed=5, make=copied), 0.05, 1000)


def skewed(random, queries, shift):
    """Draw skewed differences of mean 0: a few queries gain much, most lose a little."""
    query = random.random(queries)
    return query + random.exponential(size=queries) - 1.0 + shift, query


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bootstrap", "t-test"])
@pytest.mark.parametrize("make", [differences, skewed])
def test_false_positives_of_many_comparisons(method, make):
    found = rejected(method, 8000, 300, seed=7, make=make)
    assert abs(found - 0.05) < 0.01, found


@pytest.mark.parametrize("queries", [3, 20, 200])
def test_the_t_test_is_that_of_an_independent_library(queries):
    a, b = differences(np.random.default_rng(queries), queries, 0.2)
    mine, theirs = paired_comparison(a, b, method="t-test", level=0.9), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.9)
    assert mine.p_value == pytest.approx(theirs.pvalue)
    assert (mine.low, mine.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert mine.effect_size == pytest.approx(np.mean(a - b) / np.std(a - b, ddof=1))
    assert mine.num_queries == queries


def test_both_methods_agree_where_differences_are_normal():
    a = np.random.default_rng(8).normal(0.02, 0.2, 500)
    tested, drawn = (
        paired_comparison(a, np.zeros(500), method=method, resamples=20_000) for method in ("t-test", "bootstrap")
    )
    assert drawn.p_value == pytest.approx(tested.p_value, abs=0.01)
    assert drawn.low == pytest.approx(tested.low, abs=0.001) and drawn.high == pytest.approx(tested.high, abs=0.001)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.8, 0.95]))
def test_interval_and_p_value_are_consistent(seed, queries, shift, level):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 3, (2, queries)) + np.array([[shift], [0.0]])
    for method in ("bootstrap", "t-test"):
        found = paired_comparison(a, b, method=method, level=level, resamples=399)
        swapped = paired_comparison(b, a, method=method, level=level, resamples=399)
        assert swapped.difference == -found.difference and swapped.p_value == found.p_value
        if math.isnan(found.low):
            assert found.p_value > 1 - level - 1e-9
        else:
            assert found.low <= found.difference <= found.high
            assert (not found.low <= 0 <= found.high) == (found.p_value <= 1 - level + 1e-9)


def test_no_difference_one_difference_and_too_few_queries():
    a = np.random.default_rng(9).random(50)
    same = paired_comparison(a, a)
    assert (same.difference, same.low, same.high, same.p_value, same.effect_size) == (0, 0, 0, 1, 0)
    above = paired_comparison(a + 0.5, a)
    assert above.difference == pytest.approx(0.5) and above.effect_size == math.inf
    assert above.p_value == pytest.approx(1 / 2001)
    assert above.to_dict()["effect_size"] is None
    json.dumps(above.to_dict(), allow_nan=False)
    one = paired_comparison([1.0, math.nan, 2.0], [0.5, 1.0, math.nan])
    assert one.num_queries == 1 and one.difference == 0.5 and math.isnan(one.p_value)
    rare = np.zeros(100)
    rare[7] = 1.0  # one query in a hundred differs: a third of the resamples have no difference
    found = paired_comparison(rare, np.zeros(100))
    assert found.p_value > 0.3 and math.isnan(found.low) and math.isnan(found.high)


def step_down(p_values, alpha):
    """Apply Holm's procedure as published: reject the smallest while it is at most alpha over the number left."""
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] <= alpha / len(left):
        rejected.add(left.pop(0))
    return rejected


@given(st.lists(st.integers(0, 40).map(lambda x: x / 80), min_size=1, max_size=8), st.integers(1, 99))
def test_holm_rejects_what_the_procedure_rejects(p_values, hundredths):
    alpha = hundredths / 100 + 1e-4  # differs from every p-value times a small integer
    adjusted = holm(p_values)
    assert {i for i, p in enumerate(adjusted) if p <= alpha} == step_down(p_values, alpha)
    assert (adjusted >= p_values).all() and (adjusted <= 1).all()


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, math.nan, 0.5]), [0.02, math.nan, 0.5])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([[1.0]]), "one-dimensional"),
        (lambda: bootstrap_interval([1.0], level=1.0), "level"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples"),
        (lambda: bootstrap_intervals(np.full((2, 2), np.nan)), "NaN"),
        (lambda: paired_comparison([1.0], [1.0, 2.0]), "same queries"),
        (lambda: paired_comparison([1.0], [1.0], method="wilcoxon"), "method"),
        (lambda: holm([1.1]), "0, 1"),
    ],
)
def test_settings_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
