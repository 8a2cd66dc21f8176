"""The query tower that reads a history in its order, and embeds every position of a sequence in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.data.gaps import GAP_CODES
from twotower.data.packing import START, Packed, pack_histories
from twotower.towers.attention import Transformer
from twotower.towers.context import Beside, ContextInputs
from twotower.towers.dnn import Rows
from twotower.towers.dropout import keep, threshold_of
from twotower.towers.features import FeatureInputs
from twotower.towers.items import ItemTower
from twotower.towers.recency import RecencyAverages
from twotower.towers.recurrent import Recurrent

#: Tokens encoded at once where nothing is trained: bounds the memory of a ranking.
TOKENS = 16_384


class SequenceTower(nn.Module):
    """A causal encoder over the start token and the newest L items; its output at a token embeds the query there.

        u_t = encoder(x_0, ..., x_t)_t,   x_0 = start, x_i = sqrt(D) e(item_i)                     (Vaswani et al. 2017)

    With `recency` averages r_h of what stands before, weighted by distance, join both ends of the encoder,

        x_i = sqrt(D) e(item_i) + W [r_1,i, ..., r_H,i],   u_t = encoder(x)_t / sqrt(D) + mean_h r_h,t

    so that a history speaks in the space of the items from the first step on, where both sides share one table, as in
    `QueryTower`; the encoder learns what to change about that.

    With `gaps` a vector for the time since the item before joins what the encoder reads, beside the place:
    x_i = sqrt(D) e(item_i) + g(gap_i), gaps in doublings (data/gaps.py).

    Where more is known of a query than its items, `beside` joins it to the output at every token (see `Beside`).

    An empty history is the start token alone. Items before the newest L are not looked at.

    Args:
        encoder: of tokens [P, D] with their places and the shapes of their groups.
        history_items: what items are looked up in: the item tower's own table or a separate one, or an item tower,
            which embeds each distinct item with its features.
        dimension: D.
        length: L.
        recency: the averages; None for an encoder alone.
        item_dropout: share of the items hidden in training, so that no single one is relied on.
        beside: query ids, features of queries, context of requests; None for items alone.
        gaps: whether the time between items is read.
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
        beside: Beside | None = None,
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
            nn.init.normal_(self.gaps.weight, std=0.02)  # as the places

    @property
    def features(self) -> FeatureInputs | None:
        """Of the queries."""
        return None if self.beside is None else self.beside.features

    @property
    def context(self) -> ContextInputs | None:
        """Of the requests."""
        return None if self.beside is None else self.beside.context

    def forward(
        self,
        queries: Tensor,
        history: Tensor | None,
        features: list[Tensor] | None = None,
        context: Sequence[Tensor] | None = None,
        gaps: Tensor | None = None,
    ) -> Tensor:
        """Histories int64 [B, at most L], newest last, -1 on the left where there are fewer -> [B, D].

        Args:
            queries: codes int64 [B], -1 for one never seen.
            history: as above.
            features: encoded rows of queries that are new; otherwise their codes tell.
            context: encoded contexts of the requests; None where nothing is known of any.
            gaps: codes of the gap before each item of the history, int64 [B, L]; None where nobody knows them.

        Raises:
            ValueError: no history.
        """
        state = self._states(history, gaps if self.gaps is not None else None)
        return state if self.beside is None else self.beside(state, queries, features, context)

    def _states(self, history: Tensor | None, gaps: Tensor | None) -> Tensor:
        if history is None:
            raise ValueError("history: this query tower needs the recent items, int64 [B, L]; found none")
        history = history[:, -self.length :]
        since = None if gaps is None else gaps[:, -self.length :]
        if torch.compiler.is_exporting():
            return self._rectangle(history, since)
        if len(history) == 0:
            return self.start.new_empty(0, len(self.start))
        if torch.is_grad_enabled():
            packed, place = pack_histories(history, since)
            return self._outputs(packed)[place]
        # By length, so that a block has little padding; then back in the order asked.
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
        """The outputs that are wanted of packed sequences, [B, D]; what is beside them in the order of these."""
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
        table: nn.Module | Rows = self.history_items
        if isinstance(table, ItemTower):
            distinct, codes = torch.unique(codes, return_inverse=True)
            table = Rows(table(distinct))
        embedded: Tensor = table(codes)
        return embedded

    def _rectangle(self, history: Tensor, gaps: Tensor | None = None) -> Tensor:
        """What `forward` does, in operations whose shapes do not depend on the data: for an export."""
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
