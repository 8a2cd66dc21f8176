"""The tiled losses compared with the plain losses: value and every gradient, in float64, float32 and bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import InputError
from twotower.losses import (
    bpr,
    candidate_logits,
    full_softmax,
    logistic,
    refined_logq,
    sampled_softmax,
    tiled_bpr,
    tiled_full_softmax,
    tiled_logistic,
    tiled_softmax,
)
from twotower.losses.tiled import blocks as cutting
from twotower.losses.tiled import evaluation as tiled_evaluation
from twotower.negatives import NegativeMask

#: (rows, candidates, per-row candidates, width): odd sizes, one row, one candidate, none.
SHAPES = [(1, 1, 0, 3), (1, 9, 0, 5), (7, 1, 2, 1), (5, 0, 3, 4), (5, 0, 0, 4), (33, 127, 0, 17), (67, 257, 5, 9)]


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Everything in one tile, or tiles of a few rows in blocks of a few candidates."""
    if request.param == "many tiles":
        monkeypatch.setattr(cutting, "TILE_MEMORY", 40)
        monkeypatch.setattr(cutting, "BLOCK_NUMBERS", 40)
        monkeypatch.setattr(cutting, "LEAST_WIDTH", 1)
        monkeypatch.setattr(tiled_evaluation, "tile_starts", lambda rows, *_: [*range(0, rows, 4), rows])


def inputs(rows, size, per_row, width, *, seed=0, scale=1.0, masked=0.2):
    """Make named float64 leaves and the other arguments."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    leaves = {
        "query": scale * normal(rows, width),
        "positive": normal(rows, width),
        "candidates": normal(size, width),
        "temperature": torch.tensor(0.7, dtype=torch.float64),
    }
    given = {
        "log_expected_count": 3 * normal(size),
        "mask": torch.rand(rows, size, generator=rng) < masked,
        "weights": torch.rand(rows, generator=rng, dtype=torch.float64),
    }
    if per_row:
        leaves["row_candidates"] = normal(rows, per_row, width)
        given["row_log_expected_count"] = normal(rows, per_row)
        given["row_mask"] = torch.rand(rows, per_row, generator=rng) < masked
    extra = {"row_offset": normal(rows), "log_left": normal(rows), "own_offset": normal(rows)}
    return leaves, given, extra


def plain(form, leaves, given, extra):
    """Compute the weighted sum with the plain functions."""
    weights = given["weights"]
    logits = {name: value for name, value in {**leaves, **given}.items() if name not in {"weights", "bias"}}
    if form == "softmax":
        losses = sampled_softmax(**logits, row_offset=extra["row_offset"])
    elif form == "refined":
        losses = refined_logq(
            leaves["query"],
            leaves["positive"],
            leaves["candidates"],
            given["log_expected_count"],
            mask=given["mask"],
            log_left=extra["log_left"],
            row_offset=extra["row_offset"],
            temperature=leaves["temperature"],
        )[0]
    else:
        own, negatives = candidate_logits(**logits)
        if form == "bpr":
            losses = bpr(own, negatives)
        else:
            own = own - extra["own_offset"].to(own.dtype) + leaves["bias"]
            losses = logistic(own, negatives + leaves["bias"])
    return (losses * weights.to(losses.dtype)).sum()


def tiled(form, leaves, given, extra):
    if form == "softmax":
        return tiled_softmax(**leaves, **given, row_offset=extra["row_offset"])
    if form == "refined":
        return tiled_softmax(**leaves, **given, row_offset=extra["row_offset"], log_left=extra["log_left"])
    if form == "bpr":
        return tiled_bpr(**leaves, **given)
    return tiled_logistic(**leaves, **given, own_offset=extra["own_offset"])


def results(function, form, case, dtype=torch.float64):
    """Compute (value, gradients by name) with all tensors in one precision."""
    leaves, given, extra = case
    if form == "logistic":
        leaves = {**leaves, "bias": torch.tensor(-0.4, dtype=torch.float64)}
    leaves = {name: value.detach().clone().to(dtype).requires_grad_() for name, value in leaves.items()}
    value = function(form, leaves, given, extra)
    value.backward()
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return value.detach().double(), {name: grad.double() for name, grad in grads.items()}


def roundings(form, case):
    """How far rounding in float32 may move the value and each element of the gradients: {name: float64 tensor}.

    Every summed product of width D is exact for inputs that are each off by a few units of rounding. The largest change
    among 16 draws that move every number by sqrt(D + 3) units u = 2^-24 up or down, in float64: for each logit that is
    sqrt(2 (D + 3)) u sqrt(sum_k (q_k c_k)^2), where rounding itself gives about 0.4 D u sqrt(mean_k (q_k c_k)^2).

    Next to a kink at logits of 1e4, whose last digit is 1e-3, it is much; elsewhere next to nothing. It is the same on
    every processor.
    """
    leaves, given, extra = case
    value, grads = results(plain, form, case)
    moved = {name: torch.zeros_like(tensor) for name, tensor in {"value": value, **grads}.items()}
    unit = (leaves["query"].shape[1] + 3) ** 0.5 * 2.0**-24
    for seed in range(16):
        rng = torch.Generator().manual_seed(seed)
        near = {
            name: leaf * (1 + unit * (2 * torch.randint(2, leaf.shape, generator=rng) - 1))
            for name, leaf in leaves.items()
        }
        near_value, near_grads = results(plain, form, (near, given, extra))
        moved["value"] = torch.maximum(moved["value"], (near_value - value).abs())
        for name, grad in grads.items():
            moved[name] = torch.maximum(moved[name], (near_grads[name] - grad).abs())
    return moved


def assert_exact(form, case, dtype, function=tiled):
    """Error against float64 at most what rounding explains, in every element.

    That is the larger of two: what the rounding of the logits does (`roundings`), and that of the sums, 1e-6 (17 units
    of rounding) of the largest element and 1; a gradient in bfloat16 is rounded to 8 bits.
    """
    leaves, given, extra = case
    leaves = {name: leaf.to(dtype).double() for name, leaf in leaves.items()}
    case = leaves, given, extra
    value, grads = results(plain, form, case)
    found, found_grads = results(function, form, case, dtype)
    moved = roundings(form, case)
    allowed = 1e-6 if dtype == torch.float32 else 2.0**-8
    found_grads["value"], grads["value"] = found, value
    for name, exact in grads.items():
        if exact.numel():
            size = 1.0 + float(exact.abs().max())
            excess = (found_grads[name] - exact).abs() - moved[name].clamp(min=allowed * size)
            assert float(excess.max()) <= 0.0, name


FORMS = ["softmax", "refined", "logistic", "bpr"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("tiles")
def test_value_and_gradients_in_float64(form, shape):
    if form == "refined":
        shape = (*shape[:2], 0, shape[3])
    case = inputs(*shape)
    value, grads = results(plain, form, case)
    found, found_grads = results(tiled, form, case)
    assert float(found) == pytest.approx(float(value), rel=1e-12, abs=1e-12)
    for name, grad in grads.items():
        assert torch.allclose(found_grads[name], grad, rtol=1e-10, atol=1e-12), name
    assert shape[1] + shape[2] == 0 or float(found_grads["query"].abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("tiles")
def test_as_exact_as_the_precision_allows(form, scale, dtype):
    """From logits so small that no maximum is taken out to those of 1e4."""
    for shape in ((1, 1, 0, 3), (7, 1, 2, 1), (33, 127, 0, 17), (67, 257, 5, 9)):
        case = inputs(*shape[:2], 0 if form == "refined" else shape[2], shape[3], scale=scale)
        assert_exact(form, case, dtype)


def coarse_query(form, leaves, given, extra):
    """Every number of the query off by 2^-17, 128 units of rounding."""
    signs = 2 * torch.randint(2, leaves["query"].shape, generator=torch.Generator().manual_seed(99)) - 1
    return tiled(form, {**leaves, "query": leaves["query"] * (1 + 2.0**-17 * signs)}, given, extra)


def one_left_out(form, leaves, given, extra):
    """One candidate of 257 missing in one row, where it weighs most against the positive."""
    margin = leaves["query"] @ leaves["candidates"].T - (leaves["query"] * leaves["positive"]).sum(1, keepdim=True)
    mask = given["mask"].clone()
    mask.view(-1)[int(margin.detach().masked_fill(mask, -torch.inf).argmax())] = True
    return tiled(form, leaves, {**given, "mask": mask}, extra)


def too_large(form, leaves, given, extra):
    """Value and gradients too large by 1e-5."""
    return tiled(form, leaves, given, extra) * (1 + 1e-5)


@pytest.mark.parametrize("planted", [coarse_query, one_left_out, too_large])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
@pytest.mark.parametrize("form", FORMS)
def test_an_error_beyond_rounding_is_found(form, scale, planted):
    case = inputs(67, 257, 0 if form == "refined" else 5, 9, scale=scale)
    with pytest.raises(AssertionError):
        assert_exact(form, case, torch.float32, planted)


def test_many_blocks_cost_the_bias_no_precision(monkeypatch):
    """Its gradient, one sum over all pairs, is exact to a few of the 2^-24 of float32 however many blocks there are."""
    monkeypatch.setattr(cutting, "BLOCK_NUMBERS", 40)
    monkeypatch.setattr(cutting, "LEAST_WIDTH", 1)
    monkeypatch.setattr(tiled_evaluation, "tile_starts", lambda rows, *_: [*range(0, rows, 4), rows])
    leaves, given, extra = inputs(67, 257, 5, 9)
    case = {name: leaf.float().double() for name, leaf in leaves.items()}, given, extra
    exact = float(results(plain, "logistic", case)[1]["bias"])
    found = float(results(tiled, "logistic", case, torch.float32)[1]["bias"])
    assert abs(found - exact) <= 4 * 2.0**-24 * exact + float(roundings("logistic", case)["bias"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    size=st.integers(0, 12),
    per_row=st.integers(0, 3),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.0, 0.3, 30.0, 1e4]),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 10_000),
)
def test_any_small_batch(rows, size, per_row, masked, scale, form, seed):
    case = inputs(rows, size, 0 if form == "refined" else per_row, 3, seed=seed, scale=scale, masked=masked)
    assert_exact(form, case, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("tiles")
def test_every_candidate_masked(form):
    case = inputs(6, 5, 0 if form == "refined" else 2, 4, masked=1.1)
    assert_exact(form, case, torch.float32)
    value, grads = results(tiled, form, case)
    if form != "logistic":
        assert float(value) == 0.0
        assert all(float(grad.abs().max()) == 0.0 for grad in grads.values())


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("form", ["softmax", "logistic", "bpr"])
def test_finite_differences(form):
    leaves, given, extra = inputs(5, 6, 2, 3)
    if form == "logistic":
        leaves["bias"] = torch.tensor(0.3, dtype=torch.float64)
    names = list(leaves)

    def function(*values):
        return 1.7 * tiled(form, dict(zip(names, values, strict=True)), given, extra)

    assert torch.autograd.gradcheck(function, [value.requires_grad_() for value in leaves.values()])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", [(5, 9, 4), (1, 1, 2), (40, 70, 8)])
def test_the_whole_catalog(shape):
    rows, number, width = shape
    rng = torch.Generator().manual_seed(0)
    query, items = (torch.randn(n, width, generator=rng, dtype=torch.float64) for n in (rows, number))
    target = torch.randint(number, (rows,), generator=rng)
    found = []
    for tiled_form in (False, True):
        leaves = [query.clone().requires_grad_(), items.clone().requires_grad_()]
        loss = (
            tiled_full_softmax(leaves[0], target, leaves[1], temperature=0.3)
            if tiled_form
            else full_softmax(leaves[0], target, leaves[1], temperature=0.3).mean()
        )
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_no_matrix_of_all_rows_is_stored(monkeypatch):
    monkeypatch.setattr(cutting, "TILE_NUMBERS", 64 * 500)
    monkeypatch.setattr(cutting, "LEAST_ROWS", 64)
    leaves, given, _ = inputs(400, 500, 0, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        tiled_softmax(**{name: leaf.requires_grad_() for name, leaf in leaves.items()}, **given)
    assert saved
    assert max(saved) <= 500 * 8
    assert tiled_evaluation.tile_starts(400, 500, leaves["query"]) == [0, 64, 128, 192, 256, 320, 384, 400]


def test_a_retained_graph_returns_its_gradients_again():
    leaves, given, _ = inputs(4, 5, 0, 3)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    value = 3.0 * tiled_softmax(**leaves, **given)
    first = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(value, list(leaves.values()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, list(leaves.values()))


def test_bfloat16_products_are_close_and_their_setting_is_restored():
    leaves, given, _ = inputs(64, 200, 0, 32, scale=0.2)
    leaves = {name: leaf.float() for name, leaf in leaves.items()}
    before = torch.backends.mkldnn.matmul.fp32_precision
    exact = tiled_softmax(**leaves, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tiled_softmax(**leaves, **given)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(exact), rel=0.01)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("copies", [False, True])
def test_hits_as_pairs_equal_the_matrix(copies):
    """With copies of items, items that are not candidates, repeated pairs, empty slots; small and large catalogs."""
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        spread = 1 if seed % 2 else 10**12
        items = torch.randint(12, (15,), generator=rng) if copies else torch.randperm(30, generator=rng)[:15]
        empty = None if seed < 4 else torch.rand(15, generator=rng) < 0.2
        pairs = [
            (torch.arange(9), torch.randint(20, (9,), generator=rng) * spread),
            (torch.randint(9, (40,), generator=rng), torch.randint(-1, 20, (40,), generator=rng) * spread),
        ]
        mask = NegativeMask(pairs, rows=9, items=items * spread, size=15, empty=empty)
        dense = mask.dense()
        assert 0 < int(dense.sum()) < dense.numel()
        for starts in ([0, 9], [0, 2, 3, 3, 9]):
            found = torch.zeros(9, 15, dtype=torch.bool)
            for start, (row, place) in zip(starts, mask.tiles(starts), strict=False):
                found[start + row, place] = True
            assert torch.equal(dense, found if empty is None else found | empty)
        weight = torch.randint(1, 5, (15,), generator=rng)
        assert torch.equal(mask.count(weight), (dense * weight).sum(1))
        assert torch.equal(mask.head(4).dense(), dense[:4])
        chosen = torch.tensor([3, 1, 14])
        assert torch.equal(mask.select(chosen).dense(), dense[:, chosen])
        assert torch.equal(NegativeMask.of(dense).select(chosen).dense(), dense[:, chosen])
        assert torch.equal(NegativeMask.of(dense).count(weight), (dense * weight).sum(1))


def test_invalid_arguments_are_refused():
    leaves, given, _ = inputs(4, 5, 0, 3)
    for change, message in (
        ({"weights": torch.ones(3)}, "weights: expected"),
        ({"weights": torch.ones(4, requires_grad=True)}, "constants"),
        ({"mask": torch.zeros(4, 4, dtype=torch.bool)}, "mask: expected"),
        ({"mask": NegativeMask.of(torch.zeros(4, 4, dtype=torch.bool))}, "mask: expected"),
        ({"row_offset": torch.ones(3)}, "row_offset: expected"),
        ({"candidates": torch.ones(5, 2)}, "candidates: expected"),
    ):
        with pytest.raises(InputError, match=message):
            tiled_softmax(**{**leaves, **given, **change})
    with pytest.raises(InputError, match="positive_items: expected codes from 0 to 4"):
        tiled_full_softmax(leaves["query"], torch.tensor([0, 1, 2, 5]), leaves["candidates"])
