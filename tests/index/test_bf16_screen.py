"""The bfloat16 screen loses no item of the exact result, whatever the distribution of the numbers."""

import numpy as np
import pytest
import torch

from twotower.index import ExactIndex, tie_order
from twotower.index.bf16_screen import Bf16Screen


def laid_out(items):
    order = tie_order(len(items))
    return Bf16Screen(items[order], order), order


def brute_force(screen, queries, order, k, excluded):
    """Compute every score with the screen's own float32 kernel, sorted in plain Python by (score, place)."""
    everywhere = torch.arange(len(order))
    answer = []
    for row, out in enumerate(excluded):
        scores = screen.score(queries, torch.full_like(everywhere, row), everywhere).tolist()
        places = [place for place in range(len(order)) if int(order[place]) not in out]
        answer.append([int(order[place]) for place in sorted(places, key=lambda p: (-scores[p], p))[:k]])
    return answer


def embeddings(kind, count, generator):
    vectors = torch.randn(count, 24, generator=generator)
    if kind == "crowded":  # all scores within the resolution of bfloat16
        return 1.0 + vectors * 1e-3
    if kind == "heavy-tailed":
        return vectors.abs().pow(3) * torch.rand(count, 1, generator=generator).pow(-0.7)
    if kind == "ties":
        return vectors.round().clamp(-1, 1)
    if kind == "tiny":
        return vectors * 1e-12
    return vectors


@pytest.mark.parametrize("kind", ["normal", "crowded", "heavy-tailed", "ties", "tiny"])
@pytest.mark.parametrize(("row_block", "column_tile"), [(None, None), (3, 1024), (8, 700)])
def test_equals_brute_force_bit_by_bit(kind, row_block, column_tile):
    generator = torch.Generator().manual_seed(5)
    items, queries = embeddings(kind, 3000, generator), embeddings(kind, 8, generator)
    screen, order = laid_out(items)
    excluded = [torch.randint(0, 3000, (40,), generator=generator).tolist() for _ in queries]
    pairs = np.cumsum([0, *(len(row) for row in excluded)]), np.concatenate(excluded)
    found = screen.search(queries, 20, pairs, row_block=row_block, column_tile=column_tile)
    assert found is not None
    assert found[1].tolist() == brute_force(screen, queries, order, 20, [set(row) for row in excluded])
    exact = (queries[:, None].double() * items[found[1]].double()).sum(2)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-37)


def test_without_its_margin_the_screen_would_lose_items(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    # Large terms of both signs that nearly cancel: the error is as large as the differences of the scores.
    items, queries = 1.0 + 0.01 * torch.randn(3000, 24, generator=generator), torch.ones(8, 24)
    queries[:, ::2] = -1.0
    queries += 0.03 + 0.01 * torch.randn(8, 24, generator=generator)
    screen, order = laid_out(items)
    expected = brute_force(screen, queries, order, 50, [set()] * 8)
    assert screen.search(queries, 50)[1].tolist() == expected
    monkeypatch.setattr(Bf16Screen, "margin", lambda self, queries: torch.zeros(len(queries), 1))
    assert screen.search(queries, 50)[1].tolist() != expected


@pytest.mark.parametrize("kind", ["normal", "crowded", "heavy-tailed", "tiny"])
def test_the_margin_bounds_the_error_and_is_tight(kind):
    generator = torch.Generator().manual_seed(7)
    items, queries = embeddings(kind, 2000, generator), embeddings(kind, 50, generator)
    screen, order = laid_out(items)
    low_items, low_queries = items[order].bfloat16(), queries.bfloat16()
    estimate = low_queries.double() @ low_items.double().T
    error = (estimate - queries.double() @ items[order].double().T).abs().amax(1)
    margin = screen.margin(queries)[:, 0].double()
    assert bool((error <= margin).all())
    if kind in ("normal", "crowded"):
        assert float(margin.median()) < 60 * float(error.median())


def test_equals_the_plain_search_if_sums_are_exact():
    """Small integers: both kernels are exact, so the results are the same, ties included."""
    generator = torch.Generator().manual_seed(8)
    index = ExactIndex(torch.randint(-3, 4, (5000, 16), generator=generator).float())
    queries = torch.randint(-3, 4, (70, 16), generator=generator).float()
    queries[0] += 1
    plain, screened = (index.search(queries, 33, screened=flag) for flag in (False, True))
    assert torch.equal(plain[0], screened[0])
    assert torch.equal(plain[1], screened[1])


@pytest.mark.parametrize("case", ["negative", "zero", "huge", "few"])
def test_inputs_that_cannot_be_screened_use_the_plain_search(case):
    generator = torch.Generator().manual_seed(9)
    items = torch.randn(500, 8, generator=generator).abs()
    queries, k = torch.randn(5, 8, generator=generator).abs(), 10
    if case == "negative":
        queries[3] = -queries[3]
    elif case == "zero":
        queries[2] = 0.0
    elif case == "huge":
        queries, items = queries * 1e15, items * 1e18
    elif case == "few":
        k = 501
    screen, _ = laid_out(items)
    assert screen.search(queries, k) is None
    index = ExactIndex(items)
    plain, screened = (index.search(queries, k, screened=flag) for flag in (False, True))
    assert torch.equal(plain[1], screened[1])


def test_infinity_and_nan_use_the_plain_search():
    items = torch.rand(300, 4)
    screen, _ = laid_out(items)
    for bad in (torch.inf, torch.nan):
        queries = torch.rand(3, 4)
        queries[1, 1] = bad
        assert screen.search(queries, 3) is None
    items[7, 2] = torch.inf
    assert laid_out(items)[0].search(torch.rand(3, 4), 3) is None
    with pytest.raises(ValueError, match="diverged"):
        ExactIndex(torch.rand(300, 4)).search(torch.full((2, 4), torch.nan), 3, screened=True)


@pytest.mark.parametrize("screened", [False, True])
def test_progress_is_reported_to_the_end(screened):
    calls = []
    index = ExactIndex(torch.rand(300, 4))
    index.search(
        torch.rand(10, 4), 3, row_block=4, column_tile=100, screened=screened, progress=lambda *now: calls.append(now)
    )
    assert calls == [(done, 9) for done in range(1, 10)]
