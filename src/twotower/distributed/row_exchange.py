"""Exchange of rows of shared tables: each rank fetches the rows that a step looks up from the ranks that own them.

A step looks up rows of a table in several places: candidates, positives, histories. The codes are known before any
tower runs, so each rank requests its distinct rows once, and sends the sum of their gradients back once. A row is then
updated once per step, with the gradient that a single process would compute, even if parts of the batch are embedded
twice (gradient cache).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twotower.distributed.partition import RowShard


@dataclass(frozen=True)
class RowRequest:
    """The requests of all ranks for rows of a shared table, as seen by this rank.

    Attributes:
        codes: codes that this rank requests, int64 [P], ascending and distinct.
        given: rows of this rank's part to send, in the order of the requesting ranks, int64 [G].
        sent: number of codes that this rank requests from each rank.
        received: number of codes that each rank requests from this rank.
    """

    codes: Tensor
    given: Tensor
    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class FetchedRows:
    """Rows of a shared table that this rank has fetched.

    Attributes:
        codes: the code of each row, int64 [P], ascending and distinct.
        rows: float32 [P, D], a leaf tensor that accumulates the gradient of every lookup.
        asked: the requests of all ranks; None if TorchRec fetched the rows.
    """

    codes: Tensor
    rows: Tensor
    asked: RowRequest | None

    def place(self, codes: Tensor) -> Tensor:
        """Return the positions of codes among the fetched rows, int64 of the same shape.

        Raises:
            RuntimeError: a code was not fetched (checked only on the CPU, as the check would stall an accelerator).
        """
        known = self.codes
        place = torch.searchsorted(known, codes)
        if codes.device.type == "cpu" and codes.numel():
            place.clamp_(max=max(len(known) - 1, 0))
            if not len(known) or not torch.equal(known[place], codes):
                raise RuntimeError("a row of a shared table was looked up but not fetched (internal error)")
        return place


@torch.no_grad()
def request_rows(part: RowShard, codes: Tensor) -> RowRequest:
    """Send the codes that this rank needs, and receive the codes that other ranks need; collective.

    Args:
        part: this rank's part of the table.
        codes: int64, any shape and order, duplicates allowed; may be empty.
    """
    ranks, distinct = part.ranks, torch.unique(codes)
    edges = torch.tensor(part.bounds[1:-1], device=distinct.device)
    places = [0, *torch.searchsorted(distinct, edges).tolist(), len(distinct)]
    sent = [stop - start for start, stop in pairwise(places)]
    received = ranks.swap(torch.tensor(sent, device=distinct.device)).tolist()
    return RowRequest(distinct, ranks.swap(distinct, sent, received) - part.own.start, sent, received)


@torch.no_grad()
def fetch_rows(weight: Tensor, part: RowShard, asked: RowRequest) -> FetchedRows:
    """Fetch the requested rows; collective.

    Args:
        weight: weights of this rank's part, [n, D].
        part: this rank's part of the table.
        asked: the requests.
    """
    rows = part.ranks.swap(weight.index_select(0, asked.given), asked.received, asked.sent)
    return FetchedRows(asked.codes, rows.float().requires_grad_(), asked)


@torch.no_grad()
def scatter_gradients(fetched: FetchedRows, part: RowShard) -> tuple[Tensor, Tensor]:
    """Send the gradients of fetched rows back to the ranks that own them; collective.

    Returns:
        Rows of this rank's part, int64 [G], repeated if several ranks looked up the same row; and their gradients,
        float32 [G, D].
    """
    asked, found = fetched.asked, fetched.rows.grad
    assert asked is not None
    gradient = torch.zeros_like(fetched.rows) if found is None else found
    return asked.given, part.ranks.swap(gradient, asked.sent, asked.received)
