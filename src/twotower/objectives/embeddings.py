"""The embeddings of a batch, as every objective reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Embedded:
    """The embeddings of one batch.

    Attributes:
        query: query embeddings, [B, D].
        positive: embeddings of the rows' positives, [B, D].
        candidates: embeddings of `drawn.items`, [M, D].
        row_candidates: embeddings of `drawn.row_items`, [B, R, D], or None.
        repeated_queries: whether rows may have bitwise equal query embeddings, whose logits the softmax computes once.
    """

    query: Tensor
    positive: Tensor
    candidates: Tensor
    row_candidates: Tensor | None = None
    repeated_queries: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Embedded:
        """Return a copy with a function applied to each tensor."""
        rows = self.row_candidates
        return replace(
            self,
            query=change(self.query),
            positive=change(self.positive),
            candidates=change(self.candidates),
            row_candidates=None if rows is None else change(rows),
        )
