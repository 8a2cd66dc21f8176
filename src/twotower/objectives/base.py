"""Objectives: a pool of candidates together with the loss that fits it.

This file has the softmax objectives; the binary ones are in binary.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.data.loading.packing import Windows
from twotower.errors import InputError
from twotower.losses.softmax import candidate_logits, refined_logq, softmax_loss
from twotower.losses.tiled.api import tiled_softmax
from twotower.negatives import Candidates, Pool
from twotower.negatives.frequency import Group


@dataclass(frozen=True)
class Embedded:
    """The embeddings of one batch.

    Attributes:
        query: [B, D].
        positive: [B, D].
        candidates: embeddings of `drawn.items`, [M, D].
        row_candidates: embeddings of `drawn.row_items`, [B, R, D], or None.
    """

    query: Tensor
    positive: Tensor
    candidates: Tensor
    row_candidates: Tensor | None = None


class Objective(nn.Module, ABC):
    """The function that training minimises: a pool and hyperparameters, never a model.

    Args:
        pool: where the candidates come from.
        strength: scales log kappa, from 0 (no correction) to 1 (full correction): a dial between head and tail.

    Raises:
        InputError: strength is not in [0, 1].
    """

    #: Copies of an item may be merged with their summed weight: valid for sums of exponentials, not for binary losses.
    merges_copies: bool = True
    #: Number of rows that share one draw of candidates; None for all rows of a batch.
    rows_per_draw: int | None = None

    def __init__(self, pool: Pool, *, strength: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= strength <= 1.0:
            raise InputError(f"objective.strength: expected a number in [0, 1], found {strength}")
        self.pool = pool
        self.strength = strength

    def draw(
        self,
        positives: Tensor,
        *,
        known_positives: Tensor | tuple[Tensor, Tensor] | None = None,
        queries: Tensor | None = None,
        group: Group | None = None,
        generator: torch.Generator | None = None,
        rows: slice | None = None,
        windows: Windows | None = None,
    ) -> Candidates:
        """Draw the candidates of one batch and merge copies where the loss allows it; see `Pool.draw`."""
        return self.prepare(
            self.pool.draw(
                positives,
                known_positives=known_positives,
                queries=queries,
                group=group,
                generator=generator,
                rows=rows,
                windows=windows,
            )
        )

    def prepare(self, drawn: Candidates) -> Candidates:
        """Scale log kappa and merge copies; `draw` applies this to the candidates of the pool."""
        if self.strength < 1.0:
            row_count = drawn.row_log_expected_count
            drawn = replace(
                drawn,
                log_expected_count=scale_log_count(drawn.log_expected_count, self.strength),
                row_log_expected_count=None if row_count is None else scale_log_count(row_count, self.strength),
            )
        # A unique pool has no copies left to merge.
        return drawn.collapse() if self.merges_copies and not self.pool.unique else drawn

    @abstractmethod
    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Compute one loss per row.

        Args:
            embedded: the embeddings of the batch.
            drawn: the candidates that `draw` returned for its positives.
            temperature: divides every score.

        Returns:
            [B].
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
        """Compute the training loss sum_b w_b loss_b of `forward`, tile by tile in bounded memory (see tiled.py).

        Args:
            embedded: the embeddings of the batch.
            drawn: the candidates that `draw` returned for its positives.
            temperature: divides every score.
            weights: w of each row, [B], constants; None for the mean, 1/B each.

        Returns:
            A scalar.
        """


class SampledSoftmax(Objective):
    """Softmax over s_j minus the pool's correction; the positive is not corrected. See `sampled_softmax`.

    With the default correction of a pool, the expected count, this is the library's estimate of the full softmax.
    """

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        return softmax_loss(*corrected_logits(embedded, drawn, temperature))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        return tiled_softmax(**tiled_arguments(embedded, drawn), temperature=temperature, weights=weights)


class PositiveCorrectedSoftmax(Objective):
    """Softmax with the positive corrected like a candidate, s_y - log p_y: common in industry, and biased."""

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """Return one loss per row, [B]; see `Objective.forward`."""
        return softmax_loss(*corrected_logits(embedded, drawn, temperature, self._offset(drawn)))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the rows' losses, a scalar; see `Objective.mean`."""
        return tiled_softmax(
            **tiled_arguments(embedded, drawn),
            temperature=temperature,
            row_offset=self._offset(drawn),
            weights=weights,
        )

    def _offset(self, drawn: Candidates) -> Tensor:
        # Dividing numerator and denominator by 1/p_y leaves the positive as is and adds log p_y to every candidate.
        return -scale_log_count(drawn.positive_log_count, self.strength)


class RefinedLogQ(Objective):
    """The refined logQ loss in its published form; `row_weight` returns the weight 1 - P_hat(y). See `refined_logq`.

    `strength` scales all of log kappa_j = log(n' q_j / (1 - q_y)), so that 0 gives the uncorrected softmax's gradient.

    Args:
        pool: in-batch candidates.
        strength: scales log kappa.

    Raises:
        InputError: a source of the pool is always included; the loss is defined on drawn candidates only.
    """

    def __init__(self, pool: Pool, *, strength: float = 1.0) -> None:
        super().__init__(pool, strength=strength)
        if any(member.deterministic for member in pool.members()):
            raise InputError(
                "objective.sources: refined-logq is defined on drawn candidates only; head, observed, mined and "
                "catalog are always included; remove them, or use expected-count"
            )

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
        log_left, log_rest = self._parts(drawn)
        return tiled_softmax(
            **tiled_arguments(embedded, drawn),
            temperature=temperature,
            row_offset=self.strength * (log_left - log_rest),
            log_left=self.strength * log_left,
            weights=weights,
        )

    def _parts(self, drawn: Candidates) -> tuple[Tensor, Tensor]:
        if drawn.row_items is not None:
            raise InputError(
                "objective.sources: refined-logq is defined on candidates shared by the batch; "
                "remove the sources with per_row candidates"
            )
        return refined_parts(drawn)

    def _refined(self, embedded: Embedded, drawn: Candidates, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        log_left, log_rest = self._parts(drawn)
        return refined_logq(
            embedded.query,
            embedded.positive,
            embedded.candidates,
            drawn.log_expected_count,
            mask=drawn.mask,
            log_left=self.strength * log_left,
            row_offset=self.strength * (log_left - log_rest),
            temperature=temperature,
        )


def refined_parts(drawn: Candidates) -> tuple[Tensor, Tensor]:
    """Compute log n' and log(1 - q_y) of each row, float32 [B]; n' counts the unmasked candidates, copies included."""
    left = (drawn.multiplicity.sum() - drawn.negative_mask.count(drawn.multiplicity)).clamp(min=1)
    q = drawn.positive_log_count.double().exp().clamp(max=1.0)
    # A catalog of one item has q_y = 1; it leaves no candidates, so any finite offset works.
    rest = torch.log1p(-q.clamp(max=1.0 - 1e-15))
    return left.double().log().float(), rest.float()


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


def tiled_arguments(embedded: Embedded, drawn: Candidates) -> dict[str, Any]:
    """Collect the arguments that all tiled losses share."""
    return {
        "query": embedded.query,
        "positive": embedded.positive,
        "candidates": embedded.candidates,
        "log_expected_count": drawn.log_expected_count,
        "mask": drawn.negative_mask,
        "row_candidates": embedded.row_candidates,
        "row_log_expected_count": drawn.row_log_expected_count,
        "row_mask": drawn.row_mask,
    }


def scale_log_count(log_count: Tensor, strength: float) -> Tensor:
    """Multiply log kappa by the strength; an empty slot stays empty."""
    # A plain product would be NaN for 0 * inf: an empty slot must stay empty at any strength, and a count of zero must
    # give no correction at strength 0.
    scaled = log_count * strength if strength else torch.zeros_like(log_count)
    return torch.where(torch.isposinf(log_count), log_count, scaled)
