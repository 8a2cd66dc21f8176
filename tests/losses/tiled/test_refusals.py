"""What the tiled losses refuse: second derivatives, gradients they do not compute, temperatures of 0; and no rows."""

import pytest
import torch

from twotower.errors import InputError
from twotower.losses import (
    full_softmax,
    sampled_softmax,
    tiled_bpr,
    tiled_full_softmax,
    tiled_logistic,
    tiled_softmax,
)

LOSSES = [tiled_softmax, tiled_logistic, tiled_bpr]


def given(rows=5, size=7):
    rng = torch.Generator().manual_seed(0)
    query, positive, candidates = (
        torch.randn(n, 3, generator=rng, dtype=torch.float64).requires_grad_() for n in (rows, rows, size)
    )
    return query, positive, candidates, torch.zeros(size, dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_derivative_is_refused(loss):
    """It was 0, silently: a penalty on the gradient would have had no effect."""
    inputs = given()
    value = loss(*inputs)
    with pytest.raises(InputError, match="no second derivative"):
        torch.autograd.grad(value + inputs[0].square().sum(), inputs[0], create_graph=True)
    (gradient,) = torch.autograd.grad(sampled_softmax(*inputs).mean(), inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), inputs[0])
    assert float(second.abs().max()) > 1e-3, "the plain loss has one"
    loss(*inputs).backward()


@pytest.mark.parametrize(
    "name",
    ["log_expected_count", "row_offset", "log_left", "row_log_expected_count", "own_offset", "weights"],
)
def test_gradients_that_are_not_computed_are_refused(name):
    query, positive, candidates, log_count = given()
    rows, options = torch.zeros(5, dtype=torch.float64, requires_grad=True), {}
    loss = tiled_logistic if name == "own_offset" else tiled_softmax
    if name == "log_expected_count":
        log_count.requires_grad_()
    elif name == "row_log_expected_count":
        options = {"row_candidates": torch.zeros(5, 2, 3, dtype=torch.float64)}
        options[name] = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    else:
        options[name] = rows
    with pytest.raises(InputError, match=f"{name}: expected constants"):
        loss(query, positive, candidates, log_count, **options)
    if name in {"log_expected_count", "row_offset"}:
        plain = sampled_softmax(query, positive, candidates, log_count, **options).sum()
        (gradient,) = torch.autograd.grad(plain, options.get(name, log_count))
        assert float(gradient.abs().max()) > 1e-3, "the plain loss has it"


@pytest.mark.parametrize("temperature", [0.0, -0.5, torch.tensor(0.0), torch.tensor(-1.0, requires_grad=True)])
def test_a_temperature_of_zero_or_below_is_refused(temperature):
    inputs = given()
    for loss in (sampled_softmax, *LOSSES):
        with pytest.raises(InputError, match="temperature: expected a number above 0"):
            loss(*inputs, temperature=temperature)
    query, items = inputs[0], inputs[2]
    for loss in (full_softmax, tiled_full_softmax):
        with pytest.raises(InputError, match="temperature: expected a number above 0"):
            loss(query, torch.zeros(5, dtype=torch.int64), items, temperature=temperature)


@pytest.mark.parametrize("size", [0, 7, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows_have_loss_zero_and_no_gradient(loss, size):
    inputs = given(0, size)
    value = loss(*inputs, mask=torch.zeros(0, size, dtype=torch.bool))
    assert value.item() == 0.0
    value.backward()
    assert inputs[2].grad.shape == (size, 3) and not bool(inputs[2].grad.any())
    assert sampled_softmax(*inputs).shape == (0,)
    nobody = torch.zeros(0, dtype=torch.int64)
    assert tiled_full_softmax(inputs[0], nobody, inputs[2]).item() == 0.0
    assert full_softmax(inputs[0], nobody, inputs[2]).shape == (0,) if size else True
