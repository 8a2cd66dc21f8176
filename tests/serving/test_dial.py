"""The popularity dial: its sign, its meaning, and an index against re-ranking the whole catalog by hand."""

import math

import numpy as np
import pytest
import torch

from twotower.comparison.popularity_curve import DialCurve, DialPoint, popularity_curve
from twotower.errors import InputError
from twotower.index import ExactCatalog, PopularityDial
from twotower.serving import Retriever


def by_hand(retriever, query, b, seen):
    """Rank the whole catalog by log P(y|x) + (b - 1) log p(y) in float64, best first, without seen items."""
    artifact = retriever.artifact
    code = artifact.queries.encode([query])
    start, stop = artifact.history_offsets[code[0]], artifact.history_offsets[code[0] + 1]
    history = np.asarray(artifact.history_items[start:stop])
    embedded = retriever.ranker.embed(code, (np.array([0, len(history)]), history))[0].double()
    temperature = float(artifact.towers.temperature.detach())
    logits = [
        sum(float(a) * float(b) for a, b in zip(embedded, item, strict=True)) / temperature
        for item in artifact.item_embeddings
    ]
    normaliser = math.log(sum(math.exp(value) for value in logits))
    counts = artifact.item_counts.tolist()
    total = sum(counts) + len(counts)
    scores = [
        logit - normaliser + (b - 1) * math.log((count + 1) / total)
        for logit, count in zip(logits, counts, strict=True)
    ]
    return [j for j in sorted(range(len(scores)), key=lambda j: -scores[j]) if not (seen and j in set(history))]


@pytest.mark.parametrize("b", [0.0, 0.3, 0.5, 1.0, 1.7])
def test_the_index_ranks_as_re_ranking_by_hand(model, b):
    retriever = model.retriever
    found = retriever.recommend(["u007"], k=100, popularity=b)
    expected = by_hand(retriever, "u007", b, seen=True)
    assert retriever.artifact.items.encode(found["item"].to_list()).tolist() == expected


def test_scores_are_the_formula(model):
    retriever = model.retriever
    artifact = retriever.artifact
    plain = retriever.recommend(["u007"], k=100, popularity=1.0)
    dialled = retriever.recommend(["u007"], k=100, popularity=0.4)
    counts = artifact.item_counts.double() + 1
    shift = -0.6 * float(artifact.towers.temperature.detach()) * (counts / counts.sum()).log()
    before = dict(zip(plain["item"], plain["score"], strict=True))
    for item, score in zip(dialled["item"], dialled["score"], strict=True):
        code = artifact.items.encode([item])[0]
        assert score == pytest.approx(before[item] + float(shift[code]), abs=1e-5)


def test_less_popularity_means_rarer_items(model):
    counts = model.artifact.item_counts.numpy()
    means = []
    for b in (0.0, 0.5, 1.0, 1.5, 2.0):
        found = model.retriever.recommend([f"u{j:03d}" for j in range(60)], k=10, popularity=b, exclude_seen=False)
        means.append(counts[model.artifact.items.encode(found["item"].to_list())].mean())
    assert means == sorted(means) and means[-1] > 1.2 * means[0]


def test_one_is_the_model_as_trained(model, planted_split):
    test = planted_split.test
    assert np.array_equal(model.rank(test, 20, True), model.retriever.rank(test, 20, True, popularity=1.0))
    assert not np.array_equal(model.rank(test, 20, True), model.retriever.rank(test, 20, True, popularity=0.0))


def test_the_extra_coordinate_is_small_and_the_product_is_the_formula():
    counts = torch.tensor([1000, 10, 0, 3])
    dial = PopularityDial(counts, temperature=0.05)
    items, queries = torch.randn(4, 6), torch.randn(2, 6)
    longer = dial.items(items)
    assert longer.shape == (4, 7) and float(longer[:, 6].abs().max()) < 0.25
    got = dial.queries(queries, 0.25).double() @ longer.double().T + dial.offset(0.25)
    log_p = ((counts + 1).double() / (counts.sum() + 4)).log()
    assert torch.allclose(got, (queries @ items.T).double() - 0.75 * 0.05 * log_p, atol=1e-6)


@pytest.mark.parametrize("b", [-0.1, 2.5, math.nan, math.inf, "much", None])
def test_a_setting_out_of_range_is_refused(model, b):
    with pytest.raises(InputError, match="popularity: expected a number from 0"):
        model.retriever.recommend(["u001"], popularity=b)


@pytest.mark.parametrize("kind", ["hnsw", "int8", "binary"])
def test_one_approximate_index_serves_every_setting(model, kind):
    """In a small catalog, an approximate index over the extended vectors finds the exact results for every setting."""
    pytest.importorskip("faiss")
    from twotower.index import ApproximateIndex
    from twotower.index.approximate.build import ENGINES

    exact = model.retriever
    longer = PopularityDial(model.artifact.item_counts, float(model.artifact.towers.temperature.detach())).items(
        model.artifact.item_embeddings
    )
    other = Retriever(model.artifact, ApproximateIndex(longer, ENGINES[kind](longer.numpy())))
    for b in (0.0, 0.6, 1.0, 2.0):
        one = exact.recommend(["u001", "u002"], k=20, popularity=b)
        two = other.recommend(["u001", "u002"], k=20, popularity=b)
        assert one["item"].to_list() == two["item"].to_list()
        assert one["score"].to_list() == pytest.approx(two["score"].to_list(), abs=1e-5)


def test_the_curve_matches_evaluation(model, planted_split):
    curve = popularity_curve(model.retriever, planted_split.test, train=planted_split.train, k=10, settings=(1.0, 0.0))
    assert [point.popularity for point in curve.points] == [0.0, 1.0]
    discovery, trained = curve.points
    ranked = model.rank(planted_split.test, 10, True)
    targets = planted_split.test.target_items
    assert trained.recall == pytest.approx(np.mean([t in row for t, row in zip(targets, ranked, strict=True)]))
    assert trained.coverage == pytest.approx(len(np.unique(ranked)) / 100)
    assert trained.interactions == pytest.approx(planted_split.train.item_counts()[ranked].mean())
    counts = planted_split.train.item_counts()
    below = [((counts < counts[j]).sum() + (counts <= counts[j]).sum()) / 200 for j in ranked.reshape(-1)]
    assert trained.percentile == pytest.approx(np.mean(below))
    assert discovery.percentile < trained.percentile and discovery.interactions < trained.interactions
    assert curve.to_dict()["points"][1]["recall"] == trained.recall


def test_the_best_setting_has_the_highest_ndcg_and_ties_go_to_the_one_nearest_to_one():
    def point(b, ndcg):
        return DialPoint(b, 0.5, 0.5, ndcg, 0.5, 1.0, 0.5)

    assert DialCurve("validation", 20, (point(0.0, 0.1), point(1.0, 0.2), point(1.3, 0.3))).best.popularity == 1.3
    assert DialCurve("validation", 20, (point(0.0, 0.3), point(0.9, 0.3), point(2.0, 0.3))).best.popularity == 0.9


def test_a_dialled_catalog_is_exact():
    items = torch.randn(300, 8)
    dial = PopularityDial(torch.randint(0, 50, (300,)), 0.1)
    assert ExactCatalog(dial.items(items)).is_exact
