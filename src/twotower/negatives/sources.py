"""Where candidates come from. Each source draws items and knows its own expected count for every item.

The three numbers of a source, for item j (THEORY: "One estimator: the expected count"):

    expected count   E[number of times j stands among this source's candidates of a row]
    absence          P(j does not stand among them) = 1 - inclusion probability
    always           j stands among them in every draw, so it must be masked from every random source

`Pool` (candidates.py) adds expected counts, or multiplies absences, and applies the masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.negatives.frequency import Frequency
from twotower.negatives.proposals import Proposal


@dataclass(frozen=True)
class Request:
    """What a pool asks its sources for.

    Attributes:
        positives: item of each row, int64 [B].
        group: the group that the batch was built in, int64 scalar tensor, or None for batches that are random draws.
        generator: the random generator of the draw, or None for torch's default.
    """

    positives: Tensor
    group: Tensor | None = None
    generator: torch.Generator | None = None


class Source(nn.Module, ABC):
    """A way for candidates to get into a batch.

    Attributes:
        unique: duplicates within the source are removed, so that the expected count is an inclusion probability.
        always: the source is deterministic: its items stand in every draw and are masked from the random sources.
    """

    unique: bool
    always: bool = False

    @abstractmethod
    def draw(self, request: Request) -> Tensor:
        """The candidates before duplicates are removed, int64 [m], shared by all rows of the batch."""

    @abstractmethod
    def expected_draws(self, items: Tensor, request: Request) -> Tensor:
        """Expected occurrences of each item before duplicates are removed, in log, float64, shape of `items`."""

    @abstractmethod
    def log_absence(self, items: Tensor, request: Request) -> Tensor:
        """log of the probability that an item does not occur at all, float64, shape of `items`."""

    def log_expected_count(self, items: Tensor, request: Request) -> Tensor:
        """log kappa_j of this source alone: an expected number, or a probability where the source is unique."""
        if self.unique:
            return log_complement(self.log_absence(items, request))
        return self.expected_draws(items, request)


def log_complement(log_probability: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact at both ends; -inf at x = 0."""
    # Mächler (2012): expm1 keeps the digits where exp(x) is near 1, log1p where it is near 0.
    near_one = log_probability > -0.6931471805599453
    return torch.where(
        near_one,
        torch.log(-torch.expm1(log_probability)),
        torch.log1p(-torch.exp(log_probability)),
    )


def log_absence_after(draws: int, log_prob: Tensor) -> Tensor:
    """log (1 - q)^n = n log1p(-q): no hit in n independent draws, float64."""
    # q = 1 gives -inf, and 0 draws of a sure thing give 0 * -inf: nothing was drawn, so the item is absent.
    if draws == 0:
        return torch.zeros_like(log_prob)
    return draws * torch.log1p(-torch.exp(log_prob))


class InBatch(Source):
    """The other rows' positives: B-1 draws from the item frequency, which cost nothing extra to embed.

    kappa_j = (B-1) p_j; without duplicates 1 - (1-p_j)^(B-1). B-1, not B: the row's own positive is not a draw.

    Args:
        frequency: how often each item is a positive; with grouped batches, the frequency within the group.
        unique: remove duplicates within the batch.
    """

    def __init__(self, frequency: Frequency, *, unique: bool = False) -> None:
        super().__init__()
        self.frequency = frequency
        self.unique = unique

    def draw(self, request: Request) -> Tensor:
        """The positives of the batch, [B]; each row's own is masked as a hit, so B-1 remain for it."""
        return request.positives

    def expected_draws(self, items: Tensor, request: Request) -> Tensor:
        """log((B-1) p_j)."""
        others = torch.tensor(len(request.positives) - 1, dtype=torch.float64, device=items.device)
        return others.log() + self.frequency.log_prob(items, request.group)

    def log_absence(self, items: Tensor, request: Request) -> Tensor:
        """(B-1) log(1 - p_j)."""
        return log_absence_after(len(request.positives) - 1, self.frequency.log_prob(items, request.group))


class Sampled(Source):
    """Independent draws from a proposal, shared by all rows of the batch: kappa_j = n q_j, or 1 - (1-q_j)^n if unique.

    Args:
        proposal: the distribution drawn from.
        size: n, how many draws.
        unique: remove duplicates among the draws. The count of *tries* stays n, so the inclusion probability is exact.

    Raises:
        InputError: size is negative.
    """

    def __init__(self, proposal: Proposal, size: int, *, unique: bool = False) -> None:
        super().__init__()
        if size < 0:
            raise InputError(f"size: expected a number of draws >= 0, found {size}")
        self.proposal = proposal
        self.size = size
        self.unique = unique

    def draw(self, request: Request) -> Tensor:
        """`size` draws from the proposal."""
        return self.proposal.sample((self.size,), request.generator)

    def expected_draws(self, items: Tensor, request: Request) -> Tensor:
        """log(n q_j)."""
        del request
        size = torch.tensor(self.size, dtype=torch.float64, device=items.device)
        return size.log() + self.proposal.log_prob(items)

    def log_absence(self, items: Tensor, request: Request) -> Tensor:
        """n log(1 - q_j)."""
        del request
        return log_absence_after(self.size, self.proposal.log_prob(items))
