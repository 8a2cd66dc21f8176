"""Rows of the same query are computed once, with the value and gradients of the plain form to high precision."""

import pytest
import torch

from twotower.losses import full_softmax as plain_full_softmax
from twotower.losses import refined_logq, sampled_softmax, tiled_full_softmax, tiled_softmax
from twotower.losses.tiled import autograd
from twotower.losses.tiled.repeated_queries import MOST_ROWS, RepeatedEvaluation, find_repeated
from twotower.negatives import NegativeMask

B, N, D = 60, 30, 5


@pytest.fixture
def runs(monkeypatch):
    """Record every RepeatedRun that is made."""
    made = []

    class Counted(RepeatedEvaluation):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(autograd, "RepeatedEvaluation", Counted)
    return made


def batch(*, seed=0, candidates="some", spread=1.0):
    """Make float64 leaves and hits: sixty rows of twelve queries with known positives, at least 35 rows of query 3."""
    rng = torch.Generator().manual_seed(seed)
    queries = torch.randint(12, (B,), generator=rng)
    queries[: 2 * MOST_ROWS + 3] = 3
    own = torch.randint(8, (B,), generator=rng)
    items = {"some": torch.arange(3, N), "few": torch.tensor([1]), "in any order": torch.randperm(N, generator=rng)}
    items = items[candidates]
    known = torch.randint(N, (12, 4), generator=rng)[queries]
    pairs = [(torch.arange(B), own), (torch.arange(B).repeat_interleave(4), known.reshape(-1))]
    query, table = (torch.randn(n, D, generator=rng, dtype=torch.float64) * spread for n in (12, N))
    leaves = {"query": query[queries], "positive": table[own], "candidates": table[items]}
    counts = torch.randn(len(items), generator=rng, dtype=torch.float64)
    return leaves, counts, NegativeMask(pairs, rows=B, items=items, size=len(items)), own


def compare(found, expected, leaves, *, atol=1e-12):
    """Compare value and the gradient of every single row."""
    assert torch.allclose(found, expected, atol=atol)
    pair = [torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for value in (found, expected)]
    for one, other in zip(*pair, strict=True):
        assert other.abs().max() > 1e-4
        assert torch.allclose(one, other, atol=atol)


@pytest.mark.parametrize("candidates", ["some", "few", "in any order"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lines_equal_the_plain_form(runs, candidates, weighted):
    for seed in range(4):
        leaves, log_count, mask, _ = batch(seed=seed, candidates=candidates)
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        leaves["temperature"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        rng = torch.Generator().manual_seed(seed)
        weights = torch.rand(B, generator=rng, dtype=torch.float64) if weighted else torch.full((B,), 1 / B).double()
        weights[-3:] *= 0
        offset = torch.randn(B, generator=rng, dtype=torch.float64)
        given = {**leaves, "log_expected_count": log_count, "row_offset": offset}
        found = tiled_softmax(**given, mask=mask, weights=weights, repeated_queries=True)
        assert len(runs) == seed + 1
        assert len(runs[-1].scaled) < B / 2
        compare(found, sampled_softmax(**given, mask=mask.dense()) @ weights, leaves)


def test_several_tiles_and_blocks(runs, monkeypatch):
    monkeypatch.setattr("twotower.losses.tiled.blocks.LEAST_ROWS", 3)
    monkeypatch.setattr("twotower.losses.tiled.blocks.TILE_NUMBERS", 3 * N)
    monkeypatch.setattr("twotower.losses.tiled.blocks.BLOCK_NUMBERS", 1)
    monkeypatch.setattr("twotower.losses.tiled.blocks.LEAST_WIDTH", 11)
    leaves, log_count, mask, _ = batch()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    found = tiled_softmax(**leaves, log_expected_count=log_count, mask=mask, repeated_queries=True)
    assert len(runs[0].bounds) > 3
    compare(found, sampled_softmax(**leaves, log_expected_count=log_count, mask=mask.dense()).mean(), leaves)


def test_the_published_refined_form(runs):
    leaves, log_count, mask, _ = batch()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    extra = {"log_left": torch.rand(B).double(), "row_offset": torch.rand(B).double()}
    found = tiled_softmax(**leaves, log_expected_count=log_count, mask=mask, repeated_queries=True, **extra)
    expected = refined_logq(**leaves, log_count=log_count, mask=mask.dense(), **extra)[0].mean()
    assert len(runs) == 1
    compare(found, expected, leaves)


def test_the_whole_catalog(runs):
    leaves, _, _, own = batch()
    leaves = {"query": leaves["query"], "items": torch.randn(N, D, dtype=torch.float64)}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    found = tiled_full_softmax(leaves["query"], own, leaves["items"], temperature=0.5, repeated_queries=True)
    assert len(runs) == 1
    compare(found, plain_full_softmax(leaves["query"], own, leaves["items"], temperature=0.5).mean(), leaves)


def test_nothing_cancels(runs):
    """One row's own item has weight e^45, another row's 1: each row excludes its own and includes the other's."""
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    items = torch.tensor([[45.0, 0.0], [0.0, 1.0], [0.1, 0.0]], dtype=torch.float64)
    mask = NegativeMask([(torch.arange(2), torch.arange(2))], rows=2, items=torch.arange(3), size=3)
    leaves = {"query": query, "positive": items[:2].clone(), "candidates": items}
    exact = sampled_softmax(**leaves, log_expected_count=torch.zeros(3), mask=mask.dense())
    single = {name: leaf.float() for name, leaf in leaves.items()}
    for row in range(2):
        weights = torch.eye(2)[row]
        found = tiled_softmax(
            **single, log_expected_count=torch.zeros(3), mask=mask, weights=weights, repeated_queries=True
        )
        assert float(found) == pytest.approx(float(exact[row]), rel=1e-6)
    assert len(runs) == 2


@pytest.mark.parametrize("case", ["logits", "known", "embedding", "own items repeated", "few repeat"])
def test_rows_that_are_not_the_same_are_computed_one_by_one(runs, case):
    leaves, log_count, mask, _ = batch(spread=20.0 if case == "logits" else 1.0)
    if case == "known":
        mask.pairs[1][1][9] += 1
    if case == "embedding":
        leaves["query"][7] += 1e-9
    if case == "own items repeated":
        mask = NegativeMask(mask.pairs, rows=B, items=mask.items.clone().fill_(5), size=mask.size)
    if case == "few repeat":
        leaves["query"] = torch.randn(B, D, dtype=torch.float64)
        leaves["query"][1] = leaves["query"][0]
    assert (find_repeated(leaves["query"], mask) is None) == (case not in {"logits", "embedding"})
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    found = tiled_softmax(**leaves, log_expected_count=log_count, mask=mask, repeated_queries=True)
    assert all(run.base is None for run in runs) or case == "embedding"
    compare(found, sampled_softmax(**leaves, log_expected_count=log_count, mask=mask.dense()).mean(), leaves, atol=1e-9)


def test_one_product_is_computed_per_line(monkeypatch):
    leaves, log_count, mask, _ = batch()
    heights = []
    multiply = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda one, other, **kwargs: heights.append(len(one)) or multiply(one, other, **kwargs)
    )
    tiled_softmax(**leaves, log_expected_count=log_count, mask=mask)
    assert sum(heights) == B  # not looked for
    heights.clear()
    tiled_softmax(**leaves, log_expected_count=log_count, mask=mask, repeated_queries=True)
    distinct = len(leaves["query"].unique(dim=0))
    assert sum(heights) == distinct + 2  # a query with 35 rows or more has one line per MOST_ROWS rows
