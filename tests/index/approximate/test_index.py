"""Approximate indexes compared with float64 brute force: recall as reported, exact scores, reliable filters."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from twotower.errors import InputError
from twotower.index import ApproximateIndex, ExactCatalog, ExactIndex, build_index, load_index
from twotower.index.approximate.build import ENGINES
from twotower.index.approximate.hnsw import HNSW

FAISS = ["hnsw", "ivfpq", "int8", "binary"]
N, D, B = 4000, 17, 40


@pytest.fixture(scope="module", autouse=True)
def _faiss():
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")


@pytest.fixture(scope="module")
def catalog():
    """Clustered vectors of unequal length, so that inner product and distance disagree."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(60, D, generator=generator)
    items = centres[torch.randint(0, 60, (N,), generator=generator)] + 0.7 * torch.randn(N, D, generator=generator)
    items *= 0.7 + 0.6 * torch.rand(N, 1, generator=generator)
    queries = centres[torch.randint(0, 60, (B,), generator=generator)] + 0.7 * torch.randn(B, D, generator=generator)
    return F.normalize(items, dim=1) * items.norm(dim=1, keepdim=True), queries


@pytest.fixture(scope="module", params=FAISS)
def built(request, catalog):
    items, queries = catalog
    index, report = build_index(request.param, items, {"all": queries}, k=20, min_recall=0.9)
    return index, report


def fresh(kind, items):
    engine = ENGINES[kind](items.numpy())
    engine.effort = 512 if kind == "hnsw" else engine.max_effort
    if kind == "ivfpq":
        engine.oversample = 8.0
    return ApproximateIndex(items, engine)


def brute(items, queries, k, left_out=None, allowed=None):
    """Rank codes by float64 inner product, one list per query."""
    scores = queries.double().numpy() @ items.double().numpy().T
    best = []
    for row, score in enumerate(scores):  # rows are views of a private array, so they may be overwritten
        if allowed is not None:
            score[~allowed] = -np.inf
        if left_out is not None:
            score[list(left_out[row])] = -np.inf
        order = np.argsort(-score, kind="stable")
        best.append([int(item) for item in order[:k] if score[item] > -np.inf])
    return best


def overlap(found, best):
    return np.mean([len(set(a) & set(b)) / max(len(b), 1) for a, b in zip(found, best, strict=True)])


def compressed(rows):
    return np.cumsum([0, *(len(row) for row in rows)]), np.array([i for row in rows for i in row], dtype=np.int64)


def test_the_reported_recall_is_correct(built, catalog):
    index, report = built
    items, queries = catalog
    scores, found = index.search(queries, 20)
    assert not index.is_exact and index.kind == report.kind
    assert overlap(found.tolist(), brute(items, queries, 20)) == pytest.approx(report.recall["all"], abs=1e-3)
    assert report.recall["all"] >= 0.9 and report.k == 20 and report.bytes > 0
    assert torch.allclose(scores, (queries[:, None] * items[found]).sum(2), atol=1e-5), "scores are inner products"
    assert bool((scores.diff(dim=1) <= 0).all())


def test_the_index_ranks_by_inner_product_and_not_by_distance(built, catalog):
    index, _ = built
    items, queries = catalog
    nearest = torch.cdist(queries, items).topk(20, largest=False).indices.tolist()
    found = index.search(queries, 20)[1].tolist()
    assert overlap(found, brute(items, queries, 20)) > overlap(found, nearest) + 0.2


def test_excluded_items_are_never_returned_and_k_others_always_are(built, catalog):
    """The best 150 of each query are excluded: only over-fetching finds K others."""
    index, _ = built
    items, queries = catalog
    left_out = brute(items, queries, 150)
    left_out[0] = []
    _, found = index.search(queries, 20, compressed(left_out))
    assert all(len(row) == 20 and not set(row) & set(out) for row, out in zip(found.tolist(), left_out, strict=True))
    assert bool((found >= 0).all())
    assert overlap(found.tolist(), brute(items, queries, 20, left_out)) > 0.85


@pytest.mark.parametrize("share", [0.6, 0.2, 0.002])
def test_a_filter_loses_nothing(built, catalog, share):
    index, _ = built
    items, queries = catalog
    allowed = np.random.default_rng(3).random(N) < share
    k = 30
    scores, found = index.search(queries, k, allowed=allowed)
    best = brute(items, queries, k, allowed=allowed)
    items_found = [[item for item in row if item >= 0] for row in found.tolist()]
    assert [len(row) for row in items_found] == [min(k, int(allowed.sum()))] * B
    assert allowed[[item for row in items_found for item in row]].all()
    assert overlap(items_found, best) >= (1.0 if share < 0.5 else 0.85)
    assert bool((scores[found < 0] == -torch.inf).all())


def test_everything_excluded_but_one(built, catalog):
    index, _ = built
    _, queries = catalog
    rows = [[item for item in range(N) if item != 7 * row] for row in range(3)]
    _, found = index.search(queries[:3], 4, compressed(rows))
    assert found.tolist() == [[7 * row, -1, -1, -1] for row in range(3)]


@pytest.mark.parametrize("kind", [*FAISS, "exact"])
def test_items_are_added_and_removed_without_a_rebuild(catalog, kind):
    items, queries = catalog
    index = ExactCatalog(items) if kind == "exact" else fresh(kind, items)
    best = index.search(queries, 5)[1]
    gone = best[:, 0].unique().numpy()
    index.remove(gone)
    assert not np.isin(index.search(queries, 5)[1].numpy(), gone).any()
    left = np.ones(N, dtype=bool)
    left[gone] = False
    assert overlap(index.search(queries, 5)[1].tolist(), brute(items, queries, 5, allowed=left)) > 0.9
    new = index.add(queries[:3] * 4)
    assert new.tolist() == [N, N + 1, N + 2] and index.num_items == N + 3
    assert index.search(queries[:3], 1)[1][:, 0].tolist() == new.tolist()
    index.update(new, queries[3:6] * 4)
    assert index.search(queries[3:6], 1)[1][:, 0].tolist() == new.tolist()
    index.update(gone[:1], queries[6:7] * 9)  # updating a removed item adds it again
    assert index.search(queries[6:7], 1)[1][0, 0] == gone[0]
    assert torch.equal(items, catalog[0]), "the caller's tensor is not modified"


@pytest.mark.parametrize("kind", FAISS)
def test_a_saved_index_returns_the_same_results(catalog, kind, tmp_path):
    items, queries = catalog
    index, report = build_index(kind, items, {"all": queries}, k=10)
    index.remove(np.arange(0, N, 3))
    index.engine.save(tmp_path)
    loaded = load_index(report.to_dict(), items, tmp_path, alive=index.vectors.alive)
    for one, other in zip(index.search(queries, 10), loaded.search(queries, 10), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["hnsw", "int8", "binary"])
def test_equal_scores_are_in_tie_order(kind):
    items = torch.ones(3000, 4)
    queries = torch.ones(2, 4)
    expected = ExactIndex(items).search(queries, 3000)[1]
    assert torch.equal(fresh(kind, items).search(queries, 3000)[1], expected)


def test_an_index_below_the_floor_is_refused(catalog):
    items, queries = catalog
    with pytest.raises(InputError, match=r"hnsw finds .* below the floor 1.0, and is rejected"):
        engine = {"links": 4, "build_effort": 4, "effort": 4}
        HNSW.max_effort, before = 4, HNSW.max_effort
        try:
            build_index("hnsw", items, {"all": queries}, k=10, min_recall=1.0, settings=engine)
        finally:
            HNSW.max_effort = before


def test_effort_is_increased_until_the_floor_is_reached(catalog):
    items, queries = catalog
    low = {"links": 8, "build_effort": 16, "effort": 1}
    _, plain = build_index("hnsw", items, {"all": queries}, k=10, settings=low)
    _, raised = build_index("hnsw", items, {"all": queries}, k=10, settings=low, min_recall=0.97)
    assert plain.settings["effort"] == 1 and plain.recall["all"] < 0.97
    assert raised.settings["effort"] > 1 and raised.recall["all"] >= 0.97


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("annoy", {}, "unknown kind 'annoy'"),
        ("hnsw", {"settings": {"speed": 3}}, "unknown setting for hnsw"),
        ("hnsw", {"min_recall": 1.5}, "min_recall: expected"),
        ("ivfpq", {"few": True}, "at least 1,000 items"),
        ("int8", {"settings": {"effort": 0}}, "int8: effort must be in 1 .. 64, found 0"),
        ("binary", {"settings": {"effort": 65}}, "binary: effort must be in 1 .. 64, found 65"),
        ("int8", {"settings": {"links": 3}}, "unknown setting for int8"),
    ],
)
def test_invalid_arguments_are_refused(catalog, kind, changes, message):
    items, queries = catalog
    few = changes.pop("few", False)
    with pytest.raises(InputError, match=message):
        build_index(kind, items[:100] if few else items, {"all": queries}, k=10, **changes)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_restricted_exact_search_equals_brute_force_with_ties(share):
    """Small integers: many ties, which are ordered as in the whole catalog."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(-1, 2, (600, 3), generator=generator).float()
    queries = torch.randint(-1, 2, (9, 3), generator=generator).float()
    rng = np.random.default_rng(0)
    allowed = rng.random(600) < share
    left_out = [rng.choice(600, size=rng.integers(0, 90), replace=False).tolist() for _ in range(9)]
    everything = ExactIndex(items).search(queries, 600)[1].tolist()
    expected = [
        [item for item in row if allowed[item] and item not in out][:40]
        for row, out in zip(everything, left_out, strict=True)
    ]
    index = ExactCatalog(items)
    scores, found = index.search(queries, 40, compressed(left_out), allowed=allowed)
    assert [[item for item in row if item >= 0] for row in found.tolist()] == expected
    assert bool(((found < 0) == (scores == -torch.inf)).all())
    again = index.search(queries, 40, compressed(left_out), allowed=allowed)
    assert torch.equal(again[1], found)
