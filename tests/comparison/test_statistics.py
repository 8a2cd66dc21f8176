"""Tests of the statistics of a comparison, against plain loops and planted differences."""

import numpy as np
import pytest

from twotower.comparison.statistics import PairwiseTest, compare, contest, measured
from twotower.evaluation import Row
from twotower.evaluation.significance import bootstrap_interval, holm, paired_comparison

METRICS = {"metric": "NDCG@10", "tail_metric": "Recall@10"}


def row(name, values, tail=None):
    """Build a row whose per-query NDCG@10 and Recall@10 are the given values."""
    values = np.asarray(values, dtype=np.float64)
    tail = values if tail is None else np.asarray(tail, dtype=np.float64)
    per_query = {"NDCG@10": values, "Recall@10": values, "tail/Recall@10": tail, "tail/NDCG@10": tail}
    means = {"NDCG@10": values.mean(), "Recall@10": values.mean(), "coverage@10": 0.5}
    part = float(np.nanmean(tail))
    return Row(name, means, {"tail": {"Recall@10": part, "NDCG@10": part}}, per_query)


def made_up(seed=0, queries=400, lead=0.05, spread=0.0):
    """Make three objectives with three seeds: `good` leads by `lead`, `twin` and `base` differ only by noise."""
    random = np.random.default_rng(seed)
    hard = random.random(queries)
    rows = {}
    for name, level in (("good", lead), ("twin", 0.0), ("base", 0.0)):
        rows[name] = [
            row(name, hard + level + random.normal(0, 0.1, queries) + random.normal(0, spread)) for _ in range(3)
        ]
    return rows


def test_means_and_seeds_against_loops():
    rows = made_up()
    overall, slices = measured(rows["good"])
    found = overall["NDCG@10"]
    by_seed = [sum(one.per_query["NDCG@10"].tolist()) / 400 for one in rows["good"]]
    mean = sum(by_seed) / 3
    assert found.by_seed == pytest.approx(by_seed) and found.mean == pytest.approx(mean)
    assert found.deviation == pytest.approx((sum((x - mean) ** 2 for x in by_seed) / 2) ** 0.5)
    assert found.low < found.mean < found.high
    assert overall["coverage@10"].low is None, "coverage has no value for each query"
    average = np.mean([one.per_query["tail/Recall@10"] for one in rows["good"]], axis=0)
    alone = bootstrap_interval(average)
    assert (slices["tail"]["Recall@10"].low, slices["tail"]["Recall@10"].high) == pytest.approx((alone.low, alone.high))


def test_a_lead_is_found_and_a_twin_is_not():
    found = compare(made_up(), **METRICS)
    assert found.best("NDCG@10") == "good"
    overall, tail = found.families
    assert (overall.about, tail.about, overall.against) == ("all", "tail", "good")
    assert {one.name: one.verdict for one in overall.contests} == {"twin": "behind", "base": "behind"}


def test_twins_rarely_differ_significantly():
    significant = 0
    for seed in range(40):
        rows = made_up(seed, queries=150)
        (twins,) = contest("all", {name: rows[name] for name in ("twin", "base")}, "NDCG@10", None, "base").contests
        significant += twins.verdict != "not told apart"
    assert significant <= 6, "at most 5 % are expected: more than 6 of 40 has a probability of 0.003"


def test_p_values_are_adjusted_over_the_whole_family():
    rows = made_up(lead=0.004)
    found = contest("all", rows, "NDCG@10", None, "good")
    reference = np.mean([one.per_query["NDCG@10"] for one in rows["good"]], axis=0)
    plain = [
        paired_comparison(np.mean([one.per_query["NDCG@10"] for one in rows[name]], axis=0), reference).p_value
        for name in ("twin", "base")
    ]
    assert [one.p_value for one in found.contests] == plain
    assert [one.adjusted for one in found.contests] == holm(plain).tolist()


def test_a_lead_within_the_spread_over_seeds_is_not_significant():
    rows = made_up(lead=0.02, spread=0.05, seed=3)
    found = contest("all", rows, "NDCG@10", None, "good")
    by_seed = [[one.per_query["NDCG@10"].mean() for one in runs] for runs in rows.values()]
    pooled = np.sqrt(np.mean([np.var(values, ddof=1) for values in by_seed]))
    for one in found.contests:
        assert one.seed_error == pytest.approx(pooled * np.sqrt(2 / 3))
        assert one.adjusted < 0.05 and abs(one.difference) < 2 * one.seed_error
        assert one.verdict == "not told apart"
    (alone,) = contest(
        "all", {n: runs[:1] for n, runs in rows.items() if n != "base"}, "NDCG@10", None, "good"
    ).contests
    assert alone.seed_error is None, "one seed gives no estimate of the spread"


def test_the_verdict_needs_both_criteria():
    def verdict(**changes):
        values = {"difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "adjusted": 0.02, "effect_size": 1.0}
        return PairwiseTest("x", **{**values, "seed_error": 0.01, "num_queries": 9, **changes}).verdict

    assert verdict() == "ahead" and verdict(difference=-0.1) == "behind"
    assert verdict(adjusted=0.06) == verdict(seed_error=0.06) == verdict(adjusted=float("nan")) == "not told apart"
    assert verdict(seed_error=None) == "ahead"


def test_queries_without_a_tail_target_are_skipped():
    tail = np.full(400, np.nan)
    tail[:50] = np.linspace(0, 1, 50)
    rows = {
        name: [row(name, np.full(400, value), tail + shift)] for name, value, shift in (("a", 0.5, 0), ("b", 0.4, 0.1))
    }
    overall, part = compare(rows, **METRICS).families
    assert part.contests[0].num_queries == 50 and part.contests[0].verdict == "ahead"
    assert overall.contests[0].verdict == "behind"


def test_baselines_are_a_separate_family():
    rows = made_up()
    found = compare(rows, [row("popularity", np.zeros(400))], **METRICS)
    assert [family.about for family in found.families] == ["all", "tail", "baselines"]
    assert found.families[2].contests[0].verdict == "behind"
    alone = compare({"good": rows["good"]}, [row("popularity", np.zeros(400))], **METRICS)
    assert [family.about for family in alone.families] == ["baselines"]


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one objective"):
        compare({}, **METRICS)
