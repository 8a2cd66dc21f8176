"""The sequence tower: a query tower that reads a history in order and embeds every position in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.data.loading.gaps import GAP_CODES
from twotower.data.loading.packing import START, Packed, pack_histories
from twotower.errors import InputError
from twotower.towers.context import ContextInputs, SideInputs
from twotower.towers.features import FeatureInputs
from twotower.towers.item_tower import ItemTower
from twotower.towers.layers.attention import Transformer
from twotower.towers.layers.dropout import keep, threshold_of
from twotower.towers.layers.gru import Recurrent
from twotower.towers.layers.mlp import EmbeddedRows
from twotower.towers.layers.recency import RecencyAverages

#: Number of tokens encoded at a time when no gradient is needed, which bounds the memory of a ranking.
TOKENS = 16_384


class SequenceTower(nn.Module):
    """A causal encoder over a start token and the newest L items; its output at a token embeds the query at that time.

        u_t = encoder(x_0, ..., x_t)_t,   x_0 = start, x_i = sqrt(D) e(item_i)                     (Vaswani et al. 2017)

    With `recency`, averages r_h of each token and the tokens before it, weighted by distance, are added to the
    encoder's input and output,

        x_i = sqrt(D) e(item_i) + W [r_1,i, ..., r_H,i],   u_t = encoder(x)_t / sqrt(D) + mean_h r_h,t

    As in `QueryTower`, if both sides share one table, the output is in the space of the items from the first step on,
    and the encoder learns a correction.

    With `gaps`, an embedding of the time since the previous item is added to the encoder's input, like a position:
    x_i = sqrt(D) e(item_i) + g(gap_i), gaps in powers of two (data/loading/gaps.py).

    Query ids, query features and request context, if any, are combined with the output at every token by `beside` (see
    `SideInputs`).

    An empty history is the start token alone. Items before the newest L are ignored.

    Args:
        encoder: encodes tokens [P, D], given their positions and the shapes of their groups.
        history_items: the source of item embeddings: the item tower's table, a separate table, or an item tower, which
            embeds each distinct item with its features.
        dimension: width of the embeddings, D.
        length: maximum history length, L.
        recency: the averages; None for the encoder alone.
        item_dropout: share of items hidden in training, so that the model does not rely on single items.
        beside: query ids, query features and request context; None for items only.
        gaps: whether the tower reads the time between items.
    """

    def __init__(
        self,
        encoder: Transformer | Recurrent,
        history_items: nn.Embedding | ItemTower,
        dimension: int,
        *,
        length: int,
        recency: RecencyAverages | None = None,
        item_dropout: float = 0.0,
        beside: SideInputs | None = None,
        gaps: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.history_items = history_items
        self.start = nn.Parameter(torch.zeros(dimension))
        self.length = length
        self.scale = math.sqrt(dimension)
        self.item_dropout = item_dropout
        self.recency = recency
        if recency is not None:
            self.mixed = nn.Linear(recency.heads * dimension, dimension, bias=False)
        self.beside = beside
        self.gaps = nn.Embedding(GAP_CODES, dimension) if gaps else None
        if self.gaps is not None:
            nn.init.normal_(self.gaps.weight, std=0.02)  # like the positions

    @property
    def features(self) -> FeatureInputs | None:
        """Inputs for query features, or None."""
        return None if self.beside is None else self.beside.features

    @property
    def context(self) -> ContextInputs | None:
        """Inputs for request context, or None."""
        return None if self.beside is None else self.beside.context

    def forward(
        self,
        queries: Tensor,
        history: Tensor | None,
        features: list[Tensor] | None = None,
        context: Sequence[Tensor] | None = None,
        gaps: Tensor | None = None,
    ) -> Tensor:
        """Embed queries from their histories -> [B, D].

        Args:
            queries: codes int64 [B], -1 if never seen.
            history: item codes int64 [B, n], newest last, padded with -1 on the left; only the last L are read.
            features: encoded feature rows of new queries; None to look them up by code.
            context: encoded request contexts; None if there are none.
            gaps: codes of the gap before each item of the history, int64 [B, n]; None if unknown.

        Raises:
            InputError: there is no history.
        """
        state = self._states(history, gaps if self.gaps is not None else None)
        return state if self.beside is None else self.beside(state, queries, features, context)

    def _states(self, history: Tensor | None, gaps: Tensor | None) -> Tensor:
        if history is None:
            raise InputError("history: this query tower needs the recent items, int64 [B, L]; found none")
        history = history[:, -self.length :]
        since = None if gaps is None else gaps[:, -self.length :]
        if torch.compiler.is_exporting():
            return self._rectangle(history, since)
        if len(history) == 0:
            return self.start.new_empty(0, len(self.start))
        if torch.is_grad_enabled():
            packed, place = pack_histories(history, since)
            return self._outputs(packed)[place]
        # Sort by length, so that a block has little padding; restore the order at the end.
        order = torch.argsort((history >= 0).sum(1))
        block = max(TOKENS // (history.shape[1] + 1), 1)
        embedded = []
        for rows in torch.split(order, block):
            packed, place = pack_histories(history[rows], None if since is None else since[rows])
            embedded.append(self._outputs(packed)[place])
        return torch.cat(embedded)[torch.argsort(order)]

    def embed(
        self,
        packed: Packed,
        queries: Tensor | None = None,
        features: list[Tensor] | None = None,
        context: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Embed the requested positions of packed sequences, [B, D]; side inputs are in the same order."""
        state = self._outputs(packed)
        if self.beside is None:
            return state
        if queries is None:
            queries = torch.full((len(state),), -1, device=state.device)
        joined: Tensor = self.beside(state, queries, features, context)
        return joined

    def _outputs(self, packed: Packed) -> Tensor:
        encoded = self._encode(packed.tokens, packed.positions, packed.shapes, packed.gaps)
        return encoded.index_select(0, packed.rows)

    def _encode(
        self, tokens: Tensor, positions: Tensor, shapes: tuple[tuple[int, int], ...], gaps: Tensor | None = None
    ) -> Tensor:
        is_item = tokens != START
        x = self._look_up(tokens.clamp(min=0))
        if self.training and self.item_dropout > 0:
            shown = is_item & _shown(tokens, self.item_dropout)
            x = x * shown[:, None]
        x = torch.where(is_item[:, None], x, self.start)
        read = x * self.scale
        if self.gaps is not None:
            read = read + self.gaps(torch.zeros_like(tokens) if gaps is None else gaps)
        if self.recency is None:
            encoded: Tensor = self.encoder(read, positions, shapes)
            return encoded
        averages = self.recency(x, shapes)
        encoded = self.encoder(read + self.mixed(averages.flatten(1)), positions, shapes)
        returned: Tensor = encoded / self.scale + averages.mean(1)
        return returned

    def _look_up(self, codes: Tensor) -> Tensor:
        table: nn.Module | EmbeddedRows = self.history_items
        if isinstance(table, ItemTower):
            distinct, codes = torch.unique(codes, return_inverse=True)
            table = EmbeddedRows(table(distinct))
        embedded: Tensor = table(codes)
        return embedded

    def _rectangle(self, history: Tensor, gaps: Tensor | None = None) -> Tensor:
        """Compute `forward` with operations whose shapes do not depend on the data, for an export."""
        rows, width = history.shape
        count = (history >= 0).sum(1, keepdim=True)
        place = torch.arange(width + 1, device=history.device).expand(rows, -1)
        at = (width - count + place - 1).clamp(0, width - 1)
        is_item = (place > 0) & (place <= count)
        tokens = torch.where(is_item, history.gather(1, at), START)
        since = None if gaps is None else torch.where(is_item & (place > 1), gaps.gather(1, at), 0).reshape(-1)
        encoded = self._encode(tokens.reshape(-1), place.reshape(-1), ((rows, width + 1),), since)
        encoded = encoded.reshape(rows, width + 1, -1)
        return encoded.gather(1, count[:, :, None].expand(-1, -1, encoded.shape[2]))[:, 0]


def _shown(tokens: Tensor, dropout: float) -> Tensor:
    if tokens.device.type == "cpu":
        return keep(tokens.shape, threshold_of(dropout))
    return torch.rand(tokens.shape, device=tokens.device) >= dropout
