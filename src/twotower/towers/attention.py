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

        y_i = W_o concat_h sum_{j <= i} softmax_j( <q_i, k_j> / sqrt(d) ) v_j

    Args:
        width: D.
        heads: divides D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """[P, D] of groups with the given (sequences, longest) -> [P, D]."""
        width = x.shape[1]
        attended = []
        parts = torch.split(self.projection(x), token_counts(shapes))
        for part, (sequences, longest) in zip(parts, shapes, strict=True):
            # [3, sequences, heads, longest, width of a head]
            shaped = part.view(sequences, longest, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            query, key, value = shaped.unbind(0)
            found = attend(query, key, value)
            attended.append(found.transpose(1, 2).reshape(sequences * longest, width))
        output: Tensor = self.output(torch.cat(attended))
        return output


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, [sequences, heads, longest, width of a head] each."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # In bfloat16 torch's fused kernel takes about twice as long on a CPU as two products and a softmax.
        longest = query.shape[2]
        later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu_(1)
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
        return torch.softmax(scores.masked_fill_(later, -torch.inf), -1) @ value
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class FeedForward(nn.Module):
    """Two layers with an activation between them: W_2 dropout(h).

        h = GELU(W_1 x), or where `gated` h = SiLU(W_1 x) * W_3 x (SwiGLU, Shazeer 2020)

    Args:
        width: D.
        hidden: units between the layers.
        dropout: of the hidden units.
        gated: which of the two; W_1 and W_3 are then the halves of `inner`.
    """

    def __init__(self, width: int, hidden: int, dropout: float, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.inner = nn.Linear(width, 2 * hidden if gated else hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        h = self.inner(x)
        if self.gated:
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h)
        output: Tensor = self.outer(self.dropout(h))
        return output


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and around a skip connection ("pre-norm").

        x <- x + dropout(attention(norm(x))),   x <- x + dropout(feedforward(norm(x)))

    The classic block has LayerNorm and GELU, the gated one RMSNorm and SwiGLU.

    Args:
        width: D.
        heads: of the attention.
        hidden: units of the feed-forward layer.
        dropout: of what the two add, and of the hidden units.
        gated: which of the two blocks.
    """

    def __init__(self, width: int, heads: int, *, hidden: int, dropout: float, gated: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.attention_norm, self.feedforward_norm = norm(width), norm(width)
        self.attention = CausalAttention(width, heads)
        self.feedforward = FeedForward(width, hidden, dropout, gated=gated)
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
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden=hidden, dropout=dropout, gated=gated) for _ in range(blocks)
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
