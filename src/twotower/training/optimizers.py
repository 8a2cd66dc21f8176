"""One optimizer for the whole model: AdamW for dense gradients, lazy Adam for the rows of sparse ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class TableAdamW(torch.optim.Optimizer):
    """AdamW that touches only the rows of a table that a step has used, where the table's gradient is sparse.

    Dense parameters follow Loshchilov & Hutter (2019), decoupled weight decay. A sparse gradient is first summed over
    duplicated rows; then mean and variance move for its rows alone ("lazy" Adam), with the bias correction of the
    global step, and the rows decay only when they are touched. The cost of a step does not depend on the number of
    rows in the table.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the running mean and of the running variance.
        eps: added to the root of the variance.
        weight_decay: decoupled weight decay, of the parameter per unit of learning rate.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in with_gradient:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "mean": torch.zeros_like(parameter),
                        "variance": torch.zeros_like(parameter),
                    }
            self._step_dense([p for p in with_gradient if not p.grad.is_sparse], group)
            for parameter in with_gradient:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, parameter.grad.coalesce(), group)
        return loss

    def _step_dense(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        state = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [entry["mean"] for entry in state],
            [entry["variance"] for entry in state],
            [],
            [entry["step"] for entry in state],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        rows, values = gradient.indices()[0], gradient.values()
        mean = state["mean"][rows].lerp_(values, 1 - beta1)
        variance = state["variance"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["mean"][rows] = mean
        state["variance"][rows] = variance
        scale = variance.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        update = mean.div_(1 - beta1**step).div_(scale)
        touched = parameter[rows] * (1 - group["lr"] * group["weight_decay"])
        parameter[rows] = touched.sub_(update, alpha=group["lr"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay the weight matrices of layers; leave tables, biases and scalars alone.

    A row of a table is touched as often as its item occurs, so decay would act on popular items most: it would be one
    more popularity bias.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in tables]
    decayed_ids = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in decayed_ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
