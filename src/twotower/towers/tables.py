"""Embedding tables: one row of D numbers for each code."""

from __future__ import annotations

from torch import nn

#: Tables with more rows than this get sparse gradients, so that a step's cost does not grow with the catalog. Below,
#: a dense gradient is cheaper than sorting the ids that a step touched.
SPARSE_ABOVE = 100_000


class EmbeddingTable(nn.Embedding):
    """A table of `rows` vectors of width `dimension`, initialised N(0, scale^2).

    Args:
        rows: number of codes.
        dimension: D.
        scale: standard deviation of the start; with it unset 1/sqrt(D), so that vectors start with length 1.
    """

    def __init__(self, rows: int, dimension: int, *, scale: float | None = None) -> None:
        super().__init__(rows, dimension, sparse=rows > SPARSE_ABOVE)
        nn.init.normal_(self.weight, std=dimension**-0.5 if scale is None else scale)
