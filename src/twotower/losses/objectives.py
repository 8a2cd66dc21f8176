"""Objectives: a pool of candidates and the loss that goes with it, chosen together so that they agree.

Here the softmax objectives; the binary ones are in binary.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.data.packing import Windows
from twotower.errors import InputError
from twotower.losses.softmax import candidate_logits, refined_logq, softmax_loss
from twotower.losses.tiled import tiled_softmax
from twotower.negatives import Candidates, Pool
from twotower.negatives.frequency import Group


@dataclass(frozen=True)
class Embedded:
    """The embeddings of one batch.

    Attributes:
        query: [B, D].
        positive: [B, D].
        candidates: of `drawn.items`, [M, D].
        row_candidates: of `drawn.row_items`, [B, R, D], or None.
    """

    query: Tensor
    positive: Tensor
    candidates: Tensor
    row_candidates: Tensor | None = None


class Objective(nn.Module, ABC):
    """What is minimised. Holds a pool and hyperparameters; never a model.

    Args:
        pool: where the candidates come from.
        strength: scales log kappa, from 0 (no correction) to 1 (all of it): a dial between head and tail.

    Raises:
        InputError: strength is not in [0, 1].
    """

    #: Copies of an item may be merged with their summed weight: true of sums of exponentials, not of binary forms.
    merges_copies: bool = True
    #: Rows that share one draw of candidates; None: all rows of a batch.
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
        """The candidates of one batch, each distinct shared item once where the form allows; see `Pool.draw`."""
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
        """What `draw` does to the candidates of the pool: scale log kappa, merge copies."""
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
        """One loss for each row.

        Args:
            embedded: the embeddings of the batch.
            drawn: what `draw` returned for its positives.
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
        """What training minimises: sum_b w_b loss_b of `forward`, tile by tile in bounded memory (see tiled.py).

        Args:
            embedded: the embeddings of the batch.
            drawn: what `draw` returned for its positives.
            temperature: divides every score.
            weights: w of each row, [B], constants; None for the mean, 1/B each.

        Returns:
            A scalar.
        """


class SampledSoftmax(Objective):
    """s_j minus what the pool's correction says of j; the positive as it is. See `sampled_softmax`.

    With the default correction of a pool, the expected count, this is the library's own estimate of the full softmax.
    """

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        return softmax_loss(*corrected_logits(embedded, drawn, temperature))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """A scalar; see `Objective.mean`."""
        return tiled_softmax(**tiled_arguments(embedded, drawn), temperature=temperature, weights=weights)


class PositiveCorrectedSoftmax(Objective):
    """The positive is corrected like a candidate: s_y - log p_y. The common industry form, and a biased one."""

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        return softmax_loss(*corrected_logits(embedded, drawn, temperature, self._offset(drawn)))

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """A scalar; see `Objective.mean`."""
        return tiled_softmax(
            **tiled_arguments(embedded, drawn),
            temperature=temperature,
            row_offset=self._offset(drawn),
            weights=weights,
        )

    def _offset(self, drawn: Candidates) -> Tensor:
        # Dividing numerator and denominator by 1/p_y leaves the positive alone and adds log p_y to every candidate.
        return -scale_log_count(drawn.positive_log_count, self.strength)


class RefinedLogQ(Objective):
    """The refined logQ loss in its published form; `row_weight` tells its weight 1 - P_hat(y). See `refined_logq`.

    `strength` scales all of log kappa_j = log(n' q_j / (1 - q_y)), so that 0 is the uncorrected softmax's gradient.

    Args:
        pool: in-batch candidates.
        strength: scales log kappa.

    Raises:
        InputError: a source of the pool is always included: the form knows drawn candidates alone.
    """

    def __init__(self, pool: Pool, *, strength: float = 1.0) -> None:
        super().__init__(pool, strength=strength)
        if any(member.always for member in pool.members()):
            raise InputError(
                "objective.sources: refined-logq is defined on drawn candidates; head, observed, mined and catalog are "
                "always included; use expected-count"
            )

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        return self._refined(embedded, drawn, temperature)[0]

    def row_weight(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """1 - P_hat(y) of each row, [B]: the model's own chance of being wrong."""
        return self._refined(embedded, drawn, temperature)[1]

    def mean(
        self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float, weights: Tensor | None = None
    ) -> Tensor:
        """A scalar; see `Objective.mean`."""
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
            raise InputError("objective.sources: refined-logq is defined on candidates shared by the batch")
        return refined_parts(drawn)

    def _refined(self, embedded: Embedded, drawn: Candidates, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        log_left, log_rest = self._parts(drawn)
        return refined_logq(
            embedded.query,
            embedded.positive,
            embedded.candidates,
            drawn.log_expected_count,
            hits=drawn.hits,
            log_left=self.strength * log_left,
            row_offset=self.strength * (log_left - log_rest),
            temperature=temperature,
        )


def refined_parts(drawn: Candidates) -> tuple[Tensor, Tensor]:
    """Log n' and log(1 - q_y) of each row, float32 [B]; n' the candidates left after masking, copies counted."""
    left = (drawn.multiplicity.sum() - drawn.masks.count(drawn.multiplicity)).clamp(min=1)
    q = drawn.positive_log_count.double().exp().clamp(max=1.0)
    # A catalog of one item has q_y = 1; there are no candidates then, and any finite offset serves.
    rest = torch.log1p(-q.clamp(max=1.0 - 1e-15))
    return left.double().log().float(), rest.float()


def corrected_logits(
    embedded: Embedded, drawn: Candidates, temperature: Tensor | float, row_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The corrected logits of a batch, (positive [B], candidates [B, M + R]); see `candidate_logits`."""
    return candidate_logits(
        embedded.query,
        embedded.positive,
        embedded.candidates,
        drawn.log_expected_count,
        hits=drawn.hits,
        row_candidates=embedded.row_candidates,
        row_log_expected_count=drawn.row_log_expected_count,
        row_hits=drawn.row_hits,
        temperature=temperature,
        row_offset=row_offset,
    )


def tiled_arguments(embedded: Embedded, drawn: Candidates) -> dict[str, Any]:
    """What every tiled loss takes of a batch."""
    return {
        "query": embedded.query,
        "positive": embedded.positive,
        "candidates": embedded.candidates,
        "log_expected_count": drawn.log_expected_count,
        "hits": drawn.masks,
        "row_candidates": embedded.row_candidates,
        "row_log_expected_count": drawn.row_log_expected_count,
        "row_hits": drawn.row_hits,
    }


def scale_log_count(log_count: Tensor, strength: float) -> Tensor:
    """Strength times log kappa; an empty place stays empty."""
    # An empty place stays empty at any strength, and a count of zero is no correction at strength 0: 0 * inf is
    # neither.
    scaled = log_count * strength if strength else torch.zeros_like(log_count)
    return torch.where(torch.isposinf(log_count), log_count, scaled)
