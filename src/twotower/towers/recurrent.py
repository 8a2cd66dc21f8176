"""A gated recurrent unit over sequences that are packed in groups of similar length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.data.packing import token_counts
from twotower.towers.dropout import Dropout


class Recurrent(nn.Module):
    """GRU layers (Cho et al. 2014; for sessions Hidasi et al. 2016, "GRU4Rec") and a norm at the end.

    Args:
        width: D, of the input, of the state and of the output.
        layers: one on top of the other.
        dropout: of the input and between layers.
    """

    def __init__(self, width: int, *, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """Tokens [P, D] -> [P, D]; `positions` are not looked at: a recurrence knows the order."""
        del positions
        for layer in self.layers:
            parts = torch.split(self.dropout(x), token_counts(shapes))
            # Padding stands on the right, behind everything that is looked at.
            states = [
                layer(part.reshape(*shape, -1))[0].reshape(len(part), -1)
                for part, shape in zip(parts, shapes, strict=True)
            ]
            x = torch.cat(states)
        output: Tensor = self.norm(x)
        return output
