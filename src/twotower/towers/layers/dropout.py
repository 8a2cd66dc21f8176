"""Dropout with cheap random numbers on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Probabilities are multiples of 1 / 256: one random byte per number.
LEVELS = 256


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): y = x m / (1 - p), m = 0 with probability p and 1 otherwise.

    On a CPU torch draws one float per number sequentially, which takes longer than the matrix products of a small
    transformer. Here one draw of 64 bits serves eight numbers. On a CPU p is therefore rounded to a multiple of 1/256,
    at most 255/256, and the scale uses the rounded p.

    Args:
        p: probability that a number is zeroed in training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.threshold = threshold_of(p)

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout in training mode; any shape -> the same shape."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * keep(x.shape, self.threshold).to(x.dtype).mul_(LEVELS / (LEVELS - self.threshold))


def threshold_of(p: float) -> int:
    """Convert p < 1 to 256ths, for `keep`; at most 255, so that something is kept."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep(shape: torch.Size, threshold: int) -> Tensor:
    """Draw a boolean mask on the CPU, False with probability threshold / 256, from torch's global generator."""
    numbers = shape.numel()
    words = torch.empty(-(-numbers // 8), dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.uint8)[:numbers] >= threshold).view(shape)
