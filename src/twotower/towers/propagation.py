"""Propagation of id tables over the graph of queries and items (He et al. 2020, "LightGCN", eq. 3, 4 and 8).

With the training pairs as edges, n_q distinct items of query q and n_j distinct queries of item j, the vectors of both
towers are, for K layers with equal weights,

    [Q V] = 1/(K+1) sum_{k=0..K} A^k [Q0 V0],        A_qj = A_jq = 1 / sqrt(n_q n_j) for a pair, else 0.

The result is one vector per query and item, for every K. After training it replaces the tables (`fold`), so that a
saved model has ordinary id tables and serving needs no graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.errors import InputError
from twotower.towers.tables import EmbeddingTable
from twotower.towers.two_tower import QueryTower, TwoTower


class PropagatedTable(EmbeddingTable):
    """An id table whose lookups return propagated vectors; its weights are the vectors before propagation.

    Args:
        table: the id table; its weight is used, not copied.
        graph: the propagation that contains this table.
    """

    def __init__(self, table: EmbeddingTable, graph: Propagation) -> None:
        super().__init__(1, 1)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.name, self.weight, self.sparse = table.name, table.weight, False
        # In a tuple, so that the graph, which owns the table, is not registered as a submodule of it.
        self.graph = (graph,)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the parameter name of nn.Embedding
        """Look up the propagated vectors of codes int64 [...] -> float32 [..., D]."""
        return F.embedding(input, self.graph[0].vectors_of(self))


class Propagation(nn.Module):
    """The mean of K + 1 powers of the normalised adjacency matrix times both id tables.

    Both tables are propagated once per step, at the first lookup; the result is used until the weights change or the
    backward pass ends. Under bfloat16 autocast the rows are read in bfloat16 and summed in float32, because a layer is
    limited by memory bandwidth.

    Args:
        queries: the query id table.
        items: the item id table.
        pairs: distinct training pairs (query code, item code), int64 [2, E].
        layers: K, at least 1.

    Raises:
        InputError: a table is sharded over ranks or not in float32.
    """

    def __init__(self, queries: EmbeddingTable, items: EmbeddingTable, pairs: Tensor, layers: int) -> None:
        super().__init__()
        for table in (queries, items):
            if table.part is not None or table.weight.dtype != torch.float32:
                raise InputError(
                    "query_tower.propagation: every rank propagates whole float32 tables; use "
                    "training.table_placement=replicated and item_tower.table_precision=float32"
                )
        self.layers = layers
        self.tables = (PropagatedTable(queries, self), PropagatedTable(items, self))
        for name, (mine, other), table in (("query", pairs, queries), ("item", pairs.flip(0), items)):
            counts = torch.bincount(mine, minlength=table.num_embeddings)
            neighbours = other[torch.argsort(mine, stable=True)]
            for part, value in (
                ("neighbours", neighbours),
                ("offsets", F.pad(counts.cumsum(0), (1, 0))),
                ("root", counts.clamp(min=1).float().rsqrt()[:, None]),
            ):
                self.register_buffer(f"{name}_{part}", value, persistent=False)
        self._key: tuple[Any, ...] | None = None
        self._vectors: tuple[Tensor, Tensor] | None = None

    def vectors_of(self, table: PropagatedTable) -> Tensor:
        """Return the propagated vectors of one of the two tables, [rows, D]."""
        return self.vectors()[0 if table is self.tables[0] else 1]

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return the propagated vectors of queries [Q, D] and items [N, D]."""
        queries, items = (table.weight for table in self.tables)
        key = (queries._version, items._version, id(queries), id(items), torch.is_grad_enabled(), queries.device)
        if self._vectors is None or key != self._key:
            self._vectors = _Propagated.apply(queries, items, self)  # type: ignore[no-untyped-call]
            self._key = key
        assert self._vectors is not None
        return self._vectors

    def propagate(self, queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Propagate vectors [Q, D] and [N, D] -> the same shapes. The map is linear and symmetric."""
        of_queries, of_items = queries.clone(), items.clone()
        for _ in range(self.layers):
            queries, items = self._layer("query", items), self._layer("item", queries)
            of_queries += queries
            of_items += items
        return of_queries / (self.layers + 1), of_items / (self.layers + 1)

    def forget(self) -> None:
        """Discard the vectors of this step; the next lookup propagates again."""
        self._vectors = self._key = None

    def _layer(self, side: str, rows: Tensor) -> Tensor:
        """Sum the neighbours of each row of a side: A times the rows of the other side."""
        other = "item" if side == "query" else "query"
        scaled = rows * self.get_buffer(f"{other}_root")
        if torch.is_autocast_enabled(rows.device.type):
            scaled = scaled.to(torch.get_autocast_dtype(rows.device.type))
        neighbours, offsets = self.get_buffer(f"{side}_neighbours"), self.get_buffer(f"{side}_offsets")
        summed = F.embedding_bag(neighbours, scaled, offsets, mode="sum", include_last_offset=True)
        return self.get_buffer(f"{side}_root") * summed.float()


class _Propagated(torch.autograd.Function):
    """Propagation with its gradient: the matrix is symmetric, so the gradient is propagated by the same map."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, graph: Propagation) -> tuple[Tensor, Tensor]:
        """Propagate both tables, [Q, D], [N, D] -> the same shapes."""
        ctx.graph = graph
        return graph.propagate(queries, items)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Propagate the gradients, and discard the vectors, whose graph is freed."""
        ctx.graph.forget()
        return (*ctx.graph.propagate(*gradients), None)


def propagate_over(towers: TwoTower, pairs: Tensor, layers: int) -> None:
    """Make the id tables of both towers propagate over the training pairs, int64 [2, E]; changes the towers in place.

    Raises:
        InputError: a tower is not an id table alone, or a table is sharded or not in float32.
    """
    query, item = towers.query_tower, towers.item_tower
    is_alone = isinstance(query, QueryTower) and query.history is None and query.mlp is None and item.mlp is None
    if not is_alone or query.ids is None or item.ids is None:
        raise InputError(
            "query_tower.propagation: both towers must be id tables; use query_tower.id_embedding=true, "
            "query_tower.history=null, query_tower.hidden=null, and no features or context"
        )
    assert isinstance(query.ids, EmbeddingTable)
    graph = Propagation(query.ids, item.ids, pairs, layers)
    towers.propagation = graph
    query.ids, item.ids = graph.tables


@torch.no_grad()
def fold(towers: TwoTower) -> None:
    """Replace propagated id tables with ordinary ones that store the propagated vectors; no-op without propagation."""
    if towers.propagation is None:
        return
    query, item = towers.query_tower, towers.item_tower
    assert isinstance(query, QueryTower) and isinstance(towers.propagation, Propagation)
    vectors = towers.propagation.vectors()
    towers.propagation = None
    query.ids, item.ids = (
        EmbeddingTable.of(rows, name=name) for rows, name in zip(vectors, ("query", "item"), strict=True)
    )
