"""The dense layers of a tower: MLP and DNN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with GELU and dropout between them; no activation after the last one.

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
        """Apply the layers, [..., widths[0]] -> [..., widths[-1]]."""
        output: Tensor = self.layers(features)
        return output


class HiddenLayer(nn.Module):
    """One hidden layer: y = dropout(GELU(norm(W x + b))), plus x if `residual` is set and the widths are equal.

    Args:
        width: input width.
        following: output width.
        dropout: probability that an output unit is zeroed in training, before x is added.
        residual: add the input (He et al. 2016) if its width equals the output width.
        layer_norm: normalise before the activation (Ba et al. 2016).
    """

    def __init__(self, width: int, following: int, *, dropout: float, residual: bool, layer_norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, following)
        self.norm: nn.Module = nn.LayerNorm(following) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.skips = residual and width == following

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, [..., width] -> [..., following]."""
        y: Tensor = self.dropout(nn.functional.gelu(self.norm(self.linear(x))))
        return x + y if self.skips else y


class DNN(nn.Module):
    """Hidden layers and a linear projection: the tower of Yang et al. (2020), "Mixed Negative Sampling", section 3.1.

    Args:
        widths: input width, hidden widths, output width.
        dropout: as in `HiddenLayer`.
        residual: as in `HiddenLayer`.
        layer_norm: as in `HiddenLayer`.
    """

    def __init__(
        self, widths: Sequence[int], *, dropout: float = 0.0, residual: bool = False, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                HiddenLayer(width, following, dropout=dropout, residual=residual, layer_norm=layer_norm)
                for width, following in pairwise(widths[:-1])
            )
        )
        self.projection = nn.Linear(widths[-2], widths[-1])

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layers, [..., widths[0]] -> [..., widths[-1]]."""
        output: Tensor = self.projection(self.blocks(features))
        return output


def dense_layers(
    widths: Sequence[int], *, dropout: float, residual: bool = False, layer_norm: bool = False
) -> nn.Module:
    """Build an `MLP`, or a `DNN` if residuals or layer norm are requested."""
    if residual or layer_norm:
        return DNN(widths, dropout=dropout, residual=residual, layer_norm=layer_norm)
    return MLP(widths, dropout=dropout)


class EmbeddedRows:
    """Vectors that can be looked up like a table, for pooling a history whose items an item tower has embedded.

    Args:
        weight: the vectors, [rows, D].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, codes: Tensor) -> Tensor:
        """Look up vectors, int64 [...] -> [..., D]."""
        return torch.nn.functional.embedding(codes, self.weight)
