"""What a tile of logits becomes in each loss: the rows' losses, and, in its own place, the gradient.

A form meets the logits of some rows block by block, each [R, m], masked places at -inf. It turns every block into
numbers g such that the gradient by a logit is `scale` of its row times g.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.losses.logistic import softplus


class Form(ABC):
    """A loss as tiles see it.

    Attributes:
        sums_exponentials: the loss knows the candidates only through sum_j exp l_j, so that their weights may be
            applied to the sum instead of the logits.
    """

    sums_exponentials: bool = False

    @abstractmethod
    def begin(self, own: Tensor, part: slice, *, offset: Tensor | None, base: float | None) -> Tile:
        """Start a tile.

        Args:
            own: the positives' logits, [R].
            part: which rows of the batch these are.
            offset: subtracted from every candidate's logit of a row, [R].
            base: where it is a number, blocks need no row maximum taken out and come with weights exp(base - log
                count); then -base is added to the log of the sum.
        """


class Tile(ABC):
    """Some rows on their way through a form.

    Attributes:
        is_final: a block is what it becomes as soon as it was visited, not only once all were.
    """

    is_final: bool = True

    @abstractmethod
    def visit(self, block: Tensor, weight: Tensor | None) -> None:
        """Take up one block of logits, [R, m], with its candidates' weights, [m]."""

    @abstractmethod
    def finish(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, gradient by the positive's logit, scale), [R] each, the last two times the rows' weights."""


@dataclass
class Softmax(Form):
    """-s_y + log( exp s_y + sum_i exp l_i ), or the published value of refined logQ, which has the same gradient.

    Attributes:
        log_left: log n' of each row, [B], for refined logQ; None for the softmax.
    """

    log_left: Tensor | None = None
    sums_exponentials = True

    def begin(self, own: Tensor, part: slice, *, offset: Tensor | None, base: float | None) -> Tile:
        """See `Form.begin`."""
        left = None if self.log_left is None else self.log_left[part].to(own.dtype)
        return _SoftmaxTile(own, offset, base, left)


class _SoftmaxTile(Tile):
    def __init__(self, own: Tensor, offset: Tensor | None, base: float | None, log_left: Tensor | None) -> None:
        self.own, self.offset, self.base, self.log_left = own, offset, base, log_left
        self.is_final = base is not None
        # Sums of sums over many blocks: R numbers, so double precision costs nothing.
        self.total = torch.zeros_like(own, dtype=torch.float64)
        self.largest = torch.full_like(own, -torch.inf)
        self.blocks: list[Tensor] = []

    def visit(self, block: Tensor, weight: Tensor | None) -> None:
        if self.base is None:
            self.largest = torch.maximum(self.largest, block.amax(1))
            self.blocks.append(block)
        else:
            block.exp_()
            self.total += block.sum(1) if weight is None else torch.mv(block, weight)

    def finish(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taken_out = self.largest.masked_fill(torch.isneginf(self.largest), 0.0)
        for block in self.blocks:
            self.total += block.sub_(taken_out[:, None]).exp_().sum(1)
        log_sum = self.total.log().to(self.own.dtype) + (taken_out if self.base is None else -self.base)
        if self.offset is not None:
            log_sum = log_sum - self.offset
        margin = log_sum - self.own
        wrong = torch.sigmoid(margin)  # 1 - P_hat(y)
        if self.log_left is None:
            loss = softplus(margin)
        else:
            loss = wrong * (margin + self.log_left).masked_fill(torch.isneginf(margin), 0.0)
        scale = torch.where(self.total > 0, wrong / self.total, 0.0).to(margin.dtype)
        return loss, -wrong * weights, scale * weights


@dataclass
class Logistic(Form):
    """-beta log sigmoid(s_y) - sum_i log sigmoid(-l_i).

    Attributes:
        beta: weight of the positive; see `gbce`.
    """

    beta: float = 1.0

    def begin(self, own: Tensor, part: slice, *, offset: Tensor | None, base: float | None) -> Tile:
        """See `Form.begin`."""
        del part, base
        return _LogisticTile(own, offset, self.beta)


class _LogisticTile(Tile):
    def __init__(self, own: Tensor, offset: Tensor | None, beta: float) -> None:
        self.own, self.offset, self.beta = own, offset, beta
        self.total = torch.zeros_like(own)

    def visit(self, block: Tensor, weight: Tensor | None) -> None:
        del weight
        if self.offset is not None:
            block.sub_(self.offset[:, None])
        self.total += softplus_sum(block)
        block.sigmoid_()

    def finish(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = self.beta * softplus(-self.own) + self.total
        return loss, -self.beta * torch.sigmoid(-self.own) * weights, weights


class Pairwise(Form):
    """Mean over negatives of -log sigmoid(s_y - l_i)."""

    def begin(self, own: Tensor, part: slice, *, offset: Tensor | None, base: float | None) -> Tile:
        """See `Form.begin`."""
        del part, base
        return _PairwiseTile(own, offset)


class _PairwiseTile(Tile):
    def __init__(self, own: Tensor, offset: Tensor | None) -> None:
        self.shift = own if offset is None else own + offset
        self.total, self.live, self.by_logits = (torch.zeros_like(own) for _ in range(3))

    def visit(self, block: Tensor, weight: Tensor | None) -> None:
        del weight
        self.live += (~torch.isneginf(block)).sum(1)
        block.sub_(self.shift[:, None])
        self.total += softplus_sum(block)
        self.by_logits += block.sigmoid_().sum(1)

    def finish(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = self.live.clamp(min=1)
        return self.total / number, -self.by_logits / number * weights, weights / number


def softplus_sum(block: Tensor) -> Tensor:
    """sum_i log(1 + e^l_i) of each row, [R, m] -> [R]; a logit of -inf adds nothing."""
    return torch.nn.functional.softplus(block, threshold=40.0).sum(1)
