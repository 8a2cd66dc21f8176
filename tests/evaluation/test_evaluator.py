"""Tests of `evaluate` against plain loops, of its errors and of its notes."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from support.reference_ranking import metrics as slow_metrics
from support.reference_ranking import thirds, top_items
from support.stand_ins import FakeHoldout, Fixed, Scores, Train
from twotower.evaluation import evaluate, evaluate_all


@st.composite
def problems(draw):
    n, e = draw(st.integers(2, 25)), draw(st.integers(1, 6))
    item = st.integers(0, n - 1)
    train = Train(draw(st.lists(st.lists(item, max_size=8), min_size=1, max_size=6)), n)
    histories = draw(st.lists(st.lists(item, max_size=2 * n), min_size=e, max_size=e))
    targets = draw(st.lists(st.lists(item, max_size=5, unique=True), min_size=e, max_size=e))
    scores = draw(st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=e, max_size=e))
    ks = draw(st.lists(st.integers(1, n + 3), min_size=1, max_size=3))
    return (
        train,
        FakeHoldout(histories, targets),
        scores,
        ks,
        draw(st.booleans()),
        draw(st.sampled_from(["skip", "zero"])),
    )


@settings(max_examples=80, deadline=None)
@given(problems())
def test_full_ranking_equals_a_brute_force_reference(problem):
    train, holdout, scores, ks, exclude_seen, empty = problem
    ranker = Scores(torch.tensor(scores).float())
    wanted = [
        set(t) - (set(h) if exclude_seen else set()) for t, h in zip(holdout.targets, holdout.histories, strict=True)
    ]
    counted = [e for e in range(len(wanted)) if wanted[e] or empty == "zero"]
    if not counted:
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(ranker, holdout, train=train, ks=ks, exclude_seen=exclude_seen, empty=empty, baselines=False)
        return
    result = evaluate(ranker, holdout, train=train, ks=ks, exclude_seen=exclude_seen, empty=empty, baselines=False)
    assert result.num_removed == sum(map(len, holdout.targets)) - sum(map(len, wanted))
    assert result.num_empty == sum(not targets for targets in wanted)
    assert result.num_targets == sum(map(len, wanted))
    assert result.queries.tolist() == holdout.queries[counted].tolist()
    part = thirds(train.item_counts().tolist())
    row = result["model"]
    for k in ks:
        lists = [top_items(scores[e], k, holdout.histories[e] if exclude_seen else ()) for e in counted]
        slow = [
            slow_metrics(r, wanted[e], k) if wanted[e] else (0, 0, 0, 0) for r, e in zip(lists, counted, strict=True)
        ]
        for place, name in enumerate(("Recall", "NDCG", "MRR", "HR")):
            np.testing.assert_allclose(row.per_query[f"{name}@{k}"], [values[place] for values in slow])
            assert row.values[f"{name}@{k}"] == pytest.approx(math.fsum(v[place] for v in slow) / len(slow))
        assert row.values[f"coverage@{k}"] == len({i for r in lists for i in r if i >= 0}) / train.num_items
        for number, label in enumerate(("head", "mid", "tail")):
            inside = [{i for i in wanted[e] if part[i] == number} for e in counted]
            slow = [slow_metrics(r, t, k)[:2] for r, t in zip(lists, inside, strict=True) if t]
            assert result.slice_sizes[label]["queries"] == len(slow)
            for place, name in enumerate(("Recall", "NDCG")):
                value = row.slices[label][f"{name}@{k}"]
                assert value == pytest.approx(np.mean([s[place] for s in slow])) if slow else math.isnan(value)
    json.dumps(result.to_dict(per_query=True), allow_nan=False)
    assert str(result)


def popular_world(queries=2000, items=200, seed=0):
    """Build data whose item codes follow popularity, as codes assigned by frequency or by time do."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, items + 1)
    rows = [rng.choice(items, size=6, replace=False, p=weight / weight.sum()).tolist() for _ in range(queries)]
    return Train([row[:5] for row in rows], items), FakeHoldout([row[:5] for row in rows], [row[5:] for row in rows])


def test_a_collapsed_model_scores_like_random():
    train, holdout = popular_world()
    k, n = 20, train.num_items - 5
    rng = np.random.default_rng(1)
    result = evaluate_all(
        {"constant": Scores(torch.full((2000, 200), 0.7)), "random": Scores(torch.from_numpy(rng.random((2000, 200))))},
        holdout, train=train, ks=(k,),
    )  # fmt: skip
    # Skewed targets all hit or all miss a fixed list, so the expectation here is over the choice of the list.
    share = np.bincount([t[0] for t in holdout.targets], minlength=200) / 2000
    error = math.sqrt(k * (1 - k / n)) * share.std(ddof=1)
    assert abs(result["constant"].values[f"Recall@{k}"] - k / n) < 3 * error
    assert abs(result["random"].values[f"Recall@{k}"] - k / n) < 4 * math.sqrt(k / n / 2000)
    # Breaking ties by code would look like a good model, so this test can fail.
    by_code = evaluate(Scores(-torch.arange(200.0).expand(2000, 200)), holdout, train=train, ks=(k,), baselines=False)
    assert by_code["model"].values[f"Recall@{k}"] > k / n + 6 * error
    assert by_code["model"].values[f"Recall@{k}"] > 3 * result["constant"].values[f"Recall@{k}"]


def test_an_oracle_scores_one():
    train, holdout = popular_world(300)
    scores = torch.zeros(300, 200)
    scores[torch.arange(300), torch.tensor([t[0] for t in holdout.targets])] = 1.0
    row = evaluate(Scores(scores), holdout, train=train, ks=(1, 10))["model"]
    for name in ("Recall@1", "NDCG@10", "MRR@10", "HR@1"):
        assert row.values[name] == 1.0
    assert all(row.slices[label]["Recall@1"] == 1.0 for label in ("head", "mid", "tail"))


def test_only_the_order_of_scores_matters():
    """No metric depends on the sign or the size of a score."""
    train, holdout = popular_world(100)
    scores = torch.randint(-50, 50, (100, 200), generator=torch.Generator().manual_seed(0)).float()
    results = [
        evaluate(Scores(s), holdout, train=train, baselines=False).to_dict()
        for s in (scores, scores - 1e4, scores * 1e-3)
    ]
    assert results[0] == results[1] == results[2]


def test_the_table_contains_model_and_baselines():
    train, holdout = popular_world(100)
    result = evaluate(Scores(torch.rand(100, 200)), holdout, train=train, name="two-tower")
    assert [row.name for row in result.rows] == ["two-tower", "popularity", "item-kNN", "EASE"]
    text = str(result)
    for part in ("test: 100 queries, 100 targets", "200 items", "already seen excluded", "@10", "@20", "tail"):
        assert part in text
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(result)
    shown = console.export_text()
    assert "item-kNN" in shown and "coverage" in shown and "…" not in shown, "nothing is truncated at 80 characters"
    best = max(result.rows[1:], key=lambda row: row.values["NDCG@10"])
    assert f"two-tower is below the best baseline, {best.name}: NDCG@10" in text, "it ranks at random"
    console.file.close()
    assert "seen included" in str(evaluate(Scores(torch.rand(100, 200)), holdout, train=train, exclude_seen=False))
    with pytest.raises(KeyError, match="no row"):
        result["other"]


def test_targets_in_the_history_are_noted():
    train, holdout = Train([[0, 1], [2]], 5), FakeHoldout([[1], [2, 3]], [[1, 4], [3]])
    result = evaluate(Scores(torch.rand(2, 5)), holdout, train=train, ks=(5,), baselines=False)
    assert (result.num_queries, result.num_targets, result.num_removed, result.num_empty) == (1, 1, 2, 1)
    assert "2 targets are already in their query's history" in str(result)
    assert "left out of the means" in str(result)
    kept = evaluate(Scores(torch.rand(2, 5)), holdout, train=train, ks=(5,), baselines=False, exclude_seen=False)
    assert kept.num_targets == 3
    assert kept["model"].values["Recall@5"] == 1.0
    assert not kept.notes


@pytest.mark.parametrize(
    ("ranked", "message"),
    [
        ([[0, 0]], "same item twice"),
        ([[3, 0]], "history"),
        ([[9, 0]], "below 5"),
        ([[-2, 0]], "below 5"),
        ([[0]], "must return int64"),
    ],
)
def test_an_invalid_ranking_is_refused(ranked, message):
    train, holdout = Train([[0, 1], [2]], 5), FakeHoldout([[3]], [[1]])
    with pytest.raises(ValueError, match=message):
        evaluate(Fixed(torch.tensor(ranked)), holdout, train=train, ks=(2,), baselines=False)


def test_settings_are_checked():
    train, holdout = Train([[0, 1], [2]], 5), FakeHoldout([[3]], [[1]])
    right = Fixed(np.array([[0, 1]]))
    inexact = Fixed(np.array([[0, 1]]), is_exact=False)
    for ranker, settings_, message in [
        (right, {"ks": ()}, "ks"),
        (right, {"ks": (0, 2)}, "ks"),
        (right, {"empty": "drop"}, "empty"),
        (right, {"name": "popularity", "baselines": True}, "two rankers"),
        (inexact, {}, "approximate"),
        (right, {"holdout": FakeHoldout([[3]], [[7]])}, "item codes"),
    ]:
        given_ = {"holdout": holdout, "ks": (2,), "baselines": False} | settings_
        with pytest.raises(ValueError, match=message):
            evaluate(ranker, given_.pop("holdout"), train=train, **given_)
    allowed = evaluate(inexact, holdout, train=train, ks=(2,), baselines=False, allow_approximate=True)
    assert allowed["model"].values["MRR@2"] == 0.5
