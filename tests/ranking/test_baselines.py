"""Tests of the baselines against plain loops and dense algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.reference_ranking import knn_scores, top_items
from support.stand_ins import FakeHoldout, Train
from twotower.evaluation import evaluate
from twotower.ranking import EASE, ItemKNN, Popularity, baselines


@st.composite
def worlds(draw):
    n = draw(st.integers(2, 15))
    item = st.integers(0, n - 1)
    rows = draw(st.lists(st.lists(item, max_size=10), min_size=1, max_size=8))
    histories = draw(st.lists(st.lists(item, max_size=10), min_size=1, max_size=4))
    return (
        Train(rows, n),
        FakeHoldout(histories, [[0]] * len(histories)),
        draw(st.integers(1, n + 2)),
        draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_popularity_equals_slow_loops(world):
    train, holdout, k, exclude_seen = world
    counts = train.item_counts().tolist()
    expected = [top_items(counts, k, history if exclude_seen else ()) for history in holdout.histories]
    assert Popularity(train).rank(holdout, k, exclude_seen).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(worlds(), st.sampled_from([1, 2, 5, None]), st.sampled_from([0.0, 3.0]))
def test_item_knn_equals_slow_loops(world, neighbours, shrink):
    train, holdout, k, exclude_seen = world
    ranked = ItemKNN(train, neighbours, shrink).rank(holdout, k, exclude_seen).tolist()
    for history, row in zip(holdout.histories, ranked, strict=True):
        scores = knn_scores(train.rows, train.num_items, history, neighbours or train.num_items, shrink)
        left = set(range(train.num_items)) - (set(history) if exclude_seen else set())
        found = [item for item in row if item >= 0]
        assert len(found) == min(k, len(left))
        assert set(found) <= left
        # Items tied in float64 may differ in float32, and the other way round, so compare the scores found.
        best = sorted((scores[item] for item in left), reverse=True)[: len(found)]
        np.testing.assert_allclose([scores[item] for item in found], best, atol=1e-5)


def random_world(seed=0, queries=200, items=60):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, items, size=rng.integers(0, 25)).tolist() for _ in range(queries)]
    return Train(rows, items), FakeHoldout(rows[:50], [[0]] * 50)


def dense(rows, num_items):
    matrix = np.zeros((len(rows), num_items))
    for query, row in enumerate(rows):
        matrix[query, row] = 1.0
    return matrix


@pytest.mark.parametrize("block", [1, 500, 1 << 24])
def test_cooccurrences_in_blocks(monkeypatch, block):
    monkeypatch.setattr(baselines, "_BLOCK_PAIRS", block)
    train, _ = random_world()
    matrix = dense(train.rows, train.num_items)
    np.testing.assert_array_equal(baselines.gram(train).numpy(), matrix.T @ matrix)


def test_item_knn_does_not_depend_on_blocks(monkeypatch):
    train, holdout = random_world(1)
    whole = ItemKNN(train, 7, 0.0).rank(holdout, 10, True)
    monkeypatch.setattr(baselines, "_BLOCK_PAIRS", 100)
    monkeypatch.setattr(baselines, "_TILE_ELEMENTS", 1000)
    assert torch.equal(ItemKNN(train, 7, 0.0).rank(holdout, 10, True), whole)


def test_ease_solves_its_objective():
    """W minimises |X - XW|^2 + l2 |W|^2 with zero diagonal: for each column, ridge regression on the others."""
    train, holdout = random_world(2, items=20)
    matrix, l2 = dense(train.rows, 20), 3.0
    weights = np.zeros((20, 20))
    for j in range(20):
        others = [i for i in range(20) if i != j]
        x = matrix[:, others]
        weights[others, j] = np.linalg.solve(x.T @ x + l2 * np.eye(19), x.T @ matrix[:, j])
    scores = dense(holdout.histories, 20) @ weights
    ranked = EASE(train, l2).rank(holdout, 5, False).numpy()
    np.testing.assert_allclose(np.take_along_axis(scores, ranked, 1), -np.sort(-scores, axis=1)[:, :5], atol=1e-4)


def test_settings_are_checked():
    train, _ = random_world()
    for call, message in [
        (lambda: ItemKNN(train, 0), "neighbours"),
        (lambda: ItemKNN(train, shrink=-1.0), "shrink"),
        (lambda: EASE(train, 0.0), "l2"),
        (lambda: EASE(Train([[0]], 20_001)), "dense"),
        (lambda: ItemKNN(Train([[0]], 20_001), None), "dense"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_item_knn_on_too_large_data_is_left_out_with_a_note(monkeypatch):
    train, holdout = random_world()
    monkeypatch.setattr(baselines, "_MAX_PAIRS", 10)
    with pytest.raises(ValueError, match="item pairs"):
        ItemKNN(train)
    holdout = FakeHoldout([[1], [2]], [[3], [4]])
    result = evaluate(Popularity(train), holdout, train=train, ks=(5,))
    assert [row.name for row in result.rows] == ["model", "popularity"]
    assert "item-kNN baseline was left out" in str(result)
