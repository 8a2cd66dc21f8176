"""A gated recurrent unit over sequences packed in groups of similar length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.data.loading.packing import token_counts
from twotower.towers.layers.dropout import Dropout


class Recurrent(nn.Module):
    """GRU layers (Cho et al. 2014; for sessions Hidasi et al. 2016, "GRU4Rec") and a final norm.

    Args:
        width: D, width of input, state and output.
        layers: number of stacked layers.
        dropout: dropout of the input and between layers.
    """

    def __init__(self, width: int, *, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """Encode tokens [P, D] -> [P, D]; `positions` is ignored, because recurrent layers read tokens in order."""
        del positions
        for layer in self.layers:
            parts = torch.split(self.dropout(x), token_counts(shapes))
            # Padding is on the right, after every token whose output is used.
            x = torch.cat([states(layer, part, shape) for part, shape in zip(parts, shapes, strict=True)])
        output: Tensor = self.norm(x)
        return output


def states(layer: nn.Module, part: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the states of a GRU after every token of a group, [sequences * longest, D] -> the same shape."""
    if not isinstance(layer, nn.GRU):
        raise TypeError(f"expected a GRU, found {type(layer).__name__}")
    tokens = part.reshape(*shape, -1)
    output = step_by_step(layer, tokens) if torch.compiler.is_exporting() else layer(tokens)[0]
    return output.reshape(part.shape)


def step_by_step(layer: nn.GRU, tokens: Tensor) -> Tensor:
    """Run `layer` token by token, for an export: an exported `nn.GRU` would have a fixed number of rows.

        r = sigmoid(W_r x + U_r h),  z = sigmoid(W_z x + U_z h),  n = tanh(W_n x + r * U_n h),  h <- (1 - z) n + z h

    Args:
        layer: one layer, batch first; each product above has a bias.
        tokens: vectors of the tokens, [rows, L, D].

    Returns:
        The state after each token, [rows, L, D].
    """
    # torch creates the GRU's weight attributes at run time, which a type checker cannot see.
    weights: dict[str, Tensor] = dict(layer.named_parameters())
    inputs = nn.functional.linear(tokens, weights["weight_ih_l0"], weights["bias_ih_l0"])
    state = torch.zeros_like(tokens[:, 0])
    outputs = []
    for place in range(tokens.shape[1]):
        reset, update, new = inputs[:, place].chunk(3, 1)
        by_reset, by_update, by_new = nn.functional.linear(state, weights["weight_hh_l0"], weights["bias_hh_l0"]).chunk(
            3, 1
        )
        z = torch.sigmoid(update + by_update)
        n = torch.tanh(new + torch.sigmoid(reset + by_reset) * by_new)
        state = (1 - z) * n + z * state
        outputs.append(state)
    return torch.stack(outputs, 1)
