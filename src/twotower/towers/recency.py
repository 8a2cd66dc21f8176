"""Averages of what came before each token, weighted by distance: a pooled history at every position at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.data.packing import token_counts


class RecencyAverages(nn.Module):
    """For every token, averages of the tokens up to it, each head with a learned weight for every distance.

        average_h,i = sum_{j <= i} w_h(i - j) x_j / sum_{j <= i} w_h(i - j),   w_h(distance) = exp a_h(distance)

    What `PooledHistory` is for one position, for all positions of a sequence. The weights do not depend on the items:
    one matrix serves all sequences. Heads start with half-lives of 0.5, 2, 8, ... tokens, the last as an even mean.

    Args:
        length: longest sequence, in tokens.
        heads: how many averages.
    """

    def __init__(self, length: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        rates = torch.tensor([0.0 if head == heads - 1 else 2.0 * 0.25**head for head in range(heads)])
        self.log_weight = nn.Parameter(-rates[:, None] * torch.arange(length, dtype=torch.float32) * math.log(2))

    def forward(self, x: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """Tokens [P, D] of groups with the given (sequences, longest) -> [P, heads, D]."""
        width = x.shape[1]
        averages = []
        for part, (sequences, longest) in zip(torch.split(x, token_counts(shapes)), shapes, strict=True):
            weights = torch.softmax(by_distance(self.log_weight, longest), -1).to(x.dtype)
            # One product of [heads * longest, longest] with every sequence's tokens.
            found = weights.reshape(self.heads * longest, longest) @ part.view(sequences, longest, width)
            shaped = found.view(sequences, self.heads, longest, width).transpose(1, 2)
            averages.append(shaped.reshape(sequences * longest, self.heads, width))
        return torch.cat(averages)


def by_distance(values: Tensor, longest: int) -> Tensor:
    """[heads, L] -> [heads, longest, longest]: values[:, i - j] at (i, j) where j <= i, else -inf."""
    place = torch.arange(longest, device=values.device)
    distance = place[:, None] - place
    return values[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)
