"""Tests of beyond-accuracy metrics against loops over their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.reference_ranking import beyond_accuracy, top_items
from support.stand_ins import FakeHoldout, Scores, Train
from twotower.evaluation import diversity_at, evaluate, exposure, gini, list_mean, metrics, self_information


@st.composite
def problems(draw):
    n, e = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    item = st.integers(0, n - 1)
    train = Train(draw(st.lists(st.lists(item, max_size=8), min_size=1, max_size=6)), n)
    histories = draw(st.lists(st.lists(item, max_size=n), min_size=e, max_size=e))
    targets = draw(st.lists(st.lists(item, max_size=3), min_size=e, max_size=e))
    scores = draw(st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=e, max_size=e))
    embeddings = draw(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=n, max_size=n))
    return train, FakeHoldout(histories, targets), scores, embeddings, draw(st.integers(1, n + 1))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_beyond_accuracy_equals_slow_loops(problem):
    train, holdout, scores, embeddings, k = problem
    ranker = Scores(torch.tensor(scores).float())
    ranker.item_embeddings = torch.tensor(embeddings).float()
    values = evaluate(ranker, holdout, train=train, ks=(1, k), exclude_seen=True, baselines=False, empty="zero")[
        "model"
    ].values
    for cut in (1, k):
        lists = [top_items(row, cut, history) for row, history in zip(scores, holdout.histories, strict=True)]
        expected = beyond_accuracy(lists, train.item_counts().tolist(), embeddings, cut)
        for name, value in zip(("coverage", "Gini", "novelty", "popularity", "diversity"), expected, strict=True):
            assert values[f"{name}@{cut}"] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_without_embeddings_there_is_no_diversity():
    train, holdout = Train([[0, 1], [2]], 5), FakeHoldout([[3]], [[1]])
    values = evaluate(Scores(torch.rand(1, 5)), holdout, train=train, ks=(2,), baselines=False)["model"].values
    assert math.isnan(values["diversity@2"]) and not math.isnan(values["novelty@2"])
    ranker = Scores(torch.rand(1, 5))
    ranker.item_embeddings = torch.rand(4, 2)
    with pytest.raises(ValueError, match="item_embeddings must be"):
        evaluate(ranker, holdout, train=train, ks=(2,), baselines=False)


def test_extremes_by_hand():
    assert gini([3, 3, 3]) == 0.0
    assert gini([0, 0, 0, 8]) == pytest.approx(1 - 1 / 4)
    assert math.isnan(gini([0, 0]))
    assert exposure(np.array([[0, 2], [2, -1]]), 4).tolist() == [1, 0, 2, 0]
    # Item 0 has 3 of 4 interactions; with one added to each of 4 items p = 4/8, 2/8, 1/8, 1/8.
    np.testing.assert_allclose(self_information(np.array([3, 1, 0, 0])), [1, 2, 3, 3])
    assert (2.0 ** -self_information(np.arange(50))).sum() == pytest.approx(1.0)
    assert list_mean(np.array([[0, 3], [-1, -1]]), np.array([1, 2, 3, 4]), 2)[0] == 2.5
    opposite = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 5.0]])
    two, one = diversity_at(np.array([[0, 1], [0, 2], [2, -1]]), opposite, (2, 1))
    np.testing.assert_allclose(two, [2.0, 1.0, np.nan])
    assert np.isnan(one).all()


def test_diversity_does_not_depend_on_blocks(monkeypatch):
    random = np.random.default_rng(0)
    ranked = np.stack([random.permutation(50)[:10] for _ in range(30)])
    vectors = random.normal(size=(50, 8))
    whole = diversity_at(ranked, vectors, (3, 10))
    monkeypatch.setattr(metrics, "_BLOCK", 200)
    for a, b in zip(whole, diversity_at(ranked, vectors, (3, 10)), strict=True):
        np.testing.assert_array_equal(a, b)
