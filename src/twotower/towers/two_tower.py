"""The query tower with a pooled history, and the two-tower model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.config.towers import nested_widths
from twotower.data.loading.packing import Packed
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable, FeatureSet
from twotower.features.frames import RowsLike
from twotower.index.prefix import Prefix
from twotower.towers.context import ContextInputs, QueryInputs
from twotower.towers.features import FeatureInputs
from twotower.towers.item_tower import ItemTower
from twotower.towers.layers.mlp import EmbeddedRows, dense_layers
from twotower.towers.sequence_tower import SequenceTower
from twotower.towers.tables import EmbeddingTable
from twotower.towers.text import TextTransformer

#: Number of items embedded at a time for an index, without and with a text encoder.
BLOCK, TEXT_BLOCK = 65_536, 1024

#: Number of pseudo-rows, with the event shares of all training rows, that are added to the rows of each item.
PRIOR_ROWS = 5.0


class PooledHistory(nn.Module):
    """Averages of the recent items; every head has a learned weight for each step back in the history.

        pooled_h = sum_l w_hl e(item_l) / sum_l w_hl [item_l present],   w_hl = exp(a_h[steps back of l])

    The heads start at different time scales, from almost only the last item to a uniform mean; training determines how
    much recency matters.

    Args:
        length: L, the maximum history length.
        heads: number of averages.
        dropout: share of items hidden in training, so that the model does not rely on single items of the history.
        power: a; the averages are multiplied by n^a, with n the number of items present. With equal weights, 1
            makes them sums.
        event_types: T, the number of event types; 0 for weights that do not depend on types. With types,

            w_hl = exp(a_h[steps back of l] + g_h[t, t_l]),

            where t is the requested type and t_l the type of the item, each one of T or unknown. g starts at 0, except
            that in every second head, items of a type other than t start with e^-2 times the weight.
    """

    def __init__(
        self, length: int, heads: int, *, dropout: float = 0.0, power: float = 0.0, event_types: int = 0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.power = power
        self.dropout = dropout
        steps_back = torch.arange(length - 1, -1, -1, dtype=torch.float32)
        # Half-lives 0.5, 2, 8, ... items; the last head is a uniform mean.
        rates = torch.tensor([0.0 if head == heads - 1 else 2.0 * 0.25**head for head in range(heads)])
        self.log_weight = nn.Parameter(-rates[:, None] * steps_back * 0.6931)
        self.event_weight: nn.Parameter | None = None
        if event_types:
            other = 1.0 - torch.eye(event_types + 1)
            other[-1], other[:, -1] = 0.0, 0.0  # unknown
            start = torch.arange(heads) % 2 * -2.0
            self.event_weight = nn.Parameter(start[:, None, None] * other)

    def _by_type(self, events: Tensor | None, asked: Tensor | None, shape: torch.Size) -> Tensor:
        """Return g_h[t, t_l], [B, heads, L], for requested types [B] and types of items [B, L]; None is unknown."""
        assert self.event_weight is not None
        count, device = self.event_weight.shape[1], self.event_weight.device
        unknown = torch.full(shape, -1, device=device)
        items = unknown if events is None else events
        of_rows = unknown[:, :1] if asked is None else asked[:, None]
        pairs = of_rows.remainder(count) * count + items.remainder(count)  # -1 is the last row or column
        return F.embedding(pairs, self.event_weight.flatten(1).T).transpose(1, 2)

    def forward(
        self, history: Tensor, table: nn.Embedding, events: Tensor | None = None, asked: Tensor | None = None
    ) -> Tensor:
        """Pool histories int64 [B, L], newest last, -1 where empty -> [B, heads, D]; zeros for an empty history.

        Args:
            history: item codes.
            table: the vectors of the items.
            events: types of the items, int64 [B, L], -1 where unknown; None if all types are unknown. Ignored if
                `event_types` is 0.
            asked: the type that each row asks for, int64 [B], -1 where unknown; None if all types are unknown.
        """
        present = history >= 0
        if self.training and self.dropout > 0:
            kept = torch.rand(history.shape, device=history.device) >= self.dropout
            present = present & kept
        log_weight = self.log_weight[:, -history.shape[1] :]
        if self.event_weight is not None:
            log_weight = log_weight + self._by_type(events, asked, history.shape)
        scores = log_weight.masked_fill(~present[:, None, :], -torch.inf)
        # A row with no history is all -inf: softmax would be NaN, and its average is zero by definition.
        empty = ~present.any(1)
        weights = scores.masked_fill(empty[:, None, None], 0.0).softmax(-1)
        weights = weights.masked_fill(empty[:, None, None], 0.0)
        if self.heads == 1 and _is_plain(table) and not torch.compiler.is_compiling():
            pooled = _bags(history, present, weights[:, 0], table)[:, None]
        else:
            embedded = table(history.clamp(min=0))
            pooled = weights.to(embedded.dtype) @ embedded
        if self.power:
            pooled = pooled * present.sum(1).clamp(min=1).pow(self.power).to(pooled.dtype)[:, None, None]
        return pooled


def _is_plain(table: nn.Module | EmbeddedRows) -> TypeGuard[EmbeddingTable]:
    """Return whether a table can be read directly: whole, in float32, and in main memory."""
    return (
        isinstance(table, EmbeddingTable)
        and table.part is None
        and table.weight.dtype == torch.float32
        and table.weight.device.type == "cpu"
    )


def _bags(history: Tensor, present: Tensor, weights: Tensor, table: EmbeddingTable) -> Tensor:
    """Sum the items of histories with weights [B, L] -> [B, D], without vectors for the padding.

    In most data, histories are much shorter than L; padded vectors, [B, L, D], would cost more than everything else.
    """
    counts = present.sum(1)
    return F.embedding_bag(
        history[present],
        table.weight,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=weights[present],
        sparse=table.sparse,
    )


class QueryTower(QueryInputs):
    """Id embedding, pooled history, features and context: an MLP over all of them plus the sum of the first two.

        u = e_id + mean_h pooled_h + MLP([e_id, pooled_1, ..., pooled_H, features, context])

    If both sides share one table, the sum puts the history in the space of the items from the first step on: items near
    the recent items are recommended, and the MLP learns a correction.

    Args:
        num_queries: rows of the id table; 0 for a tower without id embeddings.
        dimension: width of the embeddings, D.
        history: how the history is pooled; None for a tower without a history.
        history_items: the source of item embeddings for the history: the item tower's table, a separate table, or an
            item tower, which embeds each distinct item of the batch's histories with its features.
        hidden: widths of the MLP's hidden layers; None for no MLP. With features or context, None is the same as ().
        dropout: dropout in the MLP.
        features: inputs for query features; None for a tower without features.
        residual: add skip connections around the hidden layers.
        layer_norm: apply layer normalisation before the activations of the hidden layers.
        context: inputs for request context; None for a tower that does not use it.
        trained: queries that have a training row, bool [Q]; None for all.
        projection: False for u = e_id + mean_h pooled_h + the sum of the vectors of features and context, without an
            MLP.
    """

    def __init__(
        self,
        num_queries: int,
        dimension: int,
        *,
        history: PooledHistory | None = None,
        history_items: nn.Embedding | ItemTower | None = None,
        hidden: Sequence[int] | None = (),
        dropout: float = 0.0,
        features: FeatureInputs | None = None,
        residual: bool = False,
        layer_norm: bool = False,
        context: ContextInputs | None = None,
        trained: Tensor | None = None,
        projection: bool = True,
    ) -> None:
        super().__init__(num_queries, dimension, trained)
        if (history is None) != (history_items is None):
            raise InputError("history and history_items: expected both or neither")
        self.history = history
        self.history_items = history_items
        heads = 0 if history is None else history.heads
        self.features = features
        self.context = context
        width = dimension * (heads + bool(num_queries)) + sum(part.width for part in (features, context) if part)
        # Rows of one query have the same embedding if it depends only on the query.
        self.repeats_queries = history is None and context is None and not (dropout and hidden)
        self.mlp: nn.Module | None = None
        if not projection:
            for inputs in (features, None if context is None else context.inputs):
                if inputs is not None:
                    inputs.require_vectors(dimension)
        elif hidden is not None or features is not None or context is not None:
            widths = [width, *(hidden or ()), dimension]
            self.mlp = dense_layers(widths, dropout=dropout, residual=residual, layer_norm=layer_norm)

    def forward(
        self,
        queries: Tensor,
        history: Tensor | None,
        features: list[Tensor] | None = None,
        context: Sequence[Tensor] | None = None,
        events: Tensor | None = None,
    ) -> Tensor:
        """Embed queries, given codes int64 [B] (-1 if never seen) and histories int64 [B, L] -> [B, D].

        Args:
            queries: codes.
            history: item codes, newest last, -1 where empty; None for a tower without a history.
            features: encoded feature rows (`FeatureInputs.encode`) of new queries; None to look them up by code.
            context: encoded request contexts (`encode_context_rows`); None if there are none.
            events: event types of the history items, int64 [B, L], -1 where unknown; for a history with
                `event_weight`.

        Raises:
            InputError: the tower needs a history and none is given.
        """
        parts = self.by_id(queries)
        total: Tensor | float = sum(parts)
        if self.history is not None and self.history_items is not None:
            if history is None:
                raise InputError("history: this query tower needs the recent items, int64 [B, L]; found none")
            pooled = self._pooled(history, events, context)
            parts.append(pooled.flatten(1))
            total = total + pooled.mean(1)
        columns = self.by_columns(queries, features, context)
        if self.mlp is None:
            inputs = [] if self.features is None else [self.features]
            inputs += [] if self.context is None else [self.context.inputs]
            for one, vectors in zip(inputs, columns, strict=True):
                total = total + one.summed(vectors)
            assert isinstance(total, Tensor)
            return total
        parts += columns
        embedded: Tensor = self.mlp(torch.cat(parts, 1)) + total
        return embedded

    def _pooled(self, history: Tensor, events: Tensor | None, context: Sequence[Tensor] | None) -> Tensor:
        assert self.history is not None
        table: nn.Module | EmbeddedRows | None = self.history_items
        if isinstance(table, ItemTower):
            # Embed each distinct item once; the history then indexes into these embeddings.
            distinct, place = torch.unique(history.clamp(min=0), return_inverse=True)
            history, table = torch.where(history >= 0, place, -1), EmbeddedRows(table(distinct))
        asked = None if self.context is None else self.context.asked(context, len(history))
        pooled: Tensor = self.history(history, table, events, asked)
        return pooled


class TwoTower(nn.Module):
    """A query tower and an item tower with a common embedding space: s(x, j) = <u(x), v(j)> / temperature.

    With an item bias b, log popularity scaled by a, or a recent prior r,

        s(x, j) = <u(x), v(j)> / T + b_j + a (log p_j - mean log p) + r_j.

    Embeddings then have one more coordinate, 1 for queries and T times the sum of the last three terms for items, so
    that every inner product includes these terms.

    With event types, a_e log (p_j^t / p_j) is added too for a request of type t, with one coordinate per type, which is
    1 for queries of the type, else 0. By Bayes' rule P(j | x, t) ~ P(j | x) P(t | x, j); this term replaces P(t | x, j)
    with P(t | j) ~ p_j^t / p_j, and the towers learn the rest.

    Args:
        query_tower: queries -> [B, D].
        item_tower: codes -> [M, D].
        cosine: scale both embeddings to length 1, before coordinates are added.
        temperature: initial temperature.
        learned_temperature: train the temperature.
        bias: table of the item biases, [N, 1]; None for no bias.
        popularity: a, the factor of log popularity; if not 0, `set_popularity` must be called before training.
        nested: widths at which the embeddings are also trained, ascending, each at most D; see `at_width`.
        nested_weights: relative weights of the losses at the `widths`; None for equal weights.
        event_types: the number of event types; 0 for none.
        event_share: a_e, the factor of the event shares; if not 0, `set_event_shares` must be called before training.

    Attributes:
        popular: a (log p - mean log p), float32 [N]; None if a is 0.
        by_event: a_e log (p_j^t / p_j), float32 [N, types]; None if a_e is 0 or there are no types.
        recent: r, float32 [N], set after training (`set_recent`); None without a recent prior.
        propagation: the propagation of both id tables, during training (`propagate_over`); None without propagation.
    """

    log_temperature: Tensor
    popular: Tensor | None
    recent: Tensor | None
    by_event: Tensor | None
    propagation: nn.Module | None

    def __init__(
        self,
        query_tower: QueryTower | SequenceTower,
        item_tower: ItemTower,
        *,
        cosine: bool = True,
        temperature: float = 0.1,
        learned_temperature: bool = True,
        bias: EmbeddingTable | None = None,
        popularity: float = 0.0,
        nested: Sequence[int] = (),
        nested_weights: Sequence[float] | None = None,
        event_types: int = 0,
        event_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.nested = tuple(nested)
        self.nested_weights = None if nested_weights is None else tuple(nested_weights)
        self.event_share = event_share
        kept = torch.zeros(item_tower.num_items, event_types) if event_types and event_share else None
        self.register_buffer("by_event", kept)
        self.query_tower = query_tower
        self.item_tower = item_tower
        self.cosine = cosine
        self.bias = bias
        self.popularity = popularity
        self.propagation = None
        self.register_buffer("popular", torch.zeros(item_tower.num_items) if popularity else None)
        self.register_buffer("recent", None)
        start = torch.tensor(temperature).log()
        if learned_temperature:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)

    @property
    def temperature(self) -> Tensor:
        """The scalar that divides every score."""
        return self.log_temperature.exp()

    @property
    def width(self) -> int:
        """Width of the embeddings: D, plus one per event type if a_e is not 0, plus one if there is an offset.

        The offset sums the item bias, the scaled log popularity and the recent prior; absent terms count as 0.
        """
        return self.item_tower.dimension + self._has_offset + self._num_types

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths at which the embeddings are trained, ascending, D last."""
        return nested_widths(self.nested, self.item_tower.dimension)

    def at_width(self, embedded: Tensor, width: int) -> Tensor:
        """Shorten embeddings of queries or items to their first coordinates, [..., D + c] -> [..., width + c].

        With cosine similarity the first coordinates are scaled to length 1 again. The c coordinates after the first D
        (event shares, item bias, popularity, recent prior, dial) are kept unchanged, so that the score at a width w is

            s_w(x, j) = <u_w(x), v_w(j)> / T + b_j + a (log p_j - mean log p) + r_j.

        Raises:
            InputError: the width is not in 1 .. D.
        """
        return Prefix(width, self.item_tower.dimension, self.cosine)(embedded)

    @property
    def _has_offset(self) -> bool:
        return self.bias is not None or self.popular is not None or self.recent is not None

    def set_popularity(self, counts: Tensor) -> None:
        """Compute a (log p - mean log p) from the training rows of each item, [N]; no-op if a is 0.

        p is smoothed by one row per item, as in the popularity dial.
        """
        if self.popular is not None:
            log_p = ((counts.double() + 1.0) / (counts.sum() + len(counts))).log()
            self.popular.copy_(self.popularity * (log_p - log_p.mean()))

    @property
    def _num_types(self) -> int:
        return 0 if self.by_event is None else self.by_event.shape[1]

    def set_event_shares(self, counts: Tensor) -> None:
        """Compute a_e log (p_j^t / p_j) from the training rows of each item and type, [N, types]; no-op if a_e is 0.

            p_j^t / p_j = p(t | j) / p(t),   p(t | j) = (n_jt + c p(t)) / (n_j + c),   c = 5

        For an item with few rows p(t | j) is close to p(t), the share over all rows, and without rows it equals p(t).
        """
        if self.by_event is not None:
            counts = counts.double()
            share = (counts.sum(0) + 1.0) / (counts.sum() + counts.shape[1])
            found = (counts + PRIOR_ROWS * share) / (counts.sum(1, keepdim=True) + PRIOR_ROWS)
            self.by_event.copy_(self.event_share * (found / share).log())

    def set_recent(self, recent: Tensor | None) -> None:
        """Set the recent prior r of every item, [N]; None removes it."""
        device = self.log_temperature.device
        self.recent = None if recent is None else recent.detach().to(device, torch.float32)

    def _of_queries(self, embedded: Tensor, context: Sequence[Tensor] | None = None) -> Tensor:
        if self.cosine:
            embedded = F.normalize(embedded, dim=-1)
        if self.by_event is not None:
            inputs = self.query_tower.context
            assert inputs is not None
            types = torch.arange(self._num_types, device=embedded.device)
            asked = inputs.asked(context, len(embedded))[:, None] == types  # -1 (unknown) equals no type
            embedded = torch.cat([embedded, asked.to(embedded.dtype)], 1)
        return torch.cat([embedded, torch.ones_like(embedded[:, :1])], 1) if self._has_offset else embedded

    def _of_items(self, embedded: Tensor, items: Tensor | None) -> Tensor:
        """Normalise, and append the coordinates of each item code; 0 for code -1 and if `items` is None."""
        if self.cosine:
            embedded = F.normalize(embedded, dim=-1)
        if self.by_event is not None:
            added = embedded.new_zeros(len(embedded), self._num_types)
            if items is not None:
                added = self.by_event[items.clamp(min=0)] * (items >= 0)[:, None] * self.temperature
            embedded = torch.cat([embedded, added.to(embedded.dtype)], 1)
        if not self._has_offset:
            return embedded
        offset = torch.zeros_like(embedded[:, :1])
        if items is not None:
            rows, known = items.clamp(min=0), (items >= 0)[:, None]
            if self.bias is not None:
                offset = offset + self.bias(rows) * known
            for coordinate in (self.popular, self.recent):
                if coordinate is not None:
                    offset = offset + coordinate[rows][:, None] * known
        return torch.cat([embedded, offset * self.temperature], 1)

    def embed_queries(
        self,
        queries: Tensor,
        history: Tensor | None,
        features: list[Tensor] | None = None,
        context: Sequence[Tensor] | None = None,
        *,
        gaps: Tensor | None = None,
        events: Tensor | None = None,
    ) -> Tensor:
        """Embed queries, u(x): codes int64 [B], histories int64 [B, L] -> [B, `self.width`].

        Args:
            queries: codes.
            history: item codes, newest last, -1 where empty.
            features: encoded features that replace the stored ones (`FeatureInputs.encode_some`).
            context: encoded request contexts (`encode_context_rows`).
            gaps: codes of the time before each item of the history, int64 [B, L], for a tower that reads them.
            events: event types of the history items, int64 [B, L], -1 where unknown, for a tower that reads them.
        """
        given = {"features": features, "context": context, "gaps": gaps, "events": events}
        options = {name: value for name, value in given.items() if value is not None}
        return self._of_queries(self.query_tower(queries, history, **options), context)

    def embed_sequences(
        self, sequences: Packed, queries: Tensor | None = None, context: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Embed the requested positions of packed sequences in one pass -> [B, `self.width`].

        Args:
            sequences: packed sequences with B requested positions.
            queries: query codes of these positions, int64 [B]; None if all are unknown.
            context: encoded request contexts of these positions; None if there are none.

        Raises:
            TypeError: the query tower does not read sequences.
        """
        if not isinstance(self.query_tower, SequenceTower):
            raise TypeError("this query tower does not read sequences; set query_tower.history.sequence and retrain")
        return self._of_queries(self.query_tower.embed(sequences, queries, context=context), context)

    def embed_items(self, items: Tensor) -> Tensor:
        """Embed items, v(j): codes int64 [M] -> [M, `self.width`]."""
        return self._of_items(self.item_tower(items), items)

    @property
    def is_linear(self) -> bool:
        """Whether both towers are sums of rows of tables, without layers and features, so that D can be changed."""
        query, item = self.query_tower, self.item_tower
        if not isinstance(query, QueryTower) or query.features is not None or query.context is not None:
            return False
        return query.mlp is None and item.mlp is None and item.features is None

    def resize(self, dimension: int) -> None:
        """Change D of linear towers (`is_linear`): new tables of zeros, the same item bias; no-op if D is unchanged.

        Raises:
            TypeError: the towers are not linear.
        """
        if dimension == self.item_tower.dimension:
            return
        if not self.is_linear:
            raise TypeError("only towers without layers and features can change their dimension")
        assert isinstance(self.query_tower, QueryTower)
        tables = (self.query_tower.ids, self.query_tower.history_items, self.item_tower.ids)
        for table in {id(one): one for one in tables if isinstance(one, EmbeddingTable)}.values():
            table.weight = nn.Parameter(table.weight.new_zeros(len(table.weight), dimension))
            table.embedding_dim = dimension
        self.item_tower.dimension = dimension

    @property
    def repeats_queries(self) -> bool:
        """Whether rows with the same query have the same embedding: the query tower reads only ids or features."""
        return getattr(self.query_tower, "repeats_queries", False)

    @property
    def context_features(self) -> FeatureSet | None:
        """The encoders of the request context; None if the query tower does not use it."""
        context = getattr(self.query_tower, "context", None)
        return None if context is None else context.inputs.table.features

    @property
    def event_types(self) -> tuple[str, ...]:
        """The names of the event types; empty without types."""
        context = getattr(self.query_tower, "context", None)
        return () if context is None else context.event_types

    @property
    def history_marks(self) -> Literal["gaps", "events"] | None:
        """What the query tower reads along with each item of a history: gaps, event types, or None for nothing."""
        if getattr(self.query_tower, "gaps", None) is not None:
            return "gaps"
        pooled = getattr(self.query_tower, "history", None)
        return None if getattr(pooled, "event_weight", None) is None else "events"

    @property
    def trained_queries(self) -> Tensor | None:
        """Queries that have a trained id embedding, bool [Q]; None if the query tower has no ids."""
        inputs = getattr(self.query_tower, "beside", self.query_tower)
        return getattr(inputs, "trained", None)

    def feature_tables(self) -> list[EncodedTable]:
        """Return the encoded features of items, queries and requests, if any; loading a saved model needs them."""
        sides = [getattr(self.item_tower, "features", None), getattr(self.query_tower, "features", None)]
        sides.append(getattr(getattr(self.query_tower, "context", None), "inputs", None))
        return [side.table for side in sides if isinstance(side, FeatureInputs)]

    @torch.no_grad()
    def embed_new_items(self, rows: RowsLike, items: Tensor | None = None) -> Tensor:
        """Embed new items, or trained items with new features, from these features -> float32 [M, `self.width`].

        Args:
            rows: a data frame, or dicts, with the columns declared in item_tower.features.
            items: codes int64 [M] of trained items that have new features, -1 for new items; None if all are new.

        Raises:
            InputError: the item tower has no features.
            InputError: a column is missing or has a value of the wrong type.
        """
        if self.item_tower.features is None:
            raise InputError("this item tower has no features, only ids; set item_tower.features and retrain")
        with _evaluating(self):
            embedded = self.item_tower.embed_features(self.item_tower.features.encode(rows), items)
            return self._of_items(embedded, items).float()

    @torch.no_grad()
    def embed_new_queries(self, rows: RowsLike, history: Tensor | None = None) -> Tensor:
        """Embed queries never seen in training, from their features and, if the tower reads one, their history.

        Args:
            rows: a data frame, or dicts, with the columns declared in query_tower.features.
            history: item codes int64 [B, L], -1 where empty; None for empty histories.

        Raises:
            InputError: the query tower has no features.
            InputError: a column is missing or has a value of the wrong type.
        """
        inputs = self.query_tower.features
        if inputs is None:
            raise InputError("this query tower has no features; set query_tower.features and retrain")
        encoded = inputs.encode(rows)
        unknown = torch.full((len(encoded[0]),), -1, device=encoded[0].device)
        with _evaluating(self):
            embedded = self.query_tower(unknown, unknown[:, None] if history is None else history, encoded)
            return self._of_queries(embedded).float()

    @property
    def encodes_text(self) -> bool:
        """Whether a tower has a text encoder, which makes embedding slow."""
        return any(isinstance(module, TextTransformer) for module in self.modules())

    @torch.no_grad()
    def embed_catalog(self, codes: Tensor, progress: Callable[[int, int], object] | None = None) -> Tensor:
        """Embed many items, int64 [M] -> float32 [M, `self.width`], without gradients and in bounded memory.

        Args:
            codes: the items.
            progress: called with the number of items done and M, after every block.
        """
        parts = []
        for part in torch.split(codes, TEXT_BLOCK if self.encodes_text else BLOCK):
            parts.append(self.embed_items(part).float())
            if progress is not None:
                progress(sum(map(len, parts)), len(codes))
        return torch.cat(parts)

    def item_embeddings(self, progress: Callable[[int, int], object] | None = None) -> Tensor:
        """Embed all items for an index, [N, `self.width`]; see `embed_catalog`."""
        return self.embed_catalog(torch.arange(self.item_tower.num_items, device=self.log_temperature.device), progress)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
