"""Towers: from features of a query or an item to an embedding of width D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.towers.tables import EmbeddingTable


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


class PooledHistory(nn.Module):
    """Averages of the recent items, each head with its own learned weight for every step back in time.

        pooled_h = sum_l w_hl e(item_l) / sum_l w_hl [item_l present],   w_hl = exp(a_h[steps back of l])

    The heads start at different time scales, from the last item alone to an even mean, and learn from there: how much
    recency matters is the data's to say.

    Args:
        length: L, the longest history.
        heads: how many averages.
        dropout: share of items hidden in training, so that no single item of the history is relied on.
    """

    def __init__(self, length: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        steps_back = torch.arange(length - 1, -1, -1, dtype=torch.float32)
        # Half-lives 0.5, 2, 8, ... items; the last head is an even mean.
        rates = torch.tensor([0.0 if head == heads - 1 else 2.0 * 0.25**head for head in range(heads)])
        self.log_weight = nn.Parameter(-rates[:, None] * steps_back * 0.6931)

    def forward(self, history: Tensor, table: nn.Embedding) -> Tensor:
        """Codes int64 [B, L], newest last, -1 where empty -> [B, heads, D]; zeros for an empty history."""
        present = history >= 0
        if self.training and self.dropout > 0:
            kept = torch.rand(history.shape, device=history.device) >= self.dropout
            present = present & kept
        embedded = table(history.clamp(min=0))
        log_weight = self.log_weight[:, -history.shape[1] :]
        scores = log_weight.masked_fill(~present[:, None, :], -torch.inf)
        # A row with no history is all -inf: softmax would be NaN, and its average is zero by definition.
        empty = ~present.any(1)
        weights = scores.masked_fill(empty[:, None, None], 0.0).softmax(-1)
        weights = weights.masked_fill(empty[:, None, None], 0.0)
        pooled: Tensor = weights.to(embedded.dtype) @ embedded
        return pooled


class QueryTower(nn.Module):
    """Id embedding and pooled history; an MLP over all of them, added to their sum.

        u = e_id + mean_h pooled_h + MLP([e_id, pooled_1, ..., pooled_H])

    The sum lets a history speak in the space of the items from the first step on, where both sides share one table:
    what lies near the recent items is recommended, and the MLP learns what to change about that.

    Args:
        num_queries: rows of the id table; 0 for a tower without an id embedding.
        dimension: D.
        history: how the history is pooled; None for a tower without one.
        history_items: the table that the history's items are looked up in; the item tower's own, or a separate one.
        hidden: widths of the MLP's hidden layers.
        dropout: in the MLP.
    """

    def __init__(
        self,
        num_queries: int,
        dimension: int,
        *,
        history: PooledHistory | None = None,
        history_items: nn.Embedding | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (history is None) != (history_items is None):
            raise ValueError("a history needs a table of items, and a table a history")
        self.ids = EmbeddingTable(num_queries, dimension) if num_queries else None
        self.history = history
        self.history_items = history_items
        heads = 0 if history is None else history.heads
        self.mlp = MLP([dimension * (heads + bool(num_queries)), *hidden, dimension], dropout=dropout)

    def forward(self, queries: Tensor, history: Tensor | None) -> Tensor:
        """Codes of queries int64 [B] (-1 for one never seen) and histories int64 [B, L] -> [B, D]."""
        parts: list[Tensor] = []
        total: Tensor | float = 0.0
        if self.ids is not None:
            known = self.ids(queries.clamp(min=0)) * (queries >= 0)[:, None]
            parts.append(known)
            total = total + known
        if self.history is not None and self.history_items is not None:
            if history is None:
                raise ValueError("history: this query tower needs the recent items, int64 [B, L]; found none")
            pooled = self.history(history, self.history_items)
            parts.append(pooled.flatten(1))
            total = total + pooled.mean(1)
        embedded: Tensor = self.mlp(torch.cat(parts, 1)) + total
        return embedded


class ItemTower(nn.Module):
    """Id embedding, followed by an MLP where hidden widths are given.

    Args:
        num_items: N.
        dimension: D.
        hidden: widths of the hidden layers; empty for the table alone.
        dropout: in the MLP.
    """

    def __init__(self, num_items: int, dimension: int, *, hidden: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__()
        self.num_items = num_items
        self.ids = EmbeddingTable(num_items, dimension)
        self.mlp = MLP([dimension, *hidden, dimension], dropout=dropout) if hidden else None

    def forward(self, items: Tensor) -> Tensor:
        """Codes int64 [M] -> [M, D]."""
        embedded: Tensor = self.ids(items)
        return embedded if self.mlp is None else self.mlp(embedded)


class TwoTower(nn.Module):
    """A query tower and an item tower that meet in one space: s(x, j) = <u(x), v(j)> / temperature.

    Args:
        query_tower: features -> [B, D].
        item_tower: codes -> [M, D].
        cosine: scale both embeddings to length 1.
        temperature: where the temperature starts.
        learned_temperature: whether it is trained.
    """

    log_temperature: Tensor

    def __init__(
        self,
        query_tower: QueryTower,
        item_tower: ItemTower,
        *,
        cosine: bool = True,
        temperature: float = 0.1,
        learned_temperature: bool = True,
    ) -> None:
        super().__init__()
        self.query_tower = query_tower
        self.item_tower = item_tower
        self.cosine = cosine
        start = torch.tensor(temperature).log()
        if learned_temperature:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)

    @property
    def temperature(self) -> Tensor:
        """The scalar that divides every score."""
        return self.log_temperature.exp()

    def embed_queries(self, queries: Tensor, history: Tensor | None) -> Tensor:
        """u(x): codes int64 [B], histories int64 [B, L] -> [B, D]."""
        embedded: Tensor = self.query_tower(queries, history)
        return F.normalize(embedded, dim=-1) if self.cosine else embedded

    def embed_items(self, items: Tensor) -> Tensor:
        """v(j): codes int64 [M] -> [M, D]."""
        embedded: Tensor = self.item_tower(items)
        return F.normalize(embedded, dim=-1) if self.cosine else embedded

    @torch.no_grad()
    def item_embeddings(self, block: int = 65_536) -> Tensor:
        """All item embeddings as an index needs them, [N, D], float32, without gradient."""
        codes = torch.arange(self.item_tower.num_items, device=self.log_temperature.device)
        return torch.cat([self.embed_items(part).float() for part in torch.split(codes, block)])
