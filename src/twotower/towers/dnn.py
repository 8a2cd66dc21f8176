"""Dense layers that join the parts of a tower."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with GELU and dropout between them; no activation at the end.

    Args:
        widths: input width, hidden widths, output width.
        dropout: probability that a hidden unit is zeroed in training.
    """

    def __init__(self, widths: Sequence[int], *, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, following in pairwise(widths[:-1]):
            layers += [nn.Linear(width, following), nn.GELU(), nn.Dropout(dropout)]
        layers.append(nn.Linear(widths[-2], widths[-1]))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[..., widths[0]] -> [..., widths[-1]]."""
        output: Tensor = self.layers(features)
        return output


class Block(nn.Module):
    """One hidden layer: y = dropout(GELU(norm(W x + b))), plus x where `residual` and the widths agree.

    Args:
        width: of the input.
        following: of the output.
        dropout: probability that a unit of the output is zeroed in training, before x is added.
        residual: add the input (He et al. 2016), where it is as wide as the output.
        layer_norm: normalise before the activation (Ba et al. 2016).
    """

    def __init__(self, width: int, following: int, *, dropout: float, residual: bool, layer_norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, following)
        self.norm: nn.Module = nn.LayerNorm(following) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.skips = residual and width == following

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., following]."""
        y: Tensor = self.dropout(nn.functional.gelu(self.norm(self.linear(x))))
        return x + y if self.skips else y


class DNN(nn.Module):
    """Blocks, then a linear projection: the tower of Yang et al. (2020), "Mixed Negative Sampling", section 3.1.

    Args:
        widths: input width, hidden widths, output width.
        dropout: of each block.
        residual: of each block.
        layer_norm: of each block.
    """

    def __init__(
        self, widths: Sequence[int], *, dropout: float = 0.0, residual: bool = False, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                Block(width, following, dropout=dropout, residual=residual, layer_norm=layer_norm)
                for width, following in pairwise(widths[:-1])
            )
        )
        self.projection = nn.Linear(widths[-2], widths[-1])

    def forward(self, features: Tensor) -> Tensor:
        """[..., widths[0]] -> [..., widths[-1]]."""
        output: Tensor = self.projection(self.blocks(features))
        return output


def dense_layers(
    widths: Sequence[int], *, dropout: float, residual: bool = False, layer_norm: bool = False
) -> nn.Module:
    """An `MLP`, or a `DNN` where residuals or layer norm are asked for."""
    if residual or layer_norm:
        return DNN(widths, dropout=dropout, residual=residual, layer_norm=layer_norm)
    return MLP(widths, dropout=dropout)


class Rows:
    """Vectors that are looked up like a table: what a history of items embedded by a whole tower is pooled from.

    Args:
        weight: [rows, D].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        return torch.nn.functional.embedding(codes, self.weight)
