"""Objectives: a pool of candidates and the loss that goes with it, chosen together so that they agree."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from twotower.losses.softmax import sampled_softmax
from twotower.negatives import Candidates, Pool


class Objective(nn.Module, ABC):
    """What is minimised. Holds a pool and hyperparameters; never a model.

    Attributes:
        pool: where the candidates come from.
    """

    pool: Pool

    def draw(
        self, positives: Tensor, *, group: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Candidates:
        """The candidates of one batch, each distinct item once; positives int64 [B]."""
        return self.pool.draw(positives, group=group, generator=generator).collapse()

    @abstractmethod
    def forward(
        self, query: Tensor, positive: Tensor, candidates: Tensor, drawn: Candidates, *, temperature: Tensor | float
    ) -> Tensor:
        """One loss for each row.

        Args:
            query: query embeddings, [B, D].
            positive: embeddings of the positives, [B, D].
            candidates: embeddings of `drawn.items`, [M, D].
            drawn: what `draw` returned for these positives.
            temperature: divides every score.

        Returns:
            [B].
        """


class ExpectedCount(Objective):
    """The estimate of the full softmax that the library stands on: s_j - log kappa_j, positive uncorrected.

    See `sampled_softmax` for the formula and THEORY.md section 2 for why. The default; use it unless a comparison on
    your data says otherwise.

    Args:
        pool: any pool.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def forward(
        self, query: Tensor, positive: Tensor, candidates: Tensor, drawn: Candidates, *, temperature: Tensor | float
    ) -> Tensor:
        """[B]; see `Objective.forward`."""
        return sampled_softmax(
            query, positive, candidates, drawn.log_expected_count, hits=drawn.hits, temperature=temperature
        )
