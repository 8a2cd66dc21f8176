"""Measures of judged queries against values by hand and ir-measures called directly."""

import math

import ir_measures
import numpy as np
import pytest

from twotower.errors import InputError
from twotower.evaluation.judgements import MEASURES, measure_judged


def test_values_by_hand():
    """Two queries: graded and several relevant items, one that is not in the catalog, and a negative relevance."""
    judged = [("a", {3: 2, 5: 1, 7: -2, -1: 1}), ("b", {0: 1})]
    ranked = np.array([[7, 5, 1, 3] + [-1] * 6, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]])
    found = measure_judged({"model": ranked}, judged, num_items=10)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    values = {name: found.values["model"][name].tolist() for name in MEASURES}
    assert values["nDCG@10"] == pytest.approx([(1 / math.log2(3) + 2 / math.log2(5)) / ideal, 1 / math.log2(11)])
    assert values["MAP"] == pytest.approx([(1 / 2 + 2 / 4) / 3, 1 / 10])
    assert values["MRR"] == pytest.approx([1 / 2, 1 / 10])
    assert values["Recall@10"] == pytest.approx([2 / 3, 1.0])
    assert values["Judged@10"][1] == pytest.approx(1 / 10)
    assert found.relevant == 4 and "1 judgement is negative and counts as not relevant" in found.notes


def test_values_are_those_of_ir_measures():
    rng = np.random.default_rng(3)
    judged, ranked = [], np.full((40, 120), -1)
    for query in range(40):
        items = rng.permutation(200)
        judged.append((f"q{query}", {int(one): int(rng.integers(0, 4)) for one in items[:25]} | {int(items[0]): 2}))
        shown = rng.permutation(200)[: int(rng.integers(5, 120))]
        ranked[query, : len(shown)] = shown
    found = measure_judged({"model": ranked}, judged, num_items=200)
    qrels = [ir_measures.Qrel(q, str(item), grade) for q, grades in judged for item, grade in grades.items()]
    run = [
        ir_measures.ScoredDoc(f"q{query}", str(item), 1.0 / (1 + rank))
        for query in range(40)
        for rank, item in enumerate(ranked[query])
        if item >= 0
    ]
    for name, own in MEASURES.items():
        measure = ir_measures.parse_measure(own)
        direct = {one.query_id: one.value for one in measure.iter_calc(qrels, run)}
        assert found.values["model"][name] == pytest.approx([direct[q] for q, _ in judged], abs=1e-9)


def test_an_empty_ranking_counts_as_zero_and_queries_without_relevant_items_are_left_out():
    judged = [("a", {1: 1}), ("b", {1: 0, 2: -1}), ("c", {2: 1})]
    ranked = np.array([[-1, -1], [1, 2], [2, -1]])
    found = measure_judged({"model": ranked, "other": ranked[:, ::-1].copy()}, judged, num_items=3)
    assert found.queries == ("a", "c") and found.values["model"]["MRR"].tolist() == [0.0, 1.0]
    assert found.mean("model", "nDCG@10") == 0.5
    assert found.notes == ("1 judged query has no relevant item and was left out",)
    text = str(found)
    assert "2 judged queries, 2 relevant items" in text and "model - other: nDCG@10" in text
    frame = found.per_query()
    assert frame.columns == ["ranking", "query", *MEASURES] and frame["query"].to_list() == ["a", "c", "a", "c"]
    assert found.to_dict()["rows"]["model"]["MRR"] == 0.5


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(InputError, match="no query has an item with a relevance of at least 1"):
        measure_judged({"model": np.array([[1]])}, [("a", {1: 0})], num_items=2)
    with pytest.raises(InputError, match="a row of distinct items for each of 1 query"):
        measure_judged({"model": np.array([[1, 1]])}, [("a", {1: 1})], num_items=2)
    monkeypatch.setitem(__import__("sys").modules, "ir_measures", None)
    with pytest.raises(InputError, match=r"pip install 'twotower\[judgements\]'"):
        measure_judged({"model": np.array([[1]])}, [("a", {1: 1})], num_items=2)
