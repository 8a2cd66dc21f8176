"""Means over test windows, and their intervals, against a bootstrap that resamples whole queries."""

import numpy as np
import polars as pl
import pytest

from twotower.evaluation.windows import WindowTable, window_mean


def values_of(seed: int, shared: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw three windows of 300 of 400 queries; `shared` of a value's variance belongs to the query."""
    random = np.random.default_rng(seed)
    taste = random.normal(size=400)
    found = []
    for window in range(3):
        queries = np.sort(random.choice(400, 300, replace=False))
        noise = random.normal(size=300)
        found.append((queries, window + np.sqrt(shared) * taste[queries] + np.sqrt(1 - shared) * noise))
    return found


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_the_interval_is_that_of_a_bootstrap_over_queries(shared):
    windows = values_of(0, shared)
    found = window_mean(windows)
    assert found.by_window == pytest.approx([values.mean() for _, values in windows])
    assert found.mean == pytest.approx(np.mean(found.by_window))
    random, means = np.random.default_rng(1), []
    for _ in range(4000):
        count = np.bincount(random.integers(0, 400, 400), minlength=400)
        means.append(np.mean([np.average(values, weights=count[queries]) for queries, values in windows]))
    error = np.std(means)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    independent = np.sqrt(sum(values.var(ddof=1) / len(values) for _, values in windows)) / 3
    assert (error > 1.25 * independent) == (shared > 0), "a query in several windows does not count several times"


def test_one_window_is_a_mean_with_its_standard_error():
    values = np.random.default_rng(0).random(50)
    found = window_mean([(np.arange(50), values)])
    assert (found.high - found.mean) == pytest.approx(1.959964 * values.std(ddof=1) / np.sqrt(50))
    assert np.isnan(window_mean([(np.arange(1), values[:1])]).low)


def test_only_rankers_of_every_window_are_in_the_table():
    frames = [
        pl.DataFrame({"ranker": [*["model"] * 2, *[other] * 2], "query_code": [0, 1, 0, 1], "NDCG@10": [0.0, 1, 0, 0]})
        for other in ("EASE", "newest")
    ]
    table = WindowTable.of(frames, ["2020-01-01", "2020-02-01"], ["NDCG@10"])
    assert list(table.rows) == ["model"]
    assert table.to_dict()["rows"]["model"]["NDCG@10"]["by_window"] == [0.5, 0.5]
