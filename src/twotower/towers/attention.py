"""Causal transformer blocks over sequences that are packed in groups of similar length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.data.packing import token_counts
from twotower.towers.dropout import Dropout

Shapes = tuple[tuple[int, int], ...]


class CausalAttention(nn.Module):
    """Multi-head attention of every token to itself and the tokens before it in its sequence (Vaswani et al. 2017).

        y_i = W_o concat_h sum_{j <= i} softmax_j( <q_i, k_j> / sqrt(d) + a_h(i - j) ) v_j

    The optional a_h(distance) is learned, and starts as -distance ln 2 / half-life_h, one half-life for each head: how
    much recency matters is the data's to say (relative biases: Raffel et al. 2020; linear start: Press et al. 2022).

    Args:
        width: D.
        heads: divides D.
        length: longest sequence, in tokens.
        recency: whether there is an a_h.
    """

    def __init__(self, width: int, heads: int, *, length: int, recency: bool) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.bias: nn.Parameter | None = None
        if recency:
            # Half-lives 1, 4, 16, ... tokens; the last of several heads starts even.
            rates = [0.0 if head == heads - 1 and heads > 1 else math.log(2) * 0.25**head for head in range(heads)]
            self.bias = nn.Parameter(-torch.tensor(rates)[:, None] * torch.arange(length, dtype=torch.float32))

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """[P, D] of groups with the given (sequences, longest) -> [P, D]."""
        width = x.shape[1]
        attended = []
        parts = torch.split(self.projection(x), token_counts(shapes))
        for part, (sequences, longest) in zip(parts, shapes, strict=True):
            # [3, sequences, heads, longest, width of a head]
            shaped = part.view(sequences, longest, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            query, key, value = shaped.unbind(0)
            if self.bias is None:
                found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            else:
                found = attend(query, key, value, causal_bias(self.bias, longest))
            attended.append(found.transpose(1, 2).reshape(sequences * longest, width))
        output: Tensor = self.output(torch.cat(attended))
        return output


def causal_bias(bias: Tensor, longest: int) -> Tensor:
    """[heads, L] by distance -> [heads, longest, longest] by (i, j): bias[:, i - j] where j <= i, else -inf."""
    place = torch.arange(longest, device=bias.device)
    distance = place[:, None] - place
    return bias[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention with a bias [heads, i, j] that is trained; [S, heads, longest, d] each."""
    if query.device.type == "cpu":
        # The fused kernel gives no gradient to a bias, and what torch then does takes twice as long as this.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return torch.softmax(scores + bias.to(scores.dtype), -1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))


class Classic(nn.Module):
    """Two layers with a GELU between them: W_2 dropout(GELU(W_1 x)).

    Args:
        width: D.
        hidden: units between the layers.
        dropout: of the hidden units.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        output: Tensor = self.outer(self.dropout(F.gelu(self.inner(x))))
        return output


class Gated(nn.Module):
    """SwiGLU (Shazeer 2020): W_2 dropout(SiLU(W_1 x) * W_3 x).

    Args:
        width: D.
        hidden: units between the layers.
        dropout: of the hidden units.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        gate, value = self.inner(x).chunk(2, -1)
        output: Tensor = self.outer(self.dropout(F.silu(gate) * value))
        return output


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and around a skip connection ("pre-norm").

        x <- x + dropout(attention(norm(x))),   x <- x + dropout(feedforward(norm(x)))

    The classic block has LayerNorm and GELU, the gated one RMSNorm and SwiGLU.

    Args:
        width: D.
        heads: of the attention.
        length: longest sequence, in tokens.
        hidden: units of the feed-forward layer.
        dropout: of what the two add, and of the hidden units.
        gated: which of the two blocks.
        recency: whether the attention has a bias by distance.
    """

    def __init__(
        self, width: int, heads: int, *, length: int, hidden: int, dropout: float, gated: bool, recency: bool
    ) -> None:
        super().__init__()
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.attention_norm, self.feedforward_norm = norm(width), norm(width)
        self.attention = CausalAttention(width, heads, length=length, recency=recency)
        self.feedforward: Gated | Classic = (Gated if gated else Classic)(width, hidden, dropout)
        self.dropout = Dropout(dropout)

    def start_small(self, blocks: int) -> None:
        """What all blocks add to a token starts equally large for any number of them (Radford et al. 2019)."""
        for layer in (self.attention.output, self.feedforward.outer):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * blocks))

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """[P, D] -> [P, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), shapes))
        y: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return y


class Transformer(nn.Module):
    """Blocks one after the other over tokens with a learned vector for each place, and a norm at the end.

    Args:
        width: D.
        length: longest sequence, in tokens.
        blocks: how many.
        heads: of each.
        hidden: units of each feed-forward layer.
        dropout: of the input, and in the blocks.
        gated: which kind of block.
        recency: whether attention has a bias by distance.
    """

    def __init__(
        self,
        width: int,
        length: int,
        *,
        blocks: int,
        heads: int,
        hidden: int,
        dropout: float,
        gated: bool = False,
        recency: bool = False,
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, length=length, hidden=hidden, dropout=dropout, gated=gated, recency=recency)
            for _ in range(blocks)
        )
        self.norm = (nn.RMSNorm if gated else nn.LayerNorm)(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            if isinstance(block, Block):
                block.start_small(blocks)

    def forward(self, x: Tensor, positions: Tensor, shapes: Shapes) -> Tensor:
        """Tokens [P, D] and their places int64 [P] -> [P, D]."""
        x = self.dropout(x + self.positions.index_select(0, positions))
        for block in self.blocks:
            x = block(x, shapes)
        output: Tensor = self.norm(x)
        return output
