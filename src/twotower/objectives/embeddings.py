"""The embeddings of a batch, as every objective reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Embedded:
    """The embeddings of one batch.

    Attributes:
        query: [B, D].
        positive: [B, D].
        candidates: embeddings of `drawn.items`, [M, D].
        row_candidates: embeddings of `drawn.row_items`, [B, R, D], or None.
        repeated_queries: rows may have the same query embedding, bit by bit; the softmax then computes it once.
    """

    query: Tensor
    positive: Tensor
    candidates: Tensor
    row_candidates: Tensor | None = None
    repeated_queries: bool = False
