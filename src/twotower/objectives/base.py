"""The base class of objectives (a pool of candidates with a loss that fits it), and the softmax objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.losses.softmax import candidate_logits, refined_logq, softmax_loss
from twotower.losses.tiled.autograd import tiled_loss
from twotower.losses.tiled.forms import TiledSoftmax
from twotower.losses.tiled.inputs import LossInputs
from twotower.negatives import Candidates, Catalog, DrawRequest, Pool
from twotower.objectives.embeddings import Embedded
from twotower.objectives.feedback import Feedback


class Objective(nn.Module, ABC):
    """The function that training minimises; it has a pool and hyperparameters, never a model.

    Args:
        pool: the pool that candidates are drawn from.
        strength: scales log kappa, from 0 (no correction) to 1 (full correction): a dial between head and tail.

    Raises:
        InputError: strength is not in [0, 1].
    """

    #: Whether the loss sums exponentials, so that copies of an item can be merged into their summed weight. Other
    #: losses merge copies too, but weight them by their `multiplicity`.
    sums_exponentials: bool = True
    #: Number of rows that share one draw of candidates; None for all rows of a batch.
    rows_per_draw: int | None = None

    def __init__(self, pool: Pool, *, strength: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= strength <= 1.0:
            raise InputError(f"objective.strength: expected a number in [0, 1], found {strength}")
        self.pool = pool
        self.strength = strength
        #: The loss term of the items that were shown with a row and passed over; set by `build_objective`.
        self.feedback: Feedback | None = None

    def draw(self, request: DrawRequest | Tensor, **options: Any) -> Candidates:
        """Draw the candidates of one batch and merge copies; arguments and errors as in `Pool.draw`.

        Raises:
            InputError: see `Pool.draw`; also if the objective learns from feedback and the request has none.
        """
        request = DrawRequest.of(request, **options)
        drawn = self.prepare(self.pool.draw(request))
        if self.feedback is None:
            return drawn
        return self.feedback.add_slates(drawn, request, self.pool.rule_of_rows(request))

    def prepare(self, drawn: Candidates) -> Candidates:
        """Scale log kappa and merge copies; `draw` applies this to the candidates of the pool."""
        if self.strength < 1.0:
            row_count = drawn.row_log_expected_count
            drawn = replace(
                drawn,
                log_expected_count=scale_log_count(drawn.log_expected_count, self.strength),
                row_log_expected_count=None if row_count is None else scale_log_count(row_count, self.strength),
            )
        if self.pool.unique or not self.pool.random_sources():  # no copies left to merge
            return drawn
        return drawn.collapse(sum_weights=self.sums_exponentials)

    @abstractmethod
    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Compute one loss per row.

        Args:
            embedded: the embeddings of the batch.
            drawn: the candidates that `draw` returned for the positives of the batch.
            temperature: divides every score.

        Returns:
            The losses, [B].
        """

    @abstractmethod
    def mean(
        self,
        embedded: Embedded,
        drawn: Candidates,
        *,
        temperature: Tensor | float,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the training loss sum_b w_b loss_b tile by tile, in bounded memory; its reference is `forward`.

        Args:
            embedded: the embeddings of the batch.
            drawn: the candidates that `draw` returned for the positives of the batch.
            temperature: divides every score.
            weights: w of each row, [B], constants; None for the mean, 1/B each.

        Returns:
            A scalar.
        """


class SampledSoftmax(Objective):
    """Softmax over s_j minus the pool's correction; the positive is not corrected. See `sampled_softmax`.

    With the default correction of a pool, the expected count, this is the library's estimate of the full softmax. With
    the whole catalog as its only source it is the full softmax, evaluated as in `tiled_full_softmax`.
    """

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        loss = softmax_loss(*corrected_logits(embedded, drawn, temperature))
        if self.feedback is None or drawn.slate is None:
            return loss
        return loss + self.feedback.loss(embedded, drawn.slate, temperature)

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        of_slates: Tensor | None = None
        if self.feedback is not None and drawn.slate is not None:
            losses = self.feedback.loss(embedded, drawn.slate, temperature)
            of_slates = losses.mean() if weights is None else (losses * weights.to(losses.dtype)).sum()
            drawn = drawn.without_slate()
            rows = embedded.row_candidates
            kept = None if rows is None or drawn.row_items is None else rows[:, : drawn.row_items.shape[1]]
            embedded = replace(embedded, row_candidates=kept)
        inputs = loss_inputs(embedded, drawn, temperature, weights)
        if all(isinstance(member, Catalog) for member in self.pool.members()):
            # Each item is one candidate, at the position of its code, which also receives the positives' gradient.
            inputs = replace(inputs, positive=None, log_expected_count=None, positive_places=drawn.positives)
        loss = tiled_loss(TiledSoftmax(), inputs)
        return loss if of_slates is None else loss + of_slates


class PositiveCorrectedSoftmax(Objective):
    """Softmax with the positive corrected like a candidate, s_y - log p_y: common in industry, and biased."""

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        return softmax_loss(*corrected_logits(embedded, drawn, temperature, self._offset(drawn)))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        inputs = loss_inputs(embedded, drawn, temperature, weights, row_offset=self._offset(drawn))
        return tiled_loss(TiledSoftmax(), inputs)

    def _offset(self, drawn: Candidates) -> Tensor:
        # Multiplying numerator and denominator by p_y leaves the positive as is and adds log p_y to every candidate.
        return -scale_log_count(drawn.positive_log_count, self.strength)


class RefinedLogQ(Objective):
    """The refined logQ loss in its published form; `row_weight` returns the weight 1 - P_hat(y). See `refined_logq`.

    If known positives K(x) are masked too, n' counts the remaining candidates, and 1 - q_y becomes 1 - q(K(x) and y):
    the probability that a draw is not masked for the row.

    `strength` scales all of log kappa_j = log(n' q_j / (1 - q_y)), so 0 gives the gradient of the uncorrected softmax.

    Args:
        pool: in-batch candidates, duplicates kept.
        strength: scales log kappa.

    Raises:
        InputError: the pool has several sources, per-row or always-included candidates, or removes duplicates; the loss
            is defined for n' draws from one q.
    """

    def __init__(self, pool: Pool, *, strength: float = 1.0) -> None:
        super().__init__(pool, strength=strength)
        if any(member.deterministic for member in pool.members()):
            raise InputError(
                "objective.sources: refined-logq is defined on drawn candidates only; head, observed, mined and "
                "catalog are always included; remove them, or use expected-count"
            )
        if any(member.per_row for member in pool.members()):
            raise InputError(
                "objective.sources: refined-logq is defined on candidates shared by the batch; "
                "remove per_row, or use expected-count"
            )
        if len(pool.members()) > 1:
            raise InputError(
                "objective.sources: refined-logq is defined on the draws of one source, but there are "
                f"{len(pool.members())}; use in_batch alone, or expected-count"
            )
        if pool.unique or pool.random_sources()[0].unique:
            raise InputError(
                "objective.unique: refined-logq counts every copy of a candidate, but duplicates are removed; set "
                "unique to false, or use expected-count"
            )
        pool.counts_unmasked = True

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        return self._refined(embedded, drawn, temperature)[0]

    def row_weight(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Compute 1 - P_hat(y) of each row, [B]: the model's estimated probability of being wrong."""
        return self._refined(embedded, drawn, temperature)[1]

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        log_left, row_offset = self._parts(drawn)
        inputs = loss_inputs(embedded, drawn, temperature, weights, row_offset=row_offset)
        return tiled_loss(TiledSoftmax(log_left), inputs)

    def _parts(self, drawn: Candidates) -> tuple[Tensor, Tensor]:
        """Return log n' and the row offset log n' - log(1 - q_y) of `refined_logq`, scaled by the strength, [B]."""
        log_left, log_rest = refined_parts(drawn)
        return self.strength * log_left, self.strength * (log_left - log_rest)

    def _refined(self, embedded: Embedded, drawn: Candidates, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        log_left, row_offset = self._parts(drawn)
        return refined_logq(
            embedded.query,
            embedded.positive,
            embedded.candidates,
            drawn.log_expected_count,
            mask=drawn.mask,
            log_left=log_left,
            row_offset=row_offset,
            temperature=temperature,
        )


def refined_parts(drawn: Candidates) -> tuple[Tensor, Tensor]:
    """Compute log n' and log(1 - q(masked)) of each row, float32 [B]; n' counts the unmasked candidates and copies."""
    if drawn.log_unmasked is None:
        raise InputError("drawn: these candidates are from a different pool; draw them with the refined-logq objective")
    left = (drawn.multiplicity.sum() - drawn.negative_mask.count(drawn.multiplicity)).clamp(min=1)
    return left.double().log().float(), drawn.log_unmasked


def corrected_logits(
    embedded: Embedded, drawn: Candidates, temperature: Tensor | float, row_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the corrected logits of a batch, (positive [B], candidates [B, M + R]); see `candidate_logits`."""
    return candidate_logits(
        embedded.query,
        embedded.positive,
        embedded.candidates,
        drawn.log_expected_count,
        mask=drawn.mask,
        row_candidates=embedded.row_candidates,
        row_log_expected_count=drawn.row_log_expected_count,
        row_mask=drawn.row_mask,
        temperature=temperature,
        row_offset=row_offset,
    )


def loss_inputs(
    embedded: Embedded, drawn: Candidates, temperature: Tensor | float, weights: Tensor | None, **others: Any
) -> LossInputs:
    """Combine the inputs common to all tiled losses and `others`, the additional inputs of this loss by name."""
    return LossInputs(
        embedded.query,
        embedded.positive,
        embedded.candidates,
        drawn.log_expected_count,
        drawn.negative_mask,
        embedded.row_candidates,
        drawn.row_log_expected_count,
        drawn.row_mask,
        temperature,
        weights,
        repeated_queries=embedded.repeated_queries,
        **others,
    )


def scale_log_count(log_count: Tensor, strength: float) -> Tensor:
    """Multiply log kappa by the strength; an empty slot stays empty."""
    # A plain product would be NaN for 0 * inf: an empty slot must stay empty at any strength, and a count of zero must
    # give no correction at strength 0.
    scaled = log_count * strength if strength else torch.zeros_like(log_count)
    return torch.where(torch.isposinf(log_count), log_count, scaled)
