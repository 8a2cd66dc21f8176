"""Causal transformer blocks over sequences packed in groups of similar length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.data.loading.packing import token_counts
from twotower.towers.layers.dropout import Dropout

Shapes = tuple[tuple[int, int], ...]


class CausalAttention(nn.Module):
    """Multi-head attention from every token to itself and the earlier tokens of its sequence (Vaswani et al. 2017).

        y_i = W_o concat_h sum_{j <= i} softmax_j( <q_i, k_j> / sqrt(d) ) v_j

    Args:
        width: width of the tokens, D.
        heads: number of heads; must divide D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Attend within each group; tokens [P, D], groups given as (sequences, longest) -> [P, D]."""
        width = x.shape[1]
        attended = []
        parts = torch.split(self.projection(x), token_counts(shapes))
        for part, (sequences, longest) in zip(parts, shapes, strict=True):
            # [3, sequences, heads, longest, width per head]
            shaped = part.view(sequences, longest, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            query, key, value = shaped.unbind(0)
            heads = attend(query, key, value)
            attended.append(heads.transpose(1, 2).reshape(sequences * longest, width))
        output: Tensor = self.output(torch.cat(attended))
        return output


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal attention; all tensors are [sequences, heads, longest, width per head]."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # On a CPU torch's fused bfloat16 kernel takes about twice as long as two products and a softmax.
        longest = query.shape[2]
        later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu_(1)
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
        return torch.softmax(scores.masked_fill_(later, -torch.inf), -1) @ value
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class FeedForward(nn.Module):
    """Two layers with an activation between them: W_2 dropout(h).

        h = GELU(W_1 x), or if `gated`, h = SiLU(W_1 x) * W_3 x (SwiGLU, Shazeer 2020)

    Args:
        width: width of the tokens, D.
        hidden: number of hidden units.
        dropout: dropout of the hidden units.
        gated: use SwiGLU; W_1 and W_3 are then the halves of `inner`.
    """

    def __init__(self, width: int, hidden: int, dropout: float, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.inner = nn.Linear(width, 2 * hidden if gated else hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers, [P, D] -> [P, D]."""
        h = self.inner(x)
        if self.gated:
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h)
        output: Tensor = self.outer(self.dropout(h))
        return output


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each with a preceding norm and a skip connection ("pre-norm").

        x <- x + dropout(attention(norm(x))),   x <- x + dropout(feedforward(norm(x)))

    The classic block uses LayerNorm and GELU, the gated block RMSNorm and SwiGLU.

    Args:
        width: width of the tokens, D.
        heads: attention heads.
        hidden: units of the feed-forward layer.
        dropout: dropout of both outputs and of the hidden units.
        gated: use the gated block.
    """

    def __init__(self, width: int, heads: int, *, hidden: int, dropout: float, gated: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.attention_norm, self.feedforward_norm = norm(width), norm(width)
        self.attention = CausalAttention(width, heads)
        self.feedforward = FeedForward(width, hidden, dropout, gated=gated)
        self.dropout = Dropout(dropout)

    def start_small(self, blocks: int) -> None:
        """Scale the initial weights so that the blocks' total output does not grow with depth (Radford et al. 2019)."""
        for layer in (self.attention.output, self.feedforward.outer):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * blocks))

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Apply the block, [P, D] -> [P, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), shapes))
        y: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return y


class Transformer(nn.Module):
    """A stack of blocks over tokens with learned position embeddings, and a final norm.

    Args:
        width: width of the tokens, D.
        length: maximum sequence length, in tokens.
        blocks: number of blocks.
        heads: attention heads per block.
        hidden: units of each feed-forward layer.
        dropout: dropout of the input and in the blocks.
        gated: use gated blocks; see `TransformerBlock`.
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
            TransformerBlock(width, heads, hidden=hidden, dropout=dropout, gated=gated) for _ in range(blocks)
        )
        self.norm = (nn.RMSNorm if gated else nn.LayerNorm)(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            if isinstance(block, TransformerBlock):
                block.start_small(blocks)

    def forward(self, x: Tensor, positions: Tensor, shapes: Shapes) -> Tensor:
        """Encode tokens [P, D] at positions int64 [P] -> [P, D]."""
        x = self.dropout(x + self.positions.index_select(0, positions))
        for block in self.blocks:
            x = block(x, shapes)
        output: Tensor = self.norm(x)
        return output
