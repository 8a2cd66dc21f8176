"""Binary objectives: the positive and each negative are classified independently; losses/binary.py has the losses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.losses.binary import bpr, gbce, gbce_beta, logistic
from twotower.losses.tiled.autograd import tiled_loss
from twotower.losses.tiled.forms import TiledLogistic, TiledPairwise
from twotower.losses.tiled.inputs import LossInputs
from twotower.negatives import Candidates, InBatch, Pool
from twotower.objectives.base import Objective, corrected_logits, loss_inputs, scale_log_count
from twotower.objectives.embeddings import Embedded


class Binary(Objective):
    """Base class of the binary objectives, with one learned bias b added to all logits, or none.

    A binary loss models probabilities of single items, most of them tiny, but scores of unit vectors cannot all be far
    below zero. The bias is the missing constant (log odds; for NCE the log partition). It is the same for every item,
    so it does not change the ranking and is not needed in an index.

    Args:
        pool: the pool that candidates are drawn from.
        initial_bias: initial value of b: -log K for K uncorrected negatives (the odds of a positive), -log N for the
            corrected losses (probabilities that sum to one). From 0, b would need many steps to reach these values, and
            until then the loss would push all scores down, most of all the scores of popular items. None: no bias, as
            in word2vec, whose dot products are not bounded.
        strength: scales log kappa.
    """

    sums_exponentials = False

    bias: nn.Parameter | None

    def __init__(self, pool: Pool, *, initial_bias: float | None = 0.0, strength: float = 1.0) -> None:
        super().__init__(pool, strength=strength)
        self.bias = None if initial_bias is None else nn.Parameter(torch.tensor(initial_bias))

    def _biased(self, embedded: Embedded, drawn: Candidates, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        positive, negatives = corrected_logits(embedded, drawn, temperature)
        return (positive, negatives) if self.bias is None else (positive + self.bias, negatives + self.bias)


class Logistic(Binary):
    """Summed binary cross-entropy over the candidates. See `logistic`.

    Args:
        pool: the pool that candidates are drawn from.
        corrected: subtract log kappa from every logit, including the positive's (NCE, sampled logistic).
        keep_accidental: treat a drawn copy of the row's own positive as noise like any other (NCE) instead of masking
            it.
        initial_bias: initial value of the bias; see `Binary`.
        strength: scales log kappa.

    Raises:
        InputError: `keep_accidental` is set with in-batch candidates, which contain a row's own positive although it
            was not drawn.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        corrected: bool = False,
        keep_accidental: bool = False,
        initial_bias: float | None = 0.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__(pool, initial_bias=initial_bias, strength=strength)
        self.corrected = corrected
        self.keep_accidental = keep_accidental
        if keep_accidental and any(isinstance(member, InBatch) for member in pool.members()):
            raise InputError("objective.sources: nce needs sampled noise; use uniform or frequency, not in_batch")

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        if self.keep_accidental:
            drawn = _keep_accidental(drawn)
        positive, negatives = self._biased(embedded, drawn, temperature)
        if self.corrected:
            positive = positive - scale_log_count(drawn.positive_log_count, self.strength).to(positive.dtype)
        return logistic(positive, negatives, multiplicity=_multiplicity(drawn))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        if self.keep_accidental:
            drawn = _keep_accidental(drawn)
        own_offset = scale_log_count(drawn.positive_log_count, self.strength) if self.corrected else None
        inputs = _inputs(embedded, drawn, temperature, weights, bias=self.bias, own_offset=own_offset)
        return tiled_loss(TiledLogistic(), inputs)


class GeneralisedBCE(Binary):
    """gBCE of gSASRec. See `gbce`.

    Args:
        pool: K uniform negatives per row.
        size: number of negatives per row, K.
        num_items: number of items, N.
        calibration: t, from 0 (plain binary cross-entropy) to 1 (fully calibrated).
        initial_bias: initial value of the bias; see `Binary`.
    """

    def __init__(
        self, pool: Pool, *, size: int, num_items: int, calibration: float = 0.75, initial_bias: float | None = 0.0
    ) -> None:
        super().__init__(pool, initial_bias=initial_bias)
        self.beta = gbce_beta(size, num_items, calibration)

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        logits = self._biased(embedded, drawn, temperature)
        return gbce(*logits, beta=self.beta, multiplicity=_multiplicity(drawn))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        return tiled_loss(TiledLogistic(self.beta), _inputs(embedded, drawn, temperature, weights, bias=self.bias))


class BPR(Objective):
    """Bayesian personalised ranking. See `bpr`."""

    sums_exponentials = False

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        return bpr(*corrected_logits(embedded, drawn, temperature), multiplicity=_multiplicity(drawn))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        return tiled_loss(TiledPairwise(), _inputs(embedded, drawn, temperature, weights))


def _inputs(
    embedded: Embedded, drawn: Candidates, temperature: Tensor | float, weights: Tensor | None, **others: Tensor | None
) -> LossInputs:
    return loss_inputs(embedded, drawn, temperature, weights, multiplicity=drawn.multiplicity, **others)


def _multiplicity(drawn: Candidates) -> Tensor:
    """Return how many draws each shared and then each per-row candidate represents, int64 [M + R]."""
    per_row = 0 if drawn.row_items is None else drawn.row_items.shape[1]
    return torch.cat([drawn.multiplicity, drawn.multiplicity.new_ones(per_row)])


def _keep_accidental(drawn: Candidates) -> Candidates:
    """Unmask the drawn copies of each row's own positive."""
    kept = replace(drawn, negative_mask=drawn.negative_mask.without(drawn.positives, drawn.items))
    if drawn.row_items is None or drawn.row_mask is None:
        return kept
    return replace(kept, row_mask=drawn.row_mask & (drawn.row_items != drawn.positives[:, None]))
