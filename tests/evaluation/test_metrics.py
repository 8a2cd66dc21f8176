"""Tests of the metrics against plain loops and against trec_eval (through ir_measures)."""

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.reference_ranking import metrics as slow_metrics
from support.reference_ranking import thirds as slow_thirds
from support.stand_ins import compressed
from twotower.evaluation import coverage, hit_rate_at, hits, mrr_at, ndcg_at, popularity_thirds, recall_at


def fast_metrics(ranked, targets, k):
    offsets, items = compressed(targets)
    hit = hits(np.array(ranked, dtype=np.int64), offsets, items)
    sizes = np.diff(offsets)
    return np.stack([recall_at(hit, sizes, k), ndcg_at(hit, sizes, k), mrr_at(hit, k), hit_rate_at(hit, k)], axis=1)


@st.composite
def rankings(draw):
    n, e = draw(st.integers(2, 30)), draw(st.integers(1, 6))
    width = draw(st.integers(1, n))
    ranked, targets = [], []
    for _ in range(e):
        row = draw(st.permutations(range(n)))[:width]
        filled = draw(st.integers(0, width))
        ranked.append(row[:filled] + [-1] * (width - filled))
        targets.append(draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)))
    return ranked, targets, draw(st.integers(1, width))


@settings(max_examples=100, deadline=None)
@given(rankings())
def test_metrics_equal_slow_loops(case):
    ranked, targets, k = case
    expected = [slow_metrics(row, set(wanted), k) for row, wanted in zip(ranked, targets, strict=True)]
    np.testing.assert_allclose(fast_metrics(ranked, targets, k), expected, rtol=1e-12)


def random_rankings(seed=0, queries=40, items=60, width=25):
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:width] for _ in range(queries)])
    return ranked, [rng.choice(items, size=rng.integers(1, 30), replace=False).tolist() for _ in range(queries)]


def trec(ranked, targets, k):
    """Return recall, NDCG, reciprocal rank and success at k by trec_eval, [E, 4]."""
    qrels = [ir_measures.Qrel(str(q), str(item), 1) for q, row in enumerate(targets) for item in row]
    run = [
        ir_measures.ScoredDoc(str(q), str(item), 1000.0 - rank)
        for q, row in enumerate(ranked)
        for rank, item in enumerate(row)
    ]
    names = [f"R@{k}", f"nDCG@{k}", f"RR@{k}", f"Success@{k}"]
    result = np.full((len(ranked), 4), np.nan)
    for value in ir_measures.iter_calc([ir_measures.parse_measure(name) for name in names], qrels, run):
        result[int(value.query_id), names.index(str(value.measure))] = value.value
    return result


@pytest.mark.parametrize("k", [1, 5, 10, 25])
def test_metrics_equal_an_independent_library(k):
    ranked, targets = random_rankings(k)
    np.testing.assert_allclose(fast_metrics(ranked, targets, k), trec(ranked, targets, k), atol=1e-6)


def test_the_comparison_can_fail():
    """Common wrong variants differ from the right ones on the same data by more than the tolerance."""
    k = 10
    ranked, targets = random_rankings(1)
    right = trec(ranked, targets, k)
    offsets, items = compressed(targets)
    hit, sizes = hits(ranked, offsets, items), np.diff(offsets)
    discount = 1 / np.log2(np.arange(2, k + 2))
    wrong = {
        "recall divided by min(K, targets)": (0, hit[:, :k].sum(1) / np.minimum(sizes, k)),
        "ideal over all targets": (
            1,
            hit[:, :k] @ discount / [sum(1 / math.log2(r + 2) for r in range(s)) for s in sizes],
        ),
        "ideal of a single target": (1, hit[:, :k] @ discount),
        "discount from rank 2": (1, ndcg_at(hit, sizes, k) * math.log2(2) / math.log2(3)),
        "ranks from 0": (2, np.where(hit[:, :k].any(1), 1 / np.maximum(hit[:, :k].argmax(1), 1), 0)),
        "mean of hits": (3, hit[:, :k].mean(1)),
    }
    for name, (column, values) in wrong.items():
        assert not np.allclose(values, right[:, column], atol=1e-6), name


def test_hits_of_large_codes():
    """Codes above 2^24 and 2^32 stay distinct: nothing passes through float32 or int32."""
    big = 2**33
    ranked = np.array([[big, big + 1], [2**24 + 1, -1]], dtype=np.int64)
    found = hits(ranked, np.array([0, 1, 2]), np.array([big + 1, 2**24]))
    assert found.tolist() == [[False, True], [False, False]]
    with pytest.raises(ValueError, match="64 bits"):
        hits(np.full((4, 1), 2**62, dtype=np.int64), np.array([0, 1, 1, 1, 1]), np.array([1]))


def test_hits_repeats_and_nothing():
    assert hits(np.array([[1, 2, -1]]), np.array([0, 3]), np.array([2, 2, 2])).tolist() == [[False, True, False]]
    assert not hits(np.array([[1, -1]]), np.array([0, 0]), np.array([], dtype=np.int32)).any()
    assert hits(np.empty((0, 3), dtype=np.int64), np.array([0]), np.array([], dtype=np.int32)).shape == (0, 3)
    with pytest.raises(ValueError, match="target_offsets"):
        hits(np.array([[1]]), np.array([0]), np.array([1]))


def test_a_query_without_targets_is_zero():
    hit, sizes = np.zeros((1, 3), dtype=bool), np.array([0])
    assert recall_at(hit, sizes, 3) == ndcg_at(hit, sizes, 3) == mrr_at(hit, 3) == hit_rate_at(hit, 3) == 0.0


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="k must be"):
        mrr_at(np.zeros((1, 3), dtype=bool), k)


def test_coverage():
    assert coverage(np.array([[0, 1], [1, -1]]), 4) == 0.5
    assert coverage(np.array([[-1]]), 4) == 0.0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_thirds_equal_slow_loops(counts):
    assert popularity_thirds(np.array(counts)).tolist() == slow_thirds(counts)


def test_thirds_by_hand():
    assert popularity_thirds(np.array([1, 10, 0, 5, 5, 9])).tolist() == [2, 0, 2, 1, 2, 1]
    assert popularity_thirds(np.array([1, 1, 1])).tolist() == [0, 1, 2]
    assert popularity_thirds(np.zeros(2, dtype=np.int64)).tolist() == [2, 2]
