"""One optimizer for the whole model: AdamW for layers, lazy Adam or row-wise Adagrad for embedding tables.

If the gradient of a table is sparse, only the rows that a step touches are read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adamw import adamw

from twotower.distributed.torchrec_tables import TorchRecTables
from twotower.errors import InputError
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.towers.text import TextTransformer, text_transformers


def combine_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a sparse gradient, ascending, and the sum of each row's entries.

    Rows that are already strictly ascending (every distinct item was embedded once) are returned unchanged. Otherwise
    the codes are sorted and each run of equal codes is summed, two to three times faster than with `Tensor.coalesce`.

    Args:
        gradient: the gradient, sparse [N, D] with one sparse dimension, as produced by `nn.Embedding(sparse=True)`.

    Returns:
        (rows int64 [M], sums [M, D]); the sums of a bfloat16 gradient are float32. The rows are distinct, except for a
        float32 table on an accelerator; see `sum_copies`.
    """
    rows, values = gradient._indices()[0], gradient._values()
    if values.dtype == torch.bfloat16:
        values = values.float()  # copies of a row would be rounded differently, so these rows must be distinct
    elif rows.device.type != "cpu":
        return (rows, values) if gradient.is_coalesced() else sum_copies(rows, values)
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, values
    ordered, order = rows.sort(stable=True)
    distinct, copies = torch.unique_consecutive(ordered, return_counts=True)
    return distinct, F.embedding_bag(order, values, copies.cumsum(0) - copies, mode="sum")


def sum_copies(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows and give every copy of a row the sum of all its copies, without a shape that depends on the data.

    Counting the distinct rows would make the host wait for an accelerator in every step. Copies have equal sums, so an
    update that reads a row, changes it by its sum and writes it back has the same result for every copy.

    Args:
        rows: int64 [M], in any order.
        values: the entries of these rows, [M, D].

    Returns:
        (rows int64 [M], ascending, with copies; sums [M, D]).
    """
    ordered, order = rows.sort(stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    run = is_new.cumsum(0) - 1
    sums = torch.zeros_like(values).index_add_(0, run, values.index_select(0, order))
    return ordered, sums.index_select(0, run)


def adam_rows(table: Tensor, rows: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Apply lazy Adam: update mean m and variance v of the touched rows only, with the bias correction of step t.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Kingma & Ba (2015), algorithm 1, on the rows of the gradient. A row that is not touched for many steps resumes with
    its old m and v, whereas Adam would have decayed them and kept moving the row.

    Args:
        table: the table, [N, D]; changed in place.
        rows: the rows to update, int64 [M]; copies of a row have the same gradient.
        gradient: the gradients of these rows, [M, D].
        state: `step`, `mean` and `variance` [N, D], changed in place.
        group: `lr`, `betas`, `eps`, `weight_decay` (decoupled, on touched rows).
    """
    step = float(state["step"])
    beta1, beta2 = group["betas"]
    mean = state["mean"].index_select(0, rows).lerp_(gradient, 1 - beta1)
    state["mean"].index_copy_(0, rows, mean)
    variance = state["variance"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["variance"].index_copy_(0, rows, variance)
    scale = variance.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    move_rows(table, rows, mean.div_(scale), group["lr"] / (1 - beta1**step), 1 - group["lr"] * group["weight_decay"])


def adagrad_rows(
    table: Tensor, rows: Tensor | None, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    """Apply row-wise Adagrad: one accumulator a per row, so a table of width D has 1/D of Adagrad's state.

        a_j <- a_j + mean_d g_jd^2,   w_j <- w_j - lr g_j / (sqrt(a_j) + eps)

    Adagrad (Duchi, Hazan & Singer 2011) with the accumulator averaged over the row, as `EXACT_ROWWISE_ADAGRAD` of
    FBGEMM defines it. A row without a gradient does not change, so lazy and dense updates are the same.

    Args:
        table: the table, [N, D]; changed in place.
        rows: the rows to update, int64 [M]; copies of a row have the same gradient. None if the gradient covers all N.
        gradient: the gradients of these rows, [M, D].
        state: `sum` [N], changed in place.
        group: `lr`, `eps`, `weight_decay` (decoupled, on touched rows).
    """
    square = torch.linalg.vector_norm(gradient, dim=1).square_().div_(gradient.shape[1])
    total = square.add_(state["sum"] if rows is None else state["sum"].index_select(0, rows))
    if rows is None:
        state["sum"].copy_(total)
    else:
        state["sum"].index_copy_(0, rows, total)
    step = gradient / total.sqrt().add_(group["eps"])[:, None]
    move_rows(table, rows, step, group["lr"], 1 - group["lr"] * group["weight_decay"])


def move_rows(table: Tensor, rows: Tensor | None, direction: Tensor, rate: float, keep: float = 1.0) -> None:
    """Set w_j to `keep` w_j - `rate` direction_j for the given rows, in float32; bfloat16 tables are then rounded.

    Args:
        table: the table, [N, D]; changed in place.
        rows: the rows to update, int64 [M]; copies of a row have the same direction. None for all N.
        direction: the direction of each of these rows, [M, D].
        rate: step length.
        keep: factor applied to each row for weight decay.
    """
    moved = table.clone() if rows is None else table.index_select(0, rows)
    moved = moved.to(direction.dtype)
    if keep != 1.0:
        moved.mul_(keep)
    moved.sub_(direction, alpha=rate)
    if table.dtype == torch.bfloat16:
        moved = round_stochastically(moved)
    if rows is None:
        table.copy_(moved)
    else:
        table.index_copy_(0, rows, moved)


def round_stochastically(values: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability that makes the expectation exact.

    bfloat16 has 8 bits of precision. With rounding to nearest, a step smaller than 1/512 of a weight would always be
    lost and training would stall; with stochastic rounding the expected update is exact (Gupta et al. 2015, "Deep
    learning with limited numerical precision", section 3). The rounding uses the device's global generator, whose state
    is part of a checkpoint.

    Args:
        values: float32, finite, any shape.

    Returns:
        bfloat16, the same shape.
    """
    bits = values.contiguous().view(torch.int32)
    # bfloat16 is the upper half of a float32; random bits added to the lower half carry with the right probability.
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return bits.add(noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


#: Update rules of a parameter group.
RULES = ("adam", "rowwise-adagrad")


class TableOptimizer(torch.optim.Optimizer):
    """AdamW for dense gradients; lazy Adam or row-wise Adagrad for the rows of a sparse gradient.

    One optimizer for the whole model has one state, one schedule and one checkpoint. A group's `rule` selects the
    update:

    - `adam`: AdamW (Loshchilov & Hutter 2019) for a dense gradient, lazy Adam for a sparse gradient. See `adam_rows`.
    - `rowwise-adagrad`: for tables, [N, D]; a sparse gradient updates only its rows. See `adagrad_rows`.

    Duplicate rows of a sparse gradient are summed once (`combine_rows`), and no temporary is as large as a table: the
    cost of a step depends on the rows it touches, not on N. bfloat16 tables are updated in float32 and rounded
    stochastically; their state is float32. A step is collective if TorchRec updates tables.

    Args:
        params: parameters or parameter groups; see `parameter_groups`. A group can contain an `engine`, a pair of
            TorchRec's tables and their names by `id` of the weight; TorchRec updates these tables. The pair is not kept
            in the group or the saved state.
        lr: learning rate.
        betas: decay of Adam's running mean and of its running variance.
        eps: added to the square root of the variance, or of the accumulator.
        weight_decay: decoupled weight decay, per unit of learning rate.
        rule: the rule of groups that do not set one.

    Raises:
        InputError: a rule is unknown, or `rowwise-adagrad` is set for a parameter that is not a table.
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
        self._engine: TorchRecTables | None = None
        self._named: dict[int, str] = {}  # the engine's tables by `id`
        given: list[Any] = []
        for number, one in enumerate(params):
            if isinstance(one, dict) and "engine" in one:
                self._engine, self._named = one["engine"]
                self._engine.before_lookup = partial(self._before_lookup, number)
                one = {name: value for name, value in one.items() if name != "engine"}  # noqa: PLW2901
            given.append(one)
        super().__init__(given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rule": rule})
        for group in self.param_groups:
            if group["rule"] not in RULES:
                raise InputError(f"rule: expected one of {', '.join(RULES)}, found {group['rule']!r}")
            if group["rule"] == "rowwise-adagrad" and any(parameter.ndim != 2 for parameter in group["params"]):
                raise InputError("rowwise-adagrad: expected tables, [N, D]; found a parameter of a different shape")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_engine()
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
            InputError: the state belongs to different parameters.
        """
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise InputError(
                f"optimizer: the saved state does not fit this model ({error}); resume with the version and the "
                "settings that wrote it, or train from scratch"
            ) from error
        # torch casts state to the parameter's type; the state of a bfloat16 table must stay float32.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device)

    def _before_lookup(self, group: int) -> float:
        """Load saved sums into the engine's accumulators, use these as the state, and return the learning rate."""
        assert self._engine is not None
        for parameter in self._held:
            state, accumulator = self.state[parameter], self._engine.accumulator(self._named[id(parameter)])
            if "sum" in state and state["sum"] is not accumulator:
                accumulator.copy_(state["sum"])
            state.setdefault("step", torch.tensor(0.0))
            state["sum"] = accumulator
        return float(self.param_groups[group]["lr"])

    def _step_engine(self) -> None:
        """Let the engine update its tables."""
        if self._engine is None:
            return
        for parameter in self._held:
            name = self._named[id(parameter)]
            if parameter.data_ptr() != self._engine.weight(name).data_ptr():
                raise RuntimeError(f"table {name}: TorchRec updates different weights (internal error)")
        if self._engine.update():
            for parameter in self._held:
                self.state[parameter]["step"] += 1

    @property
    def _held(self) -> list[nn.Parameter]:
        return [one for group in self.param_groups for one in group["params"] if id(one) in self._named]

    def _step_table(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        rows, values = combine_rows(gradient) if gradient.is_sparse else (None, gradient)
        if group["rule"] == "rowwise-adagrad":
            adagrad_rows(parameter, rows, values.to(state["sum"].dtype), state, group)
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
    """Return the parameter's type, or float32 for 16-bit types, in which sums of squares would soon stop growing."""
    return torch.float32 if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.dtype


#: Default learning rates of text encoders, by the way they are trained (`train` of a text feature).
ENCODER_RATES = {"lora": 2e-4, "full": 2e-5}


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float,
    table_rule: str = "adam",
    table_lr: float | None = None,
    encoder_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Build the groups of `TableOptimizer`: decayed weight matrices; biases and scalars; tables; text encoders.

    Text encoders have two groups, with and without decay, for each way of training them. Their word vectors count as
    weight matrices, not as tables, because they belong to the pretrained model.

    Tables do not decay. A row is touched as often as its item occurs, so decay would affect popular items most and add
    a popularity bias.

    Args:
        model: its `nn.Embedding` modules are the tables.
        weight_decay: weight decay of the layers' weight matrices.
        lr: learning rate of the layers.
        table_rule: "adam" or "rowwise-adagrad".
        table_lr: learning rate of the tables; None for `lr`.
        encoder_lr: learning rate of text encoders; None for `ENCODER_RATES`.
    """
    texts = text_transformers(model)
    in_texts = {id(p) for text in texts for p in text.parameters()}
    others = [p for p in model.parameters() if id(p) not in in_texts]
    ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables = [p for p in others if id(p) in ids]
    decayed = [p for p in others if p.ndim >= 2 and id(p) not in ids]
    rest = [p for p in others if p.ndim < 2 and id(p) not in ids]
    shared = shared_tables_of(model)
    engine = shared[0].engine if shared else None
    named = {id(table.weight): table.name for table in shared}
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay, "rule": "adam"},
        {"params": rest, "lr": lr, "weight_decay": 0.0, "rule": "adam"},
        {
            "params": tables,
            "lr": lr if table_lr is None else table_lr,
            "weight_decay": 0.0,
            "rule": table_rule,
            **({} if engine is None else {"engine": (engine, named)}),
        },
        *_text_groups(texts, weight_decay, encoder_lr),
    ]


def _text_groups(texts: list[TextTransformer], weight_decay: float, lr: float | None) -> list[dict[str, Any]]:
    groups = []
    for mode, rate in ENCODER_RATES.items():
        trained = [p for text in texts if text.train_mode == mode for p in text.parameters() if p.requires_grad]
        if trained:
            common = {"lr": rate if lr is None else lr, "rule": "adam"}
            groups += [
                {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, **common},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, **common},
            ]
    return groups
