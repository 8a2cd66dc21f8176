"""Tests of evaluation results: intervals, frames, files, JSON, and queries without targets."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from support.reference_ranking import random_expectation
from support.stand_ins import FakeHoldout, Fixed, Scores, Train
from twotower.data.schema.vocabulary import Vocabulary
from twotower.evaluation import bootstrap_interval, evaluate, evaluate_all, paired_comparison

METRICS = ("Recall", "NDCG", "MRR", "HR")


def small(queries=40, items=30, seed=0):
    random = np.random.default_rng(seed)
    train = Train([random.integers(0, items, 6).tolist() for _ in range(queries)], items)
    train.queries = Vocabulary([f"u{q:02d}" for q in range(queries)])
    holdout = FakeHoldout(
        [row[:3] for row in train.rows], [random.integers(0, items, 2).tolist() for _ in range(queries)]
    )
    holdout.queries = np.arange(queries)
    return train, holdout, Scores(torch.from_numpy(random.random((queries, items))))


def test_intervals_are_those_of_the_values_behind_the_means():
    train, holdout, ranker = small()
    ranker.item_embeddings = torch.randn(30, 4)
    row = evaluate(ranker, holdout, train=train, ks=(1, 5), baselines=False)["model"]
    expected = {f"{m}@{k}" for k in (1, 5) for m in (*METRICS, "novelty", "popularity", "diversity")}
    assert set(row.intervals) == expected
    for name, interval in row.intervals.items():
        values = row.per_query[name]
        assert interval.mean == pytest.approx(row.values[name], nan_ok=True)
        known = bootstrap_interval(values)
        for end in ("low", "high"):
            assert getattr(interval, end) == pytest.approx(getattr(known, end), nan_ok=True)
    assert math.isnan(row.intervals["diversity@1"].mean)
    assert row.intervals["Recall@5"].low < row.values["Recall@5"] < row.intervals["Recall@5"].high
    assert row.intervals is row.intervals  # computed once


def test_rows_can_be_compared_in_pairs():
    train, holdout, ranker = small(400)
    good = Scores(ranker.scores.clone())
    good.scores[torch.arange(400), [t[0] for t in holdout.targets]] += 0.3
    result = evaluate_all({"good": good, "plain": ranker}, holdout, train=train, ks=(5,))
    a, b = (result[name].per_query["NDCG@5"] for name in ("good", "plain"))
    found = paired_comparison(a, b)
    assert found.p_value < 0.01 and found.low > 0
    assert found.difference == pytest.approx(result["good"].values["NDCG@5"] - result["plain"].values["NDCG@5"])
    head = paired_comparison(*(result[name].per_query["head/NDCG@5"] for name in ("good", "plain")))
    assert head.num_queries == result.slice_sizes["head"]["queries"]


def test_per_query_values_as_a_frame_and_as_a_file(tmp_path):
    train, holdout, ranker = small()
    holdout.queries[4] = -1
    result = evaluate(ranker, holdout, train=train, ks=(5,))
    path = result.write_per_query(tmp_path / "new" / "per_query.parquet")
    frame = pl.read_parquet(path)
    assert frame.equals(result.per_query_frame())
    assert [file.name for file in path.parent.iterdir()] == ["per_query.parquet"]  # no partial file next to it
    assert frame.columns[:3] == ["ranker", "query", "query_code"]
    assert frame["ranker"].unique(maintain_order=True).to_list() == ["model", "popularity", "item-kNN", "EASE"]
    for row in result.rows:
        mine = frame.filter(pl.col("ranker") == row.name)
        assert mine["query_code"].to_list() == result.queries.tolist()
        assert mine["query"].to_list() == [None if q < 0 else f"u{q:02d}" for q in result.queries]
        assert set(mine.columns[3:]) == set(row.per_query)
        for name in ("NDCG@5", "tail/Recall@5", "cold queries/NDCG@5"):
            expected = [None if math.isnan(x) else x for x in row.per_query[name]]
            assert mine[name].to_list() == expected
    train.queries = None
    assert "query" not in evaluate(ranker, holdout, train=train, baselines=False).per_query_frame().columns


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    train, holdout, ranker = small()
    result = evaluate(ranker, holdout, train=train, ks=(5,), baselines=False)
    path = tmp_path / "per_query.parquet"
    path.write_text("older")

    def broken(self, target):
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", broken)
    with pytest.raises(OSError, match="disk full"):
        result.write_per_query(path)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_json_contains_intervals_groups_and_the_protocol():
    train, holdout, ranker = small()
    result = json.loads(
        json.dumps(evaluate(ranker, holdout, train=train, ks=(5,)).to_dict(per_query=True), allow_nan=False)
    )
    assert result["protocol"]["catalog"] == "full" and result["protocol"]["exact"] is True
    assert result["slice_groups"]["deciles"][2] == "decile 3"
    assert set(result["slice_groups"]) == {"thirds", "deciles", "cold"}
    row = result["rows"][0]
    assert row["intervals"]["NDCG@5"]["low"] < row["values"]["NDCG@5"] < row["intervals"]["NDCG@5"]["high"]
    assert row["values"]["diversity@5"] is None and row["values"]["Gini@5"] > 0
    assert len(row["per_query"]["decile 3/NDCG@5"]) == result["num_queries"]


def test_an_approximate_index_is_noted():
    train, holdout = Train([[0, 1], [2]], 5), FakeHoldout([[3]], [[1]])
    inexact = Fixed(np.array([[0, 1]]), is_exact=False)
    result = evaluate(inexact, holdout, train=train, ks=(2,), baselines=False, allow_approximate=True, name="HNSW")
    assert result.to_dict()["protocol"]["exact"] is False
    assert "note: HNSW searches an approximate index" in str(result)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_queries_without_targets_are_skipped_or_count_as_zero(exclude_seen):
    """The first query has no target at all, the second only one that is in its history."""
    train, holdout = Train([[0, 1], [2]], 6), FakeHoldout([[0], [1], [2]], [[], [1], [3, 3]])
    ranker = Scores(torch.tensor([[0.0, 1, 2, 5, 4, 3]] * 3))
    given = {"train": train, "ks": (1,), "exclude_seen": exclude_seen, "baselines": False}
    left = 1 if exclude_seen else 2
    skipped, zero = (evaluate(ranker, holdout, empty=empty, **given) for empty in ("skip", "zero"))
    assert skipped.num_empty == zero.num_empty == 3 - left
    assert skipped.num_queries == left and zero.num_queries == 3
    assert skipped["model"].values["Recall@1"] == 1 / left
    assert zero["model"].values["Recall@1"] == pytest.approx(1 / 3)
    assert zero["model"].per_query["NDCG@1"].tolist() == [0, 0, 1]
    assert "left out of the means" in str(skipped) and "counted as 0" in str(zero)
    assert (skipped.to_dict()["protocol"]["empty"], zero.to_dict()["protocol"]["empty"]) == ("skip", "zero")
    # Slices have no zeros: a query without a target in the slice has no value there.
    assert zero["model"].slices["tail"] == skipped["model"].slices["tail"]


def test_a_collapsed_model_scores_like_a_random_ranking():
    """Each query has several random targets, so queries are independent for any fixed order of ties."""
    queries, items, targets, k = 4000, 60, 4, 10
    random = np.random.default_rng(11)
    holdout = FakeHoldout(
        [[]] * queries, [random.choice(items, targets, replace=False).tolist() for _ in range(queries)]
    )
    train = Train([random.integers(0, items, 5).tolist() for _ in range(50)], items)
    row = evaluate(Scores(torch.full((queries, items), 3.3)), holdout, train=train, ks=(k,), baselines=False)["model"]
    for name, expected in zip(METRICS, random_expectation(items, targets, k), strict=True):
        interval = bootstrap_interval(row.per_query[f"{name}@{k}"], level=0.9999)
        assert interval.low < expected < interval.high, name
        assert interval.high - interval.low < 0.15 * expected + 0.02  # narrow enough to be meaningful


def test_an_oracle_of_several_targets_scores_one():
    train, holdout, _ = small(200)
    scores = torch.zeros(200, 30)
    for e, wanted in enumerate(holdout.targets):
        scores[e, wanted] = 1.0
    row = evaluate(Scores(scores), holdout, train=train, ks=(2, 10), baselines=False)["model"]
    assert all(row.values[f"{name}@{k}"] == 1.0 for name in METRICS for k in (2, 10))
    # All targets of a slice are found, but may rank below another target of the query.
    assert all(value["Recall@10"] == 1.0 or math.isnan(value["Recall@10"]) for value in row.slices.values())


@pytest.mark.parametrize("change", [lambda s: s - 1e4, lambda s: s * 1e-3, lambda s: s.exp(), lambda s: -1 / (s + 60)])
def test_only_the_order_of_scores_counts(change):
    train, holdout, _ = small()
    scores = torch.randint(-50, 50, (40, 30), generator=torch.Generator().manual_seed(0)).double()
    results = [
        evaluate(Scores(s), holdout, train=train, baselines=False).to_dict(per_query=True)
        for s in (scores, change(scores))
    ]
    assert results[0] == results[1]
