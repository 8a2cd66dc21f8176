"""The autograd function of the tiled losses: evaluates value and gradients in one pass and returns them to autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.tiled.blocks import exact_products
from twotower.losses.tiled.evaluation import TiledEvaluation
from twotower.losses.tiled.forms import TiledSoftmax, TileLoss
from twotower.losses.tiled.inputs import DIFFERENTIABLE, LossInputs, accumulation_dtype
from twotower.losses.tiled.kernel import KernelEvaluation, kernel_or_none
from twotower.losses.tiled.repeated_queries import RepeatedEvaluation, find_repeated


def tiled_loss(form: TileLoss, inputs: LossInputs) -> Tensor:
    """Compute the weighted sum of the rows' losses tile by tile, a scalar, float32 (float64 if the inputs are).

    Raises:
        InputError: shapes do not fit, the temperature is not above 0, or an input in `CONSTANT` requires a gradient.
    """
    inputs = inputs.checked()
    rest = inputs.with_tensors([None] * len(DIFFERENTIABLE))
    total: Tensor = Tiled.apply(form, rest, *inputs.tensors())  # type: ignore[no-untyped-call]
    return total


class Tiled(torch.autograd.Function):
    """`apply(form, rest, *tensors)` returns the weighted sum; the forward pass computes the gradients.

    The inputs that get gradients are passed as `tensors` and not in `rest`, so that the graph can release them.
    """

    @staticmethod
    def forward(ctx: Any, form: TileLoss, rest: LossInputs, *tensors: Any) -> Tensor:
        """Compute value and gradients together."""
        total, ctx.gradients = evaluate(form, rest.with_tensors(tensors), needs_grad=any(ctx.needs_input_grad))
        ctx.save_for_backward(*tensors)
        ctx.form, ctx.rest = form, rest
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the stored gradients by the gradient of the sum.

        Raises:
            InputError: the backward pass was called with create_graph=True. The stored gradients are constants, so a
                second derivative would silently be 0.
        """
        if torch.is_grad_enabled():
            raise InputError(
                "tiled losses: there is no second derivative (create_graph=True); use the plain losses "
                "(sampled_softmax, refined_logq, logistic, ...), which can be differentiated twice"
            )
        (grad,) = grads
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # second backward pass through a retained graph; the first released the gradients
            _, gradients = evaluate(ctx.form, ctx.rest.with_tensors(ctx.saved_tensors), needs_grad=True)
        # On an accelerator, reading the number would synchronize.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            gradients = [None if one is None else one * grad.to(one.dtype) for one in gradients]
        needed = ctx.needs_input_grad[2:]
        return (None, None, *(one if wants else None for one, wants in zip(gradients, needed, strict=True)))


def evaluate(form: TileLoss, inputs: LossInputs, *, needs_grad: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the weighted sum, and the gradients of `inputs.tensors()` if `needs_grad`."""
    with torch.no_grad(), exact_products(inputs.query.device.type):
        dtype = accumulation_dtype(inputs.query)
        query, positive, candidates, row_candidates, temperature, bias = (
            None if tensor is None else tensor.to(dtype) for tensor in inputs.tensors()
        )
        assert query is not None and temperature is not None
        scaled = query / temperature
        run = _run(
            form,
            inputs.with_tensors([scaled, positive, candidates, row_candidates, temperature, bias]),
            needs_grad=needs_grad,
        )
        total = run.total()
        if not needs_grad:
            return total, []
        # A logit is the product of scaled query and item, so dL/dT = -<dL/dscaled, scaled> / T.
        temperature_grad = -(run.query_grad * scaled).sum() / temperature
        tensor_grads: list[Tensor | None] = [
            run.query_grad.div_(temperature),
            run.positive_grad,
            run.candidates_grad[: len(inputs.candidates)],
            run.row_grad,
            temperature_grad.reshape(temperature.shape),
            None if bias is None else run.bias_grad.reshape(bias.shape),
        ]
        pairs = zip(tensor_grads, inputs.tensors(), strict=True)
        return total, [None if g is None or i is None else g.to(i.dtype) for g, i in pairs]


def _run(form: TileLoss, inputs: LossInputs, *, needs_grad: bool) -> TiledEvaluation | KernelEvaluation:
    """Choose the cheapest evaluation."""
    if (kernel := kernel_or_none(form, inputs, needs_grad=needs_grad)) is not None:
        return kernel
    if inputs.repeated_queries and isinstance(form, TiledSoftmax) and inputs.row_candidates is inputs.bias is None:
        lines = find_repeated(inputs.query, inputs.mask)
        if lines is not None:
            repeated = RepeatedEvaluation(lines, form, inputs, needs_grad=needs_grad)
            if repeated.base is not None:
                return repeated
    return TiledEvaluation(form, inputs, needs_grad=needs_grad)
