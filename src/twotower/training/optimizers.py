"""One optimizer for the whole model: AdamW for layers, lazy Adam or row-wise Adagrad for embedding tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from twotower.errors import InputError
from twotower.towers.lookups import shared_tables_of
from twotower.towers.parts import Columns
from twotower.training.rows import adagrad_rows, adam_rows, combine_rows

#: Update rules of a parameter group.
RULES = ("adam", "rowwise-adagrad")


class TableOptimizer(torch.optim.Optimizer):
    """AdamW for dense gradients; Adam or row-wise Adagrad for tables, applied only to the rows of a step.

    One optimizer with one state, one schedule and one checkpoint. A group's `rule` selects the update:

    - `adam`: a dense gradient as AdamW (Loshchilov & Hutter 2019). A sparse one lazily: see `adam_rows`.
    - `rowwise-adagrad`: for tables, [N, D]; a sparse gradient updates only its rows. See `adagrad_rows`.

    Duplicate rows of a sparse gradient are summed once (`combine_rows`), and no temporary is as large as a table: the
    cost of a step depends on the rows it touches, not on N. bfloat16 tables are updated in float32 and rounded
    stochastically; their state is float32. A step with row-wise Adagrad is collective for column-sharded tables.

    Args:
        params: parameters or parameter groups; see `parameter_groups`. A group's `columns` maps the `id` of a parameter
            to its columns of a sharded table; it is not part of the group or of the saved state.
        lr: learning rate.
        betas: decay of Adam's running mean and of its running variance.
        eps: added to the root of the variance, or of the accumulator.
        weight_decay: decoupled weight decay of the parameter, per unit of learning rate.
        rule: the rule of groups without one.

    Raises:
        ValueError: a rule is unknown, or `rowwise-adagrad` is set for a parameter that is not a table.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rule: str = "adam",
    ) -> None:
        self._columns: dict[int, Columns] = {}
        given: list[Any] = []
        for one in params:
            if isinstance(one, dict):
                self._columns |= one.get("columns", {})
                one = {name: value for name, value in one.items() if name != "columns"}  # noqa: PLW2901
            given.append(one)
        super().__init__(given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rule": rule})
        for group in self.param_groups:
            if group["rule"] not in RULES:
                raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {group['rule']!r}")
            if group["rule"] == "rowwise-adagrad" and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("rowwise-adagrad: expected tables, [N, D]; found a parameter of another shape")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            layers: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = fresh_state(parameter, group["rule"])
                if group["rule"] == "adam" and not parameter.grad.is_sparse:
                    layers.append(parameter)
                else:
                    self._step_table(parameter, parameter.grad, group)
            self._step_layers(layers, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            InputError: the state belongs to other parameters.
        """
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise InputError(
                f"optimizer: the saved state does not fit this model ({error}); resume with the settings and the "
                "version that wrote it, or train from scratch"
            ) from error
        # torch casts state to the parameter's type; the state of a bfloat16 table must stay float32.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device)

    def _step_table(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        rows, values = combine_rows(gradient) if gradient.is_sparse else (None, gradient)
        if group["rule"] == "rowwise-adagrad":
            columns = self._columns.get(id(parameter))
            adagrad_rows(parameter, rows, values.to(state["sum"].dtype), state, group, columns=columns)
        elif rows is not None:
            adam_rows(parameter, rows, values, state, group)

    def _step_layers(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
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


def fresh_state(parameter: Tensor, rule: str) -> dict[str, Tensor]:
    """Return the optimizer state of a parameter before its first step.

    `adam`: `mean` and `variance`, each as large as the parameter. `rowwise-adagrad`: `sum`, one number per row.
    """
    dtype = state_dtype(parameter)
    state = {"step": torch.tensor(0.0)}
    if rule == "rowwise-adagrad":
        return {**state, "sum": torch.zeros(len(parameter), dtype=dtype, device=parameter.device)}
    return {
        **state,
        "mean": torch.zeros_like(parameter, dtype=dtype),
        "variance": torch.zeros_like(parameter, dtype=dtype),
    }


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return float32 for a 16-bit parameter, where sums of squares would soon stop growing; else its own type."""
    return torch.float32 if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.dtype


def parameter_groups(
    model: nn.Module, weight_decay: float, *, lr: float, table_rule: str = "adam", table_lr: float | None = None
) -> list[dict[str, Any]]:
    """Build the groups of `TableOptimizer`: decayed weight matrices; biases and scalars; tables.

    Tables do not decay. A row is touched as often as its item occurs, so decay would affect popular items most, which
    would be another popularity bias.

    Args:
        model: its `nn.Embedding` modules are the tables.
        weight_decay: of the weight matrices of layers.
        lr: learning rate of the layers.
        table_rule: "adam" or "rowwise-adagrad".
        table_lr: learning rate of the tables; None for `lr`.
    """
    ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables = [p for p in model.parameters() if id(p) in ids]
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in ids]
    rest = [p for p in model.parameters() if p.ndim < 2 and id(p) not in ids]
    columns = {id(table.weight): table.part for table in shared_tables_of(model) if isinstance(table.part, Columns)}
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay, "rule": "adam"},
        {"params": rest, "lr": lr, "weight_decay": 0.0, "rule": "adam"},
        {
            "params": tables,
            "lr": lr if table_lr is None else table_lr,
            "weight_decay": 0.0,
            "rule": table_rule,
            "columns": columns,
        },
    ]
