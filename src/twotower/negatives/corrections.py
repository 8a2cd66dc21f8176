"""The corrections subtracted from candidate logits. `ExpectedCounts` is unbiased; the others exist for comparison.

A correction maps candidates to log kappa, or to the value that a published method uses instead. All have the signature
`log_count(pool, items, source, request)` and return float64 in the shape of `items`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.negatives.frequency import Frequency
from twotower.negatives.sources import DrawRequest, InBatch, RandomSource, Source, log_absence_after, log_complement


class Sources(Protocol):
    """The part of a pool that a correction uses."""

    unique: bool

    def members(self) -> list[Source]:
        """Return all sources, in order."""
        ...

    def random_sources(self) -> list[RandomSource]:
        """Return the random sources, in order."""
        ...

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log kappa_j pooled over all random sources."""
        ...


class Correction(ABC):
    """A rule for the log count that is subtracted from a candidate's logit."""

    @abstractmethod
    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Compute the values to subtract from the logits of random candidates.

        Args:
            pool: the pool that the candidates were drawn from.
            items: codes of the candidates, int64, any shape.
            source: index in the pool of the source that drew each candidate, same shape; -1 if copies were merged.
            request: the batch.

        Returns:
            float64, the shape of `items`.
        """


class ExpectedCounts(Correction):
    """log kappa_j, pooled over all random sources: the estimate is unbiased (docs/theory.md, section 2)."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return the log of the summed counts; for a unique pool, of one minus the product of absence probabilities."""
        del source
        return pool.log_expected_count(items, request)


class NoCorrection(Correction):
    """No correction, 0: popular items are drawn more often and therefore penalised more."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return zeros."""
        del pool, source, request
        return torch.zeros(items.shape, dtype=torch.float64, device=items.device)


class Probability(Correction):
    """log p_j, the frequency without the number of draws: the negatives' sum is B-1 times too large."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return log p_j of the in-batch source."""
        del source
        return in_batch_source(pool).log_prob(items, request)


class BatchProbability(Correction):
    """log(1 - (1-p_j)^B): the probability of being in the batch, applied to every copy although duplicates are kept."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return the log inclusion probability in B draws."""
        del source
        log_prob = in_batch_source(pool).log_prob(items, request)
        return log_complement(log_absence_after(len(request.positives), log_prob))


class ImportanceToUniform(Correction):
    """log(Q_j / P_j) with P uniform over the catalog and Q the frequency: log p_j + log N.

    This is importance sampling from Q with weights P/Q. The expected sum over the negatives is (B-1)/N times the sum
    over the catalog.
    """

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return log p_j + log N."""
        del source
        in_batch = in_batch_source(pool)
        return in_batch.log_prob(items, request) + math.log(in_batch.frequency.num_items)


class ImportanceToFrequency(nn.Module, Correction):
    """log(P_j / Q_j) with P uniform over the catalog and Q the frequency: -log N - log p_j.

    This is importance sampling from P with weights Q/P. The expected sum over K negatives is K E_Q[exp s], as in an
    uncorrected batch. An item with p_j = 0 has weight 0 at every strength of the correction.

    Args:
        frequency: the item frequency, Q.

    Raises:
        InputError: the frequency is a streaming estimate, which needs in-batch candidates.
    """

    def __init__(self, frequency: Frequency) -> None:
        super().__init__()
        if not frequency.is_exact:
            raise InputError(
                "objective.frequency: uniform-importance weights candidates by a counted frequency; set it to counted, "
                "or grouped"
            )
        self.frequency = frequency

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return -log N - log p_j, +inf for items without training rows."""
        del pool, source
        return -math.log(self.frequency.num_items) - self.frequency.log_prob(items, request.group)


class MixtureProbability(Correction):
    """log Q*_j, the mixture of all sources weighted by their draws (B for in-batch): a probability, not a count."""

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return log sum_s n_s q_j^s - log sum_s n_s."""
        del source
        parts, total = [torch.full(items.shape, -torch.inf, dtype=torch.float64, device=items.device)], 0
        for member in pool.random_sources():
            draws = _draws_as_published(member, request)
            if draws:
                total += draws
                parts.append(math.log(draws) + member.log_prob(items, request))
        return torch.logsumexp(torch.stack(parts), 0) - math.log(max(total, 1))


class BySourceProbability(Correction):
    """log q_j of the source that drew the candidate: p_j for in-batch, 1/N for uniform.

    Args:
        of_all_draws: instead of the probability of one draw, use the probability that any of the source's n draws is
            the item: log(1 - (1 - q_j)^n), with n = B for in-batch.
    """

    def __init__(self, *, of_all_draws: bool = False) -> None:
        self.of_all_draws = of_all_draws

    def log_count(self, pool: Sources, items: Tensor, source: Tensor, request: DrawRequest) -> Tensor:
        """Return log q_j^s, or log(1 - (1 - q_j^s)^n_s).

        Raises:
            InputError: the pool is unique: copies from different sources are merged, so candidates have no source.
        """
        if pool.unique:
            raise InputError(
                "objective.unique: a correction by source needs the source of every candidate, but copies from several "
                "sources are merged when duplicates are removed; set unique to false, or choose expected-count"
            )
        count = torch.zeros(items.shape, dtype=torch.float64, device=items.device)
        for place, member in enumerate(pool.members()):
            if isinstance(member, RandomSource):
                log_prob = member.log_prob(items, request)
                if self.of_all_draws:
                    log_prob = log_complement(log_absence_after(_draws_as_published(member, request), log_prob))
                count = torch.where(source == place, log_prob, count)
        return count


def in_batch_source(pool: Sources) -> InBatch:
    """Return the pool's in-batch source.

    Raises:
        InputError: the pool has no in-batch source.
    """
    for member in pool.members():
        if isinstance(member, InBatch):
            return member
    raise InputError("sources: this objective is defined on in-batch candidates; add in_batch to its sources")


def _draws_as_published(member: RandomSource, request: DrawRequest) -> int:
    return len(request.positives) if isinstance(member, InBatch) else member.draws(request)
