"""Sources of candidates. Each source draws items and knows its own expected count for every item.

The numbers of a source, for item j (docs/theory.md, "One estimator: the expected count"):

    expected count   E[number of times j is among this source's candidates of a row]
    absence          P(j is not among them) = 1 - inclusion probability

A source is either *random* or *always*: an always source includes its items in every draw with kappa = 1, and they
are masked from every random source of the row. Its candidates are shared by the batch, [m], or *per row*, [B, R].

`Pool` (pool.py) adds expected counts, or multiplies absences, and applies the masks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.data.packing import Windows
from twotower.errors import InputError
from twotower.negatives.frequency import Frequency, Group
from twotower.negatives.proposals import Proposal


@dataclass(frozen=True)
class Request:
    """The batch that a pool passes to its sources for a draw.

    Attributes:
        positives: item of each row, int64 [B].
        queries: query of each row, int64 [B], for sources that look items up by query.
        group: the group that the batch was built in, or None for batches that are random draws.
        generator: the random generator of the draw, or None for torch's default.
        windows: how the batch was drawn, if its rows are positions of whole sequences; None for a draw of rows.
    """

    positives: Tensor
    queries: Tensor | None = None
    group: Group | None = None
    generator: torch.Generator | None = None
    windows: Windows | None = None


class Source(nn.Module, ABC):
    """A source of candidates.

    Attributes:
        unique: duplicates within the source are removed, so that the expected count is an inclusion probability.
        always: the source is deterministic: its items are in every draw and are masked from the random sources.
        per_row: candidates belong to single rows, [B, R] with -1 for an empty slot, not to the whole batch, [m].
    """

    unique: bool = False
    always: bool = False
    per_row: bool = False

    @abstractmethod
    def draw(self, request: Request) -> Tensor:
        """Draw the candidates, duplicates included, int64 [m]; [B, R] if the source is per row."""


class RandomSource(Source):
    """A source of independent draws, with the expected count of every item of the catalog."""

    @abstractmethod
    def draws(self, request: Request) -> int:
        """Return the number of independent draws per row."""

    @abstractmethod
    def log_prob(self, items: Tensor, request: Request) -> Tensor:
        """Return the log probability that one draw is the item, float64, the shape of `items`."""

    def log_absence(self, items: Tensor, request: Request) -> Tensor:
        """Return log (1 - q_j)^n: no draw is item j, float64, the shape of `items`."""
        return log_absence_after(self.draws(request), self.log_prob(items, request))

    def log_expected_count(self, items: Tensor, request: Request) -> Tensor:
        """Return log kappa_j of this source alone: log(n q_j), or log(1 - (1-q_j)^n) if the source is unique."""
        if self.unique:
            return log_complement(self.log_absence(items, request))
        draws = self.draws(request)
        return (math.log(draws) if draws else -math.inf) + self.log_prob(items, request)


def log_complement(log_probability: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0, accurate at both ends; -inf at x = 0."""
    # Mächler (2012): expm1 is accurate where exp(x) is near 1, log1p where it is near 0.
    near_one = log_probability > -math.log(2.0)
    return torch.where(
        near_one,
        torch.log(-torch.expm1(log_probability)),
        torch.log1p(-torch.exp(log_probability)),
    )


def log_absence_after(draws: int, log_prob: Tensor) -> Tensor:
    """Compute log (1 - q)^n = n log1p(-q): the item is in none of n independent draws, float64."""
    # With q = 1 and no draws the formula would be 0 * -inf; nothing is drawn, so the item is absent: log 1.
    if draws == 0:
        return torch.zeros_like(log_prob)
    return draws * torch.log1p(-torch.exp(log_prob))


class InBatch(RandomSource):
    """The other rows' positives: B-1 draws from the item frequency, which are embedded anyway.

    kappa_j = (B-1) p_j; without duplicates 1 - (1-p_j)^(B-1). B-1, not B: the row's own positive is not a draw.

    In a batch of S of W whole sequences, with c_j = R p_j of all R rows, the rows of a row's own sequence are in the
    batch with certainty and are not draws; the others are S-1 of the W-1 other sequences, drawn without replacement:

        kappa_j = c_j (S-1) / (W-1);   without duplicates 1 - prod_{k < S-1} (1 - c_j / (W-1-k))

    This is exact for every item that the row's query never interacts with; the second formula also assumes that no
    sequence contains an item twice. Items that the query does interact with are masked (`Pool.draw` requires them):
    their count among the other sequences would be smaller. See docs/sequences.md.

    Args:
        frequency: how often each item is a positive; for grouped batches, the frequency within the group.
        unique: remove duplicates within the batch.
    """

    def __init__(self, frequency: Frequency, *, unique: bool = False) -> None:
        super().__init__()
        self.frequency = frequency
        self.unique = unique

    def draw(self, request: Request) -> Tensor:
        """Return the positives of the batch, [B]; each row's own is masked as a hit, which leaves B-1 per row."""
        if request.windows is not None and request.windows.drawn < 2:
            return request.positives[:0]  # no other sequence in the batch
        return request.positives

    def draws(self, request: Request) -> int:
        """Return B-1."""
        return len(request.positives) - 1

    def log_prob(self, items: Tensor, request: Request) -> Tensor:
        """Return log p_j, within the group of the batch."""
        return self.frequency.log_prob(items, request.group)

    def log_absence(self, items: Tensor, request: Request) -> Tensor:
        """Return the log probability that no other row, or no other sequence, has the item."""
        if request.windows is None:
            return super().log_absence(items, request)
        others, drawn = request.windows.total - 1, request.windows.drawn - 1
        holding = torch.exp(self.log_prob(items, request)) * request.windows.rows
        left = others - torch.arange(drawn, dtype=torch.float64, device=items.device)
        # If all sequences left contain the item, it cannot be missed: probability 1 at most.
        return torch.log1p(-(holding[..., None] / left).clamp(max=1.0)).sum(-1)

    def log_expected_count(self, items: Tensor, request: Request) -> Tensor:
        """Return log kappa_j over the other rows, or over the rows of the other sequences."""
        if request.windows is None or self.unique:
            return super().log_expected_count(items, request)
        others, drawn = request.windows.total - 1, request.windows.drawn - 1
        share = math.log(drawn / others) if drawn else -math.inf
        return share + math.log(request.windows.rows) + self.log_prob(items, request)


class Sampled(RandomSource):
    """Independent draws from a proposal: kappa_j = n q_j, or 1 - (1-q_j)^n if unique.

    Args:
        proposal: the distribution drawn from.
        size: n, the number of draws.
        unique: remove duplicates among the draws. The number of *tries* is still n, so the inclusion probability is
            exact.
        per_row: draw n candidates per row instead of n for the whole batch.

    Raises:
        InputError: size is negative.
    """

    def __init__(self, proposal: Proposal, size: int, *, unique: bool = False, per_row: bool = False) -> None:
        super().__init__()
        if size < 0:
            raise InputError(f"size: expected a number of draws >= 0, found {size}")
        self.proposal = proposal
        self.size = size
        self.unique = unique
        self.per_row = per_row

    def draw(self, request: Request) -> Tensor:
        """Draw `size` items from the proposal, [size] or [B, size]."""
        shape = (len(request.positives), self.size) if self.per_row else (self.size,)
        return self.proposal.sample(shape, request.generator)

    def draws(self, request: Request) -> int:
        """Return n."""
        del request
        return self.size

    def log_prob(self, items: Tensor, request: Request) -> Tensor:
        """Return log q_j."""
        del request
        return self.proposal.log_prob(items)
