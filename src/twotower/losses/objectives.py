"""Objectives: a pool of candidates and the loss that goes with it, chosen together so that they agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.losses.logistic import bpr, gbce, gbce_beta, logistic
from twotower.losses.softmax import candidate_logits, refined_logq, softmax_loss
from twotower.negatives import Candidates, InBatch, Pool
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
    ) -> Candidates:
        """The candidates of one batch, each distinct shared item once where the form allows; see `Pool.draw`."""
        return self.prepare(
            self.pool.draw(
                positives, known_positives=known_positives, queries=queries, group=group, generator=generator
            )
        )

    def prepare(self, drawn: Candidates) -> Candidates:
        """What `draw` does to the candidates of the pool: scale log kappa, merge copies."""
        if self.strength < 1.0:
            row_count = drawn.row_log_expected_count
            drawn = replace(
                drawn,
                log_expected_count=_scale(drawn.log_expected_count, self.strength),
                row_log_expected_count=None if row_count is None else _scale(row_count, self.strength),
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


class SampledSoftmax(Objective):
    """s_j minus what the pool's correction says of j; the positive as it is. See `sampled_softmax`.

    With the default correction of a pool, the expected count, this is the library's own estimate of the full softmax.
    """

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        return softmax_loss(*corrected_logits(embedded, drawn, temperature))


class PositiveCorrectedSoftmax(Objective):
    """The positive is corrected like a candidate: s_y - log p_y. The common industry form, and a biased one."""

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        # Dividing numerator and denominator by 1/p_y leaves the positive alone and adds log p_y to every candidate.
        offset = -_scale(drawn.positive_log_count, self.strength)
        return softmax_loss(*corrected_logits(embedded, drawn, temperature, offset))


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

    def _refined(self, embedded: Embedded, drawn: Candidates, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        if drawn.row_items is not None:
            raise InputError("objective.sources: refined-logq is defined on candidates shared by the batch")
        log_left, log_rest = refined_parts(drawn)
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


class Binary(Objective):
    """What the binary objectives share: logits with one learned bias, b, added to all of them.

    A binary form asks for probabilities of single items, most of them tiny, and scores of unit vectors cannot all be
    far below zero. The bias is the missing constant (log of the odds; for NCE the log partition). It is the same for
    every item, so it changes no ranking and needs no place in an index.

    Args:
        pool: where the candidates come from.
        initial_bias: where b starts. Left at 0 it would have a long way to go, and until it arrives the only way to
            say "unlikely" is to push every score down, the popular items' most: -log K for K uncorrected negatives
            (the odds of a positive), -log N for the corrected forms (probabilities that sum to one).
        strength: scales log kappa.
    """

    merges_copies = False

    def __init__(self, pool: Pool, *, initial_bias: float = 0.0, strength: float = 1.0) -> None:
        super().__init__(pool, strength=strength)
        self.bias = nn.Parameter(torch.tensor(initial_bias))

    def _biased(self, embedded: Embedded, drawn: Candidates, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        positive, negatives = corrected_logits(embedded, drawn, temperature)
        return positive + self.bias, negatives + self.bias


class Logistic(Binary):
    """Binary cross-entropy over the candidates, summed. See `logistic`.

    Args:
        pool: where the candidates come from.
        corrected: subtract log kappa from every logit, the positive's too (NCE, sampled logistic).
        keep_accidental: a drawn copy of the row's own positive is noise like any other (NCE), not masked.
        initial_bias: where the bias starts; see `Binary`.
        strength: scales log kappa.

    Raises:
        InputError: accidental hits are to be kept in a pool with in-batch candidates, where a row's own positive
            stands without having been drawn.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        corrected: bool = False,
        keep_accidental: bool = False,
        initial_bias: float = 0.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__(pool, initial_bias=initial_bias, strength=strength)
        self.corrected = corrected
        self.keep_accidental = keep_accidental
        if keep_accidental and any(isinstance(member, InBatch) for member in pool.members()):
            raise InputError("objective.sources: nce needs noise that is drawn; use uniform or frequency, not in_batch")

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        if self.keep_accidental:
            drawn = _keep_accidental(drawn)
        positive, negatives = self._biased(embedded, drawn, temperature)
        if self.corrected:
            positive = positive - _scale(drawn.positive_log_count, self.strength).to(positive.dtype)
        return logistic(positive, negatives)


class GeneralisedBCE(Binary):
    """gBCE of gSASRec. See `gbce`.

    Args:
        pool: K uniform negatives for each row.
        size: K.
        num_items: N.
        calibration: t.
        initial_bias: where the bias starts; see `Binary`.
    """

    def __init__(
        self, pool: Pool, *, size: int, num_items: int, calibration: float = 0.75, initial_bias: float = 0.0
    ) -> None:
        super().__init__(pool, initial_bias=initial_bias)
        self.beta = gbce_beta(size, num_items, calibration)

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        return gbce(*self._biased(embedded, drawn, temperature), beta=self.beta)


class BPR(Objective):
    """Bayesian personalised ranking. See `bpr`."""

    merges_copies = False

    def forward(self, embedded: Embedded, drawn: Candidates, *, temperature: Tensor | float) -> Tensor:
        """[B]; see `Objective.forward`."""
        return bpr(*corrected_logits(embedded, drawn, temperature))


def refined_parts(drawn: Candidates) -> tuple[Tensor, Tensor]:
    """Log n' and log(1 - q_y) of each row, float32 [B]; n' the candidates left after masking, copies counted."""
    left = ((~drawn.hits) * drawn.multiplicity).sum(1).clamp(min=1)
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


def _keep_accidental(drawn: Candidates) -> Candidates:
    """The same candidates, where drawn copies of a row's own positive are no hits."""
    own = drawn.items == drawn.positives[:, None]
    kept = replace(drawn, hits=drawn.hits & ~(own & (drawn.multiplicity > 0)))
    if drawn.row_items is None or drawn.row_hits is None:
        return kept
    return replace(kept, row_hits=drawn.row_hits & (drawn.row_items != drawn.positives[:, None]))


def _scale(log_count: Tensor, strength: float) -> Tensor:
    # An empty place stays empty at any strength, and a count of zero is no correction at strength 0: 0 * inf is
    # neither.
    scaled = log_count * strength if strength else torch.zeros_like(log_count)
    return torch.where(torch.isposinf(log_count), log_count, scaled)
