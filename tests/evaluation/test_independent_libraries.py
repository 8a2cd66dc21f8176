"""Tests of evaluation against ranx and ir_measures: random scores with ties, repeats, no or several positives."""

import os

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.reference_ranking import top_items
from support.stand_ins import FakeHoldout, Scores, Train
from twotower.evaluation import evaluate

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # before ranx: compiling it takes longer than all tests of this folder
ranx = pytest.importorskip("ranx")


@st.composite
def problems(draw):
    n, e = draw(st.integers(2, 20)), draw(st.integers(1, 6))
    item = st.integers(0, n - 1)
    histories = draw(st.lists(st.lists(item, max_size=n), min_size=e, max_size=e))
    targets = draw(st.lists(st.lists(item, max_size=6), min_size=e, max_size=e))  # with repeats, and empty ones
    scores = draw(st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=e, max_size=e))  # ties
    return n, histories, targets, scores, draw(st.integers(1, n)), draw(st.booleans())


def asked_of(problem):
    """Return (queries with targets left, their targets, their ranked lists), with the documented order of ties."""
    _, histories, targets, scores, k, exclude_seen = problem
    wanted = [set(t) - (set(h) if exclude_seen else set()) for t, h in zip(targets, histories, strict=True)]
    counted = [e for e, left in enumerate(wanted) if left]
    lists = [top_items(scores[e], k, histories[e] if exclude_seen else ()) for e in counted]
    return counted, [wanted[e] for e in counted], [[item for item in ranked if item >= 0] for ranked in lists]


def by_ranx(wanted, lists, k):
    qrels = {str(q): {str(item): 1 for item in left} for q, left in enumerate(wanted)}
    # If everything is excluded the list is empty, which ranx does not support; a non-target item is equivalent.
    run = {
        str(q): {str(item): 1.0 / rank for rank, item in enumerate(ranked, start=1)} or {"none": 1.0}
        for q, ranked in enumerate(lists)
    }
    names = {"Recall": f"recall@{k}", "NDCG": f"ndcg@{k}", "MRR": f"mrr@{k}", "HR": f"hit_rate@{k}"}
    found = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(names.values()), return_mean=False)
    order = np.argsort([int(q) for q in sorted(qrels)])  # ranx sorts queries as text
    return {metric: np.asarray(found[name])[order] for metric, name in names.items()}


def by_trec_eval(wanted, lists, k):
    qrels = [ir_measures.Qrel(str(q), str(item), 1) for q, left in enumerate(wanted) for item in left]
    run = [
        ir_measures.ScoredDoc(str(q), str(item), 1000.0 - rank)
        for q, ranked in enumerate(lists)
        for rank, item in enumerate(ranked or ["none"])
    ]
    names = {"Recall": f"R@{k}", "NDCG": f"nDCG@{k}", "MRR": f"RR@{k}", "HR": f"Success@{k}"}
    measures = {ir_measures.parse_measure(name): metric for metric, name in names.items()}
    found = {metric: np.full(len(wanted), np.nan) for metric in names}
    for value in ir_measures.iter_calc(list(measures), qrels, run):
        found[measures[value.measure]][int(value.query_id)] = value.value
    return found


def evaluated(problem):
    n, histories, targets, scores, k, exclude_seen = problem
    return evaluate(
        Scores(torch.tensor(scores).float()), FakeHoldout(histories, targets), train=Train([[0]], n), ks=(k,),
        exclude_seen=exclude_seen, baselines=False,
    )  # fmt: skip


@pytest.mark.parametrize("library", [by_ranx, by_trec_eval])
@settings(max_examples=50, deadline=None)
@given(problems())
def test_every_ranking_metric_equals_that_of_a_library(library, problem):
    counted, wanted, lists = asked_of(problem)
    k = problem[4]
    if not counted:
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluated(problem)
        return
    row = evaluated(problem)["model"]
    for metric, expected in library(wanted, lists, k).items():
        np.testing.assert_allclose(row.per_query[f"{metric}@{k}"], expected, atol=1e-6, err_msg=metric)
        assert row.values[f"{metric}@{k}"] == pytest.approx(expected.mean(), abs=1e-6)


def random_problem(seed, n=60, e=50):
    random = np.random.default_rng(seed)
    targets = [random.choice(n, size=random.integers(1, 30), replace=False).tolist() for _ in range(e)]
    histories = [random.choice(n, size=random.integers(0, 20)).tolist() for _ in range(e)]
    return n, histories, targets, random.integers(0, 8, (e, n)).tolist(), 20, True


@pytest.mark.parametrize("library", [by_ranx, by_trec_eval])
def test_larger_lists_and_the_comparison_can_fail(library):
    problem = random_problem(0)
    _, wanted, lists = asked_of(problem)
    expected = library(wanted, lists, 20)
    row = evaluated(problem)["model"]
    for metric, values in expected.items():
        np.testing.assert_allclose(row.per_query[f"{metric}@20"], values, atol=1e-6)
    # Another order of ties gives other numbers, so the agreement above is not for lack of ties.
    other = [sorted(ranked, reverse=True) for ranked in lists]
    assert not np.allclose(row.per_query["NDCG@20"], library(wanted, other, 20)["NDCG"], atol=1e-6)
