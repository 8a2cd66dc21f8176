"""A guard against false negatives: a fixed text model finds candidates that match a query as well as its positive."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.negatives.masks import RowRule
from twotower.negatives.sources import DrawRequest

#: Scores that differ by less count as equal: two items with the same text have the same score up to rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class GuardedRows:
    """The rows of a batch and the M items, one per column, that they are compared with.

    Attributes:
        queries: vectors of the rows' queries, float32 [B, D].
        limits: the lowest score that is masked in each row, float32 [B]; inf for a row where nothing is masked.
        items: vectors of the items, float32 [M, D].
        has_text: whether each item has a text, bool [M]; items without a text are never masked.
    """

    queries: Tensor
    limits: Tensor
    items: Tensor
    has_text: Tensor

    def blocked(self, rows: slice) -> Tensor:
        """Return the mask of some rows over all columns, bool [rows, M]; no shape depends on the data."""
        with torch.autocast(self.items.device.type, enabled=False):  # limits are exact to 1e-6
            scores = self.queries[rows] @ self.items.T
        return (scores >= self.limits[rows, None]) & self.has_text

    def blocked_of_rows(self, items: Tensor) -> Tensor:
        """Return the mask of each row's own items, given as columns [B, R]; columns below 0 are not masked."""
        places = items.clamp(min=0)
        scores = torch.stack([(self.queries * self.items[column]).sum(1) for column in places.T], 1)
        return (scores >= self.limits[:, None]) & self.has_text[places] & (items >= 0)

    def select(self, columns: Tensor) -> GuardedRows:
        """Return the rule for the same rows and some of the columns, given by number, int64 [M']."""
        return replace(self, items=self.items[columns], has_text=self.has_text[columns])

    def of_rows(self, rows: slice | Tensor) -> GuardedRows:
        """Return the rule for some of the rows and the same columns."""
        return replace(self, queries=self.queries[rows], limits=self.limits[rows])

    def to(self, device: torch.device | str) -> GuardedRows:
        """Return a copy on another device."""
        return GuardedRows(*(one.to(device) for one in (self.queries, self.limits, self.items, self.has_text)))


class Guard(nn.Module):
    """A mask of the candidates that a fixed model g scores at least as high as the positive, up to a margin.

        G(x, y) = { j != y : g(x, j) >= min( g(x, y) - margin, g(x, y) - relative_margin |g(x, y)| ) }

    The mask applies to the candidates of every source, so the target of row (x, y) is the softmax over the catalog
    without G(x, y). This set depends on the row alone and not on the candidates or the towers, so kappa is unchanged
    (docs/theory.md, rule 7) and every pool stays unbiased. A query, positive or item without a text is not compared.
    The guided losses of sentence-transformers (Solatorio 2024, "GISTEmbed") mask in the same way, and also compare
    queries with queries and items with items.

    Checkpoints do not contain the vectors.

    Args:
        queries: unit vectors, or zeros for a query without a text, float32 [Q, D].
        items: the same for the items, float32 [N, D].
        margin: items that score up to this much below the positive are masked too.
        relative_margin: the margin as a share of the positive's score.
    """

    queries: Tensor
    items: Tensor

    def __init__(self, queries: Tensor, items: Tensor, *, margin: float = 0.0, relative_margin: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("queries", queries, persistent=False)
        self.register_buffer("items", items, persistent=False)
        self.register_buffer("has_text", items.abs().amax(1) > 0, persistent=False)
        self.margin, self.relative_margin = margin, relative_margin

    def of_rows(self, request: DrawRequest) -> GuardedRows:
        """Return the selected rows of a request, to be compared with all items.

        Raises:
            InputError: the request has no queries.
        """
        if request.queries is None:
            raise InputError("request.queries: the guard compares the rows' queries; pass DrawRequest(queries=...)")
        has_text = self.get_buffer("has_text")
        query = self.queries[request.queries.clamp(min=0)].masked_fill(request.queries[:, None] < 0, 0.0)
        own = (query * self.items[request.own_positives]).sum(1)
        limit = torch.minimum(own - self.margin, own - self.relative_margin * own.abs()) - _ROUNDING
        is_compared = (query.abs().amax(1) > 0) & has_text[request.own_positives]
        return GuardedRows(query, limit.masked_fill(~is_compared, torch.inf), self.items, has_text)


class RowRules:
    """Several rules combined: a candidate that any of them masks is masked.

    Args:
        rules: such as `EligibleRows` and `GuardedRows`.
    """

    def __init__(self, *rules: RowRule) -> None:
        self.rules = rules

    def blocked(self, rows: slice) -> Tensor:
        """Return the mask of some rows over all columns, bool [rows, M]."""
        return torch.stack([one.blocked(rows) for one in self.rules]).any(0)

    def blocked_of_rows(self, items: Tensor) -> Tensor:
        """Return the mask of each row's own items, given as columns [B, R]."""
        return torch.stack([one.blocked_of_rows(items) for one in self.rules]).any(0)

    def select(self, columns: Tensor) -> RowRules:
        """Return the rule for the same rows and some of the columns, given by number, int64 [M']."""
        return RowRules(*(one.select(columns) for one in self.rules))

    def of_rows(self, rows: slice | Tensor) -> RowRules:
        """Return the rule for some of the rows and the same columns."""
        return RowRules(*(one.of_rows(rows) for one in self.rules))

    def to(self, device: torch.device | str) -> RowRules:
        """Return a copy on another device."""
        return RowRules(*(one.to(device) for one in self.rules))
