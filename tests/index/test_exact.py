"""The exact index compared with plain loops: ties, exclusions, tile sizes, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.reference_ranking import inner_products, splitmix, top_items
from twotower.index import ExactIndex, pack_keys, tie_order, top_k
from twotower.index.ties import best_of
from twotower.index.topk import unpack_columns, unpack_scores


def compressed(rows):
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return offsets, np.array([item for row in rows for item in row], dtype=np.int64)


@st.composite
def cases(draw):
    """Small integers: many exact ties, and sums that are exact in float32."""
    n, b, d = draw(st.integers(1, 90)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    value = st.integers(-1, 1)
    items = draw(st.lists(st.lists(value, min_size=d, max_size=d), min_size=n, max_size=n))
    queries = draw(st.lists(st.lists(value, min_size=d, max_size=d), min_size=b, max_size=b))
    bias = draw(st.none() | st.lists(value, min_size=n, max_size=n))
    excluded = draw(st.lists(st.lists(st.integers(0, n - 1), max_size=2 * n), min_size=b, max_size=b))
    k = draw(st.integers(1, n + 5))
    return items, queries, bias, excluded, k, draw(st.integers(1, b)), draw(st.integers(1, n + 3))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_equals_brute_force(case):
    items, queries, bias, excluded, k, row_block, column_tile = case
    index = ExactIndex(torch.tensor(items).float(), None if bias is None else torch.tensor(bias).float())
    scores, found = index.search(
        torch.tensor(queries).float(), k, compressed(excluded), row_block=row_block, column_tile=column_tile
    )
    full = inner_products(queries, items, bias)
    expected = [top_items(row, k, out) for row, out in zip(full, excluded, strict=True)]
    assert found.tolist() == expected
    for row, answer, given_scores in zip(full, expected, scores.tolist(), strict=True):
        assert given_scores == [row[item] if item >= 0 else -float("inf") for item in answer]


@pytest.mark.parametrize("k", [1, 7, 100, 400, 1200])
def test_tile_sizes_do_not_matter(k):
    """Wide enough for the chunk filter, with ties on every row; k below, about and above a tile's chunks."""
    generator = torch.Generator().manual_seed(k)
    order = tie_order(1000)
    scores = torch.randint(-20, 20, (37, 1000), generator=generator).float()
    laid = scores[:, order]
    excluded = compressed([torch.randint(0, 1000, (60,), generator=generator).tolist() for _ in range(37)])

    def search(row_block, column_tile):
        return top_k(
            lambda rows, columns: laid[rows, columns].clone(),
            37, order, k, excluded, row_block=row_block, column_tile=column_tile,
        )  # fmt: skip

    whole = search(37, 1000)
    for row_block, column_tile in [
        (1, 1000),
        (5, 64),
        (37, 65),
        (10, 128),
        (36, 999),
        (20, 31),
        (37, 640),
        (None, None),
    ]:
        for part, expected in zip(search(row_block, column_tile), whole, strict=True):
            assert torch.equal(part, expected)
    rows = zip(scores.tolist(), np.split(excluded[1], excluded[0][1:-1]), strict=True)
    assert whole[1].tolist() == [top_items(row, k, out.tolist()) for row, out in rows]


@pytest.mark.parametrize("arrangement", ["ascending", "descending", "random"])
def test_real_scores_over_many_tiles(arrangement):
    """The filter must not lose an item in any order of the catalog; float64 brute force on distinct scores."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(9, 5000, generator=generator)
    if arrangement != "random":
        scores = scores.sort(1, descending=arrangement == "descending").values
    order = tie_order(5000)
    laid = scores[:, order]
    found = top_k(lambda r, c: laid[r, c].clone(), 9, order, 50, row_block=4, column_tile=512)
    assert torch.equal(found[0], scores.double().topk(50, dim=1).values.float())
    assert torch.equal(torch.gather(scores, 1, found[1]), found[0])
    # Columns in any fixed order are allowed: here the tiles themselves are ascending.
    plain = torch.arange(5000)
    in_order = top_k(lambda r, c: scores[r, c].clone(), 9, plain, 50, row_block=4, column_tile=512)
    assert torch.equal(in_order[0], found[0])


def test_tie_order_is_the_documented_hash():
    order = tie_order(500).tolist()
    assert sorted(order) == list(range(500))
    assert order == sorted(range(500), key=splitmix)
    # The order of two items does not change when the catalog grows.
    assert [item for item in tie_order(700).tolist() if item < 500] == order
    assert abs(float(np.corrcoef(order, np.arange(500))[0, 1])) < 0.1


def test_signed_zeros_tie():
    scores = torch.tensor([[0.0, -0.0] * 40])
    order = tie_order(80)
    found = top_k(lambda r, c: scores[:, order][r, c].clone(), 1, order, 80)[1]
    assert found[0].tolist() == order.tolist()


@given(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 2))
def test_keys_are_reversible(score, column):
    key = pack_keys(torch.tensor([score], dtype=torch.float32), torch.tensor([column]))
    assert unpack_scores(key).item() == score
    assert unpack_columns(key).item() == column


def test_infinite_scores():
    scores = torch.tensor([[1.0, -torch.inf, torch.inf, 0.0]])
    order = tie_order(4)
    values, found = top_k(lambda r, c: scores[:, order][r, c].clone(), 1, order, 4)
    assert found.tolist() == [[2, 0, 3, -1]]
    assert values.tolist() == [[torch.inf, 1.0, 0.0, -torch.inf]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_scored_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    items, queries = (
        torch.randn(300, 16, generator=generator).to(dtype),
        torch.randn(4, 16, generator=generator).to(dtype),
    )
    values, found = ExactIndex(items).search(queries, 300)
    assert values.dtype == torch.float32
    exact = queries.double() @ items.double().T
    torch.testing.assert_close(values.double(), exact.sort(1, descending=True).values, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.gather(exact, 1, found), values.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_items", [3, 64, 200])
def test_nan_is_refused(num_items):
    items = torch.ones(num_items, 2)
    for place in (0, num_items - 1):
        bad = items.clone()
        bad[place, 1] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            ExactIndex(bad)
    with pytest.raises(ValueError, match="diverged"):
        ExactIndex(items).search(torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]), 2)
    for place in (0, num_items - 1):
        scores = torch.full((2, num_items), -torch.inf)
        scores[1, place] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            top_k(lambda r, c, scores=scores: scores[r, c].clone(), 2, tie_order(num_items), 2)


def test_empty_inputs():
    index = ExactIndex(torch.ones(5, 2))
    values, found = index.search(torch.ones(0, 2), 3)
    assert values.shape == found.shape == (0, 3)
    nothing = ExactIndex(torch.ones(0, 2)).search(torch.ones(2, 2), 3)
    assert nothing[1].tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize(
    ("offsets", "items", "message"),
    [
        ([0, 1], [0], "offsets"),
        ([0, 1, 1], [5], "0 .. 4"),
        ([0, 1, 1], [-1], "0 .. 4"),
        ([0, 2, 1], [0], "must ascend"),
    ],
)
def test_invalid_exclusions_are_refused(offsets, items, message):
    with pytest.raises(ValueError, match=message):
        ExactIndex(torch.ones(5, 2)).search(torch.ones(2, 2), 2, (np.array(offsets), np.array(items)))


def test_wrong_shapes_are_refused():
    index = ExactIndex(torch.ones(5, 2))
    for call in (
        lambda: index.search(torch.ones(2, 3), 2),
        lambda: index.search(torch.ones(2), 2),
        lambda: index.search(torch.ones(2, 2), 0),
        lambda: ExactIndex(torch.ones(5)),
        lambda: ExactIndex(torch.ones(5, 2), torch.ones(4)),
    ):
        with pytest.raises(ValueError, match=r"must"):
            call()


def test_inputs_are_not_modified():
    items, queries = torch.randn(70, 3), torch.randn(2, 3)
    before = items.clone(), queries.clone()
    ExactIndex(items).search(queries, 3, (np.array([0, 1, 2]), np.array([4, 5])))
    assert torch.equal(items, before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.parametrize("k", [1, 5, 17, 40, 60])
def test_the_best_of_listed_items_are_chosen_by_score_and_then_by_hash(k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(0, 6, (20, 40), generator=generator).float()
    items = torch.stack([torch.randperm(1000, generator=generator)[:40] for _ in range(20)])
    empty = torch.rand(20, 40, generator=generator) < 0.3
    scores[empty], items[empty] = -torch.inf, -1
    found_scores, found = best_of(scores, items, k)
    for row in range(20):
        listed = [
            (-score, splitmix(item), item)
            for score, item in zip(scores[row].tolist(), items[row].tolist(), strict=True)
            if item >= 0
        ]
        expected = [item for _, _, item in sorted(listed)][:k]
        assert found[row].tolist() == expected + [-1] * (min(k, 40) - len(expected))
        assert found_scores[row, : len(expected)].tolist() == [-score for score, _, _ in sorted(listed)][:k]
