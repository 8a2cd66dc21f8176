"""The losses as the tiled evaluation sees them: from blocks of logits to the rows' losses and, in place, gradients.

A form receives the logits of some rows block by block, each [R, m], with masked entries at -inf. It overwrites every
block with numbers g such that the gradient with respect to a logit is w_b `scale`_b g, where w are the rows' weights in
the mean. Per-row quantities are stored for the whole batch and processed together, because even a small operation reads
from memory after a matrix product, so a tile should need few such operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.losses.binary import softplus


class TileLoss(ABC):
    """A loss that can be evaluated tile by tile.

    Attributes:
        sums_exponentials: the loss depends on the candidates only through sum_j exp l_j, so that their weights may be
            applied to the sum instead of the logits. Its blocks are exponentials, or logits times `log2_unit`.
    """

    sums_exponentials: bool = False

    @abstractmethod
    def begin(self, own: Tensor, *, offset: Tensor | None, base: float | None) -> Sums:
        """Start a batch.

        Args:
            own: the positives' logits, [B].
            offset: subtracted from all candidate logits of a row, [B].
            base: None if a row maximum has to be subtracted. Otherwise blocks are exponentials, 0 where masked, with
                weights exp(base - log count), and -base is added to the log of the sum.
        """


class Sums(ABC):
    """The running sums of a batch's rows.

    Attributes:
        is_final: whether a block has its final values once it is visited, even if other blocks of its rows are not.
    """

    is_final: bool = True

    @abstractmethod
    def visit(self, part: slice, block: Tensor, weight: Tensor | None) -> None:
        """Add one block of logits of some rows, [R, m], with its candidates' weights, [m]."""

    @abstractmethod
    def scale(self, part: slice) -> Tensor | None:
        """Return the factor that turns block values into gradients, [R]; None for 1. Call after visiting all blocks."""

    @abstractmethod
    def finish(self) -> tuple[Tensor, Tensor]:
        """Return (loss, its derivative with respect to the positive's logit), [B] each."""


@dataclass
class TiledSoftmax(TileLoss):
    """-s_y + log( exp s_y + sum_i exp l_i ), or the published refined logQ value, which has the same gradient.

    Attributes:
        log_left: log n' of each row, [B], for refined logQ; None for the softmax.
    """

    log_left: Tensor | None = None
    sums_exponentials = True

    def begin(self, own: Tensor, *, offset: Tensor | None, base: float | None) -> SoftmaxSums:
        """Start a batch; see `TileLoss.begin`."""
        return SoftmaxSums(own, offset, base, self.log_left)


class SoftmaxSums(Sums):
    """The sum of exponentials of each row."""

    def __init__(self, own: Tensor, offset: Tensor | None, base: float | None, log_left: Tensor | None) -> None:
        self.dtype, self.log_left = own.dtype, log_left
        self.is_final = base is not None
        # One number per row: double precision costs nothing.
        self.own = own.double() + (base or 0.0)
        if offset is not None:
            self.own += offset.double()
        self.total = torch.zeros_like(self.own)
        self.largest = None if self.is_final else torch.full_like(own, -torch.inf)
        self.blocks: list[Tensor] = []
        self.sums: list[Tensor] = []

    def visit(self, part: slice, block: Tensor, weight: Tensor | None) -> None:
        """Add one block; see `Sums.visit`."""
        if self.largest is None:
            self.sums.append(row_sums(block, weight))
        else:
            self.largest[part] = torch.maximum(self.largest[part], block.amax(1))
            self.blocks.append(block)

    def add(self, part: slice, total: Tensor) -> None:
        """Add sums of weighted exponentials of some rows, [R]; only if no row maximum is subtracted."""
        self.total[part] += total

    def scale(self, part: slice) -> Tensor:
        """Return the gradient factor; see `Sums.scale`."""
        if self.sums:
            self.add(part, torch.stack(self.sums).double().sum(0))
            self.sums.clear()
        if self.largest is not None:
            largest = self.largest[part]
            largest.masked_fill_(torch.isneginf(largest), 0.0)
            for block in self.blocks:
                self.total[part] += block.sub_(largest[:, None]).exp2_().sum(1)
            self.blocks.clear()
            self.own[part] -= largest.double() / log2_unit(self.dtype)
        total = self.total[part]
        # P(not y) / total = 1 / (total + e^s_y); 0 where all candidates are masked.
        inverse = (total + self.own[part].exp()).reciprocal_().masked_fill_(total == 0, 0.0)
        return inverse.to(self.dtype)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return losses and derivatives; see `Sums.finish`."""
        return self.finish_at(self.total.log())

    def finish_at(self, log_total: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and derivatives, given the log of the sums, float64 [B]."""
        margin = (log_total - self.own).to(self.dtype)
        wrong = torch.sigmoid(margin)  # 1 - P_hat(y)
        if self.log_left is None:
            return softplus(margin), -wrong
        return wrong * (margin + self.log_left.to(self.dtype)).masked_fill(torch.isneginf(margin), 0.0), -wrong


@dataclass
class TiledLogistic(TileLoss):
    """-beta log sigmoid(s_y) - sum_i log sigmoid(-l_i).

    Attributes:
        beta: weight of the positive; see `gbce`.
    """

    beta: float = 1.0

    def begin(self, own: Tensor, *, offset: Tensor | None, base: float | None) -> Sums:
        """Start a batch; see `TileLoss.begin`."""
        del base
        return _LogisticSums(own, offset, self.beta)


class _LogisticSums(Sums):
    def __init__(self, own: Tensor, offset: Tensor | None, beta: float) -> None:
        self.own, self.offset, self.beta = own, offset, beta
        self.total = torch.zeros_like(own)

    def visit(self, part: slice, block: Tensor, weight: Tensor | None) -> None:
        if self.offset is not None:
            block.sub_(self.offset[part, None])
        self.total[part] += row_sums(F.softplus(block, threshold=40.0), weight)  # 0 at -inf
        block.sigmoid_()

    def scale(self, part: slice) -> None:
        del part

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.beta * softplus(-self.own) + self.total, -self.beta * torch.sigmoid(-self.own)


class TiledPairwise(TileLoss):
    """Mean over negatives of -log sigmoid(s_y - l_i)."""

    def begin(self, own: Tensor, *, offset: Tensor | None, base: float | None) -> Sums:
        """Start a batch; see `TileLoss.begin`."""
        del base
        return _PairwiseSums(own, offset)


class _PairwiseSums(Sums):
    def __init__(self, own: Tensor, offset: Tensor | None) -> None:
        self.shift = own if offset is None else own + offset
        self.total, self.live, self.logits_grad = (torch.zeros_like(own) for _ in range(3))

    def visit(self, part: slice, block: Tensor, weight: Tensor | None) -> None:
        self.live[part] += row_sums((~torch.isneginf(block)).to(block.dtype), weight)
        block.sub_(self.shift[part, None])
        self.total[part] += row_sums(F.softplus(block, threshold=40.0), weight)
        self.logits_grad[part] += row_sums(block.sigmoid_(), weight)

    def scale(self, part: slice) -> Tensor:
        return self.live[part].clamp(min=1).reciprocal_()

    def finish(self) -> tuple[Tensor, Tensor]:
        number = self.live.clamp(min=1)
        return self.total / number, -self.logits_grad / number


def log2_unit(dtype: torch.dtype) -> float:
    """Return 1 / ln 2 in the given precision: the factor that turns e^x into 2^x.

    2^x costs the same for every x. The vectorized e^x takes half as long or less on moderate numbers, but each masked
    or underflowing number takes as long as about a hundred others.
    """
    return float(torch.tensor(1.0 / math.log(2.0), dtype=dtype))


def row_sums(block: Tensor, weight: Tensor | None) -> Tensor:
    """Compute sum_i w_i b_i of each row, [R, m] -> [R]."""
    return block.sum(1) if weight is None else torch.mv(block, weight)
