"""Recency-weighted averages over the tokens so far: a pooled history at every position of a sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.data.loading.packing import token_counts


class RecencyAverages(nn.Module):
    """Averages over each token and the tokens before it; every head has a learned weight for each distance.

        average_h,i = sum_{j <= i} w_h(i - j) x_j / sum_{j <= i} w_h(i - j),   w_h(distance) = exp a_h(distance)

    This is the average of `PooledHistory`, for all positions of a sequence instead of one. The weights do not depend on
    the items, so one matrix serves all sequences. Heads start with half-lives of 0.5, 2, 8, ... tokens, the last head
    as a uniform mean.

    Args:
        length: maximum sequence length, in tokens.
        heads: number of averages.
    """

    def __init__(self, length: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        rates = torch.tensor([0.0 if head == heads - 1 else 2.0 * 0.25**head for head in range(heads)])
        self.log_weight = nn.Parameter(-rates[:, None] * torch.arange(length, dtype=torch.float32) * math.log(2))

    def forward(self, x: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """Average tokens [P, D] within groups of the given (sequences, longest) -> [P, heads, D]."""
        width = x.shape[1]
        averages = []
        for part, (sequences, longest) in zip(torch.split(x, token_counts(shapes)), shapes, strict=True):
            weights = torch.softmax(by_distance(self.log_weight, longest), -1).to(x.dtype)
            # One product of [heads * longest, longest] with every sequence's tokens.
            sums = weights.reshape(self.heads * longest, longest) @ part.view(sequences, longest, width)
            shaped = sums.view(sequences, self.heads, longest, width).transpose(1, 2)
            averages.append(shaped.reshape(sequences * longest, self.heads, width))
        return torch.cat(averages)


def by_distance(values: Tensor, longest: int) -> Tensor:
    """Expand [heads, L] to [heads, longest, longest]: values[:, i - j] at (i, j) where j <= i, else -inf."""
    place = torch.arange(longest, device=values.device)
    distance = place[:, None] - place
    return values[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)
