"""The autograd function of the tiled losses: finds repeated items and queries, runs the tiles, returns gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twotower.losses.tiled.blocks import exact_products
from twotower.losses.tiled.copies import find_copies
from twotower.losses.tiled.evaluation import LossInputs, TiledEvaluation
from twotower.losses.tiled.forms import TiledSoftmax
from twotower.losses.tiled.repeated_queries import RepeatedEvaluation, RepeatedQueries, find_repeated

#: The inputs that get gradients: query, positive, candidates, row candidates, temperature, bias.
Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]


class Tiled(torch.autograd.Function):
    """`apply(task, *inputs)` returns the weighted sum of the rows' losses; the forward pass computes the gradients."""

    @staticmethod
    def forward(ctx: Any, task: LossInputs, *inputs: Any) -> Tensor:
        """Compute value and gradients together."""
        total, ctx.gradients = evaluate(inputs, task, wanted=any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs)
        ctx.task = task
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the stored gradients by the gradient of the sum."""
        (grad,) = grads
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # second backward pass through a retained graph: the first one released the gradients
            _, gradients = evaluate(ctx.saved_tensors, ctx.task, wanted=True)
        # On an accelerator, reading the number would synchronize.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            gradients = [None if one is None else one * grad.to(one.dtype) for one in gradients]
        needed = ctx.needs_input_grad[1:]
        return (None, *(one if wants else None for one, wants in zip(gradients, needed, strict=True)))


def evaluate(inputs: Inputs, task: LossInputs, *, wanted: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the weighted sum, and its gradients with respect to the inputs if `wanted`."""
    query, positive, candidates, row_candidates, temperature, bias = inputs
    with torch.no_grad(), exact_products(query.device.type):
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        copies = None if task.own_places is not None else find_copies(candidates, task.log_count, task.mask)
        shared = candidates
        if copies is not None and task.mask is not None:
            shared = candidates.index_select(0, copies.place)
            log_count = None if task.log_count is None else task.log_count[copies.place]
            task = replace(task, log_count=log_count, mask=task.mask.select(copies.place), multiplicity=copies.count)
        scaled = query.to(dtype) / temperature.to(dtype)
        run = _run(
            find_repeated(query, task.mask)
            if isinstance(task.form, TiledSoftmax) and row_candidates is bias is None
            else None,
            scaled=scaled,
            positive=None if positive is None else positive.to(dtype),
            candidates=shared.to(dtype),
            rows=None if row_candidates is None else row_candidates.to(dtype),
            bias=None if bias is None else bias.to(dtype),
            task=task,
            wanted=wanted,
        )
        total = run.total()
        if not wanted:
            return total, []
        # The logit is a product of scaled query and item: its gradient with respect to T is - <dL/dscaled, scaled> / T.
        by_temperature = -(run.by_query * scaled).sum() / temperature.to(dtype)
        by_shared = run.by_candidates[: len(shared)]
        by_inputs: list[Tensor | None] = [
            run.by_query.div_(temperature.to(dtype)),
            run.by_positive if positive is not None else None,
            by_shared if copies is None else copies.spread(by_shared),
            run.by_rows,
            by_temperature.reshape(temperature.shape),
            None if bias is None else run.by_bias.reshape(bias.shape),
        ]
        pairs = zip(by_inputs, inputs, strict=True)
        return total, [None if g is None or i is None else g.to(i.dtype) for g, i in pairs]


def _run(lines: RepeatedQueries | None, *, scaled: Tensor, task: LossInputs, **inputs: Any) -> TiledEvaluation:
    """Choose the cheapest run for these inputs."""
    if lines is not None:
        repeated = RepeatedEvaluation(lines, scaled=scaled, task=task, **inputs)
        if repeated.base is not None:
            return repeated
    return TiledEvaluation(scaled=scaled, task=task, **inputs)
