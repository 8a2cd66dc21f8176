"""Updates of the table rows that a step touches; the rest of the table is neither read nor written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.towers.parts import Columns


def combine_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of a sparse gradient, ascending, and the sum of each row's entries.

    Rows that are already strictly ascending, as when every distinct item was embedded once, are returned unchanged.
    Otherwise the codes are sorted and each run of equal codes is summed; `Tensor.coalesce` does the same two to three
    times slower.

    Args:
        gradient: sparse [N, D] with one sparse dimension, as produced by `nn.Embedding(sparse=True)`.

    Returns:
        (rows int64 [M], sums [M, D]); the sums of a bfloat16 gradient are float32.
    """
    rows, values = gradient._indices()[0], gradient._values()
    if values.dtype == torch.bfloat16:
        values = values.float()
    if gradient.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, values
    ordered, order = rows.sort(stable=True)
    distinct, copies = torch.unique_consecutive(ordered, return_counts=True)
    return distinct, F.embedding_bag(order, values, copies.cumsum(0) - copies, mode="sum")


def adam_rows(table: Tensor, rows: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Apply lazy Adam: mean m and variance v of the touched rows alone, with the bias correction of step t.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Kingma & Ba (2015), algorithm 1, on the rows of the gradient. A row that is not touched for many steps resumes with
    its old m and v, whereas Adam would have decayed them and kept moving the row.

    Args:
        table: [N, D], changed in place.
        rows: int64 [M], distinct.
        gradient: [M, D].
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
    table: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    *,
    columns: Columns | None = None,
) -> None:
    """Apply row-wise Adagrad: one accumulator a per row, so a table of width D has 1/D of Adagrad's state.

        a_j <- a_j + mean_d g_jd^2,   w_j <- w_j - lr g_j / (sqrt(a_j) + eps)

    Adagrad (Duchi, Hazan & Singer 2011) with the accumulator averaged over the row, as `EXACT_ROWWISE_ADAGRAD` of
    FBGEMM defines it. A row without a gradient does not change, so lazy and dense updates are the same.

    Args:
        table: [N, D], changed in place.
        rows: int64 [M], distinct; None if the gradient covers all N rows.
        gradient: [M, D].
        state: `sum` [N], changed in place.
        group: `lr`, `eps`, `weight_decay` (decoupled, on touched rows).
        columns: which columns of a wider table these are. Other ranks hold the other columns of the same rows, and the
            mean over d is over all columns (collective).
    """
    square = torch.linalg.vector_norm(gradient, dim=1).square_()
    if columns is None:
        square.div_(gradient.shape[1])
    else:
        columns.ranks.sum_in_place(square).div_(columns.width)
    total = square.add_(state["sum"] if rows is None else state["sum"].index_select(0, rows))
    if rows is None:
        state["sum"].copy_(total)
    else:
        state["sum"].index_copy_(0, rows, total)
    step = gradient / total.sqrt().add_(group["eps"])[:, None]
    move_rows(table, rows, step, group["lr"], 1 - group["lr"] * group["weight_decay"])


def move_rows(table: Tensor, rows: Tensor | None, direction: Tensor, rate: float, keep: float = 1.0) -> None:
    """Set w_j to `keep` w_j - `rate` direction_j for the given rows, in float32; bfloat16 tables are rounded after it.

    Args:
        table: [N, D], changed in place.
        rows: int64 [M], distinct; None for all N.
        direction: [M, D].
        rate: step length.
        keep: factor of a row for weight decay.
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

    bfloat16 has 8 bits of precision. With rounding to nearest, a step smaller than 1/512 of a weight would be lost
    every time and training would stall; with stochastic rounding the expected movement is right (Gupta et al. 2015,
    "Deep learning with limited numerical precision", section 3). Uses the device's global generator, whose state is
    part of a checkpoint.

    Args:
        values: float32, finite, any shape.

    Returns:
        bfloat16, the same shape.
    """
    bits = values.contiguous().view(torch.int32)
    # bfloat16 is the upper half of a float32: a random lower half carries into it with the right probability.
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return bits.add(noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
