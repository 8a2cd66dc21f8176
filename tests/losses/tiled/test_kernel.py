"""The Triton kernels in the interpreter: value and gradients against the plain losses in float64 and slow loops."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reference
from twotower.errors import InputError
from twotower.losses import full_softmax, refined_logq, sampled_softmax, tiled_full_softmax, tiled_softmax
from twotower.losses.tiled import kernel
from twotower.losses.tiled.forms import TiledLogistic, TiledSoftmax
from twotower.losses.tiled.inputs import LossInputs
from twotower.negatives import NegativeMask


@pytest.fixture
def interpreted(monkeypatch):
    """Use the kernels on the CPU, in tiles of 16 rows and 16 candidates; count the evaluations."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton, on Linux")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter runs without a GPU only; tests/device compares the kernels on one")
    monkeypatch.setattr(kernel, "ROWS", 16)
    monkeypatch.setattr(kernel, "COLUMNS", 16)
    monkeypatch.setattr(kernel, "is_supported", kernel.fits)
    used, kept = [], kernel.KernelEvaluation

    def counted(*given, **options):
        used.append(1)
        return kept(*given, **options)

    monkeypatch.setattr(kernel, "KernelEvaluation", counted)
    yield used
    assert used, "the kernels were not used"


def parts(rows, size, width, per_row=0, *, copies=False, scale=1.0, seed=0):
    """Make float32 leaves, log counts, a mask of pairs with its matrix, and the other arguments."""
    rng = torch.Generator().manual_seed(seed)
    leaves = {
        "query": scale * torch.randn(rows, width, generator=rng),
        "positive": torch.randn(rows, width, generator=rng),
        "candidates": torch.randn(size, width, generator=rng),
        "temperature": torch.tensor(0.7),
    }
    items = 7 * torch.randperm(size, generator=rng)
    if copies:  # up to 24 copies of an item, which are more than a tile
        items = 7 * torch.randint(max(size // 12, 1), (size,), generator=rng)
    own = items[torch.randint(size, (rows,), generator=rng)]
    known = (
        torch.randint(rows, (rows,), generator=rng).sort().values,
        items[torch.randint(size, (rows,), generator=rng)],
    )
    absent = (torch.arange(rows), torch.full((rows,), 7 * size + 1))
    low = (torch.arange(rows), torch.full((rows,), -1))
    whole = (torch.full((size,), rows // 2), items)  # a row with every candidate masked
    empty = torch.rand(size, generator=rng) < 0.1
    mask = NegativeMask(
        [(torch.arange(rows), own), known, absent, low, whole], rows=rows, items=items, size=size, empty=empty
    )
    dense = torch.zeros(rows, size, dtype=torch.bool)
    for row, item in mask.pairs:
        for one, code in zip(row.tolist(), item.tolist(), strict=True):
            dense[one] |= items == code
    given = {
        "log_expected_count": (3 * torch.randn(size, generator=rng)).masked_fill(empty, torch.inf),
        "row_offset": torch.randn(rows, generator=rng),
        "weights": torch.rand(rows, generator=rng) / rows,
    }
    if per_row:
        leaves["row_candidates"] = torch.randn(rows, per_row, width, generator=rng)
        given["row_log_expected_count"] = torch.randn(rows, per_row, generator=rng)
        given["row_mask"] = torch.rand(rows, per_row, generator=rng) < 0.3
    return leaves, given, mask, dense | empty


def gradients(loss, leaves):
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def compared(leaves, given, mask, dense, *, log_left=None, value=1e-6, gradient=2e-6):
    """Compare with the plain loss in float64; errors are relative to the largest number of a gradient."""
    own = {name: one.clone().requires_grad_() for name, one in leaves.items()}
    loss = tiled_softmax(**own, **given, mask=mask, log_left=log_left)
    double = {name: one.double().requires_grad_() for name, one in leaves.items()}
    options = {name: one.double() if one.is_floating_point() else one for name, one in given.items()}
    weights = options.pop("weights")
    if log_left is None:
        losses = sampled_softmax(**double, **options, mask=dense)
    else:
        log_count = options.pop("log_expected_count")
        vectors = {name: double[name] for name in ("query", "positive", "candidates", "temperature")}
        losses, _ = refined_logq(**vectors, log_count=log_count, **options, mask=dense, log_left=log_left.double())
    expected = (losses * weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=value)
    wanted = gradients(expected, double)
    for name, found in gradients(loss, own).items():
        error = float((found - wanted[name]).abs().max())
        assert error <= gradient * float(wanted[name].abs().max()), (name, error)
        assert len(leaves["candidates"]) == 1 or float(wanted[name].abs().max()) > 0


@pytest.mark.parametrize(
    ("rows", "size", "width", "per_row", "copies"),
    [(2, 1, 1, 0, False), (5, 7, 3, 2, False), (33, 70, 17, 0, False), (19, 45, 20, 3, True), (17, 49, 33, 0, True)],
)
def test_odd_shapes_and_masks(interpreted, rows, size, width, per_row, copies):
    compared(*parts(rows, size, width, per_row, copies=copies))


def test_refined_logq(interpreted):
    leaves, given, mask, dense = parts(9, 20, 5)
    compared(leaves, given, mask, dense, log_left=torch.rand(9) + 1)


@pytest.mark.parametrize("splits", [(1, 1), (3, 2), (4, 2)])
def test_splits_of_the_loops_add_up(interpreted, monkeypatch, splits):
    """Also where a row's candidates are masked in all of a split, and where a split has no tile."""
    kept = kernel._Launch
    monkeypatch.setattr(kernel, "_Launch", lambda *given, **options: kept(*given, **{**options, "splits": splits}))
    leaves, given, _, _ = parts(20, 40, 4)
    dense = torch.zeros(20, 40, dtype=torch.bool)
    dense[3, :20] = dense[4] = dense[5, 16:32] = True
    compared(leaves, given, NegativeMask.of(dense), dense | torch.isposinf(given["log_expected_count"]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand(interpreted, sign):
    """Exponentials of such logits overflow; with a power of two as the scale, float32 and float64 have equal logits."""
    leaves, given, mask, dense = parts(6, 40, 2)
    grid = {name: (leaves[name] * 4).round() / 4 for name in ("query", "positive", "candidates")}
    leaves |= {**grid, "query": grid["query"] * 8192, "temperature": torch.tensor(1.0)}
    leaves["candidates"] = sign * leaves["candidates"].abs() * leaves["query"][:1].sign()
    logits = leaves["query"] @ leaves["candidates"].T
    assert logits.abs().max() > 1e4
    given["log_expected_count"] = (given["log_expected_count"] * 4).round() / 4
    given["row_offset"] = torch.zeros(6)
    compared(leaves, given, mask, dense, gradient=2e-3)


def test_equal_logits_far_from_zero(interpreted):
    """All logits are 1e4, or all -1e4: every candidate has the same weight, in closed form."""
    for level in (1e4, -1e4):
        query, ones = torch.full((3, 1), level, requires_grad=True), torch.ones(18, 1, requires_grad=True)
        positive = torch.ones(3, 1)
        loss = tiled_softmax(query, positive, ones, torch.zeros(18), mask=NegativeMask.of(torch.eye(3, 18) > 0))
        assert loss.item() == pytest.approx(torch.tensor(18.0).log().item(), rel=1e-5)
        found = torch.autograd.grad(loss, ones)[0]
        expected = level * torch.where(torch.arange(18) < 3, 2 / 3, 1.0) / 18
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-3, atol=0.0)


def test_value_equals_a_loop(interpreted):
    leaves, given, mask, dense = parts(4, 18, 3)
    log_count = given["log_expected_count"]
    losses = reference.sampled_softmax(
        leaves["query"], leaves["positive"], leaves["candidates"], log_count, dense.tolist(), temperature=0.7
    )
    found = tiled_softmax(**leaves, log_expected_count=log_count, mask=mask, weights=torch.ones(4))
    assert found.item() == pytest.approx(sum(losses), rel=1e-5)


def test_bfloat16(interpreted):
    """Queries and candidates are rounded to bfloat16; sums stay in float32."""
    leaves, given, mask, dense = parts(18, 40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compared(leaves, given, mask, dense, value=3e-3, gradient=2e-2)
    halved = {name: one.bfloat16() if one.ndim else one for name, one in leaves.items()}
    own = {name: one.clone().requires_grad_() for name, one in halved.items()}
    loss = tiled_softmax(**own, **given, mask=mask)
    assert loss.dtype == torch.float32 and all(one.dtype == own[n].dtype for n, one in gradients(loss, own).items())


def test_the_softmax_over_a_catalog(interpreted):
    rng = torch.Generator().manual_seed(3)
    query, items = torch.randn(7, 5, generator=rng), torch.randn(37, 5, generator=rng)
    target = torch.randint(37, (7,), generator=rng)
    leaves = {"query": query.requires_grad_(), "items": items.requires_grad_()}
    double = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    found = tiled_full_softmax(leaves["query"], target, leaves["items"], temperature=0.5)
    expected = full_softmax(double["query"], target, double["items"], temperature=0.5).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = gradients(expected, double)
    for name, one in gradients(found, leaves).items():
        torch.testing.assert_close(one.double(), wanted[name], rtol=1e-4, atol=1e-7)


def test_without_a_mask_and_equal_on_repetition(interpreted):
    leaves, given, _, _ = parts(18, 33, 4)
    given["log_expected_count"] = given["log_expected_count"].nan_to_num(posinf=0.0)
    compared(leaves, given, None, torch.zeros(18, 33, dtype=torch.bool))
    own = {name: one.clone().requires_grad_() for name, one in leaves.items()}
    first, second = (gradients(tiled_softmax(**own, **given), own) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in own)


def test_hits_are_listed_by_tile():
    items = torch.tensor([9, 4, 4, 4, 7, 4])
    mask = NegativeMask([(torch.tensor([0, 1, 1]), torch.tensor([4, 7, 5]))], rows=2, items=items, size=6)
    hits = kernel.HitTiles.of(mask)
    assert hits.order.tolist() == [1, 2, 3, 5, 4, 0] and hits.group.tolist() == [0, 0, 0, 0, 4, 5]
    assert hits.offsets.tolist() == [0, 2]
    assert sorted(zip(hits.row[:2].tolist(), hits.hit[:2].tolist(), strict=True)) == [(0, 0), (1, 4)]


def test_what_the_kernels_do_not_compute():
    leaves, given, mask, _ = parts(5, 7, 3)
    inputs = LossInputs(
        leaves["query"], leaves["positive"], leaves["candidates"], given["log_expected_count"], mask
    ).checked()
    assert kernel.fits(TiledSoftmax(), inputs)
    double = replace(inputs, query=inputs.query.double())
    wide = replace(inputs, query=torch.zeros(5, 129))
    assert kernel.fits(TiledSoftmax(), replace(wide, low_precision=True))
    for one in (
        double,
        wide,
        replace(inputs, bias=torch.tensor(0.0)),
        replace(inputs, multiplicity=torch.ones(7)),
        replace(inputs, query=torch.zeros(0, 3)),
    ):
        assert not kernel.fits(TiledSoftmax(), one)
    assert not kernel.fits(TiledLogistic(), inputs)
    assert not kernel.is_supported(TiledSoftmax(), inputs)  # on a CPU


def test_the_setting(monkeypatch):
    leaves, given, mask, _ = parts(5, 7, 3)
    monkeypatch.setenv(kernel.SETTING, "yes")
    with pytest.raises(InputError, match="TWOTOWER_TRITON: expected auto or off, found 'yes'"):
        tiled_softmax(**leaves, **given, mask=mask)
    for name in ("off", "auto"):
        monkeypatch.setenv(kernel.SETTING, name)
        tiled_softmax(**leaves, **given, mask=mask)


def test_tiles_are_used_if_the_kernels_do_not_compile(monkeypatch):
    leaves, given, mask, _ = parts(5, 7, 3)
    expected = tiled_softmax(**leaves, **given, mask=mask)
    monkeypatch.setattr(kernel.KernelState, "failed", False)
    monkeypatch.setattr(kernel, "is_supported", lambda form, inputs: not kernel.KernelState.failed)

    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel, "kernels", broken)
    with pytest.warns(UserWarning, match="the Triton softmax kernel does not run on this machine.*no compiler"):
        assert torch.equal(tiled_softmax(**leaves, **given, mask=mask), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tiled_softmax(**leaves, **given, mask=mask), expected)


@pytest.mark.slow
def test_the_kernels_compile_for_gpus():
    """For compute capability 8.0 and 9.0, to machine code, in less shared memory than a program may have."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton, on Linux")
    cases = [
        (64, "fp32", "tf32", 80),
        (128, "fp32", "tf32x3", 80),
        (33, "fp32", "tf32x3", 90),
        (33, "bf16", "tf32", 90),
        (256, "bf16", "tf32", 80),
    ]
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, str(script), json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    shared = json.loads(ran.stdout)
    assert len(shared) == 2 * len(cases) and max(shared.values()) <= 163 << 10
