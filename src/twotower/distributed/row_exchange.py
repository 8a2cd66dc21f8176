"""Exchange of rows of shared tables: each rank fetches the rows that a step looks up from the ranks that own them.

A step looks up rows of a table in several places: candidates, positives, histories. The codes are known before any
tower runs, so each rank requests its distinct rows once, and sends the sum of their gradients back once. A row is then
updated once per step, with the gradient that a single process would compute, even if parts of the batch are embedded
twice (gradient cache).

With `RowShard`, a code is sent to the rank that owns the row. With `ColumnShard`, all ranks receive all codes; each
rank sends its columns of these rows, and the requesting rank concatenates the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twotower.distributed.partition import ColumnShard, RowShard, TableShard
from twotower.distributed.row_files import RowBlocks

#: Number of rows assembled at a time when a table is written.
BLOCK = 65_536


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
        asked: the requests.
        rows: float32 [P, D], a leaf tensor that accumulates the gradient of every lookup.
    """

    asked: RowRequest
    rows: Tensor

    def place(self, codes: Tensor) -> Tensor:
        """Return the positions of codes among the fetched rows, int64 of the same shape.

        Raises:
            RuntimeError: a code was not fetched (checked only on the CPU, as the check would stall an accelerator).
        """
        known = self.asked.codes
        place = torch.searchsorted(known, codes)
        if codes.device.type == "cpu" and codes.numel():
            place.clamp_(max=max(len(known) - 1, 0))
            if not len(known) or not torch.equal(known[place], codes):
                raise RuntimeError("lookup of a row of a shared table that was not fetched (internal error)")
        return place


@torch.no_grad()
def request_rows(part: TableShard, codes: Tensor) -> RowRequest:
    """Send the codes that this rank needs, and receive the codes that other ranks need; collective.

    Args:
        part: this rank's part of the table.
        codes: int64, any shape and order, duplicates allowed; may be empty.
    """
    ranks, distinct = part.ranks, torch.unique(codes)
    if isinstance(part, ColumnShard):
        sizes = ranks.sizes(len(distinct), distinct.device)
        return RowRequest(distinct, ranks.gather(distinct, sizes), [len(distinct)] * ranks.size, sizes)
    edges = torch.tensor(part.bounds[1:-1], device=distinct.device)
    places = [0, *torch.searchsorted(distinct, edges).tolist(), len(distinct)]
    sent = [stop - start for start, stop in pairwise(places)]
    received = ranks.swap(torch.tensor(sent, device=distinct.device)).tolist()
    return RowRequest(distinct, ranks.swap(distinct, sent, received) - part.own.start, sent, received)


@torch.no_grad()
def fetch_rows(weight: Tensor, part: TableShard, asked: RowRequest) -> FetchedRows:
    """Fetch the requested rows; collective.

    Args:
        weight: weights of this rank's part, [n, D] by rows or [N, d] by columns.
        part: this rank's part of the table.
        asked: the requests.
    """
    ranks, own = part.ranks, weight.index_select(0, asked.given)
    if isinstance(part, RowShard):
        rows = ranks.swap(own, asked.received, asked.sent)
    else:
        widths, count = _widths(part), len(asked.codes)
        sent = [number * weight.shape[1] for number in asked.received]
        found = ranks.swap(own.view(-1), sent, [count * width for width in widths])
        parts = torch.split(found, [count * width for width in widths])
        rows = torch.cat([one.view(count, width) for one, width in zip(parts, widths, strict=True)], 1)
    return FetchedRows(asked, rows.float().requires_grad_())


@torch.no_grad()
def scatter_gradients(fetched: FetchedRows, part: TableShard) -> tuple[Tensor, Tensor]:
    """Send the gradients of fetched rows back to the ranks that own them; collective.

    Returns:
        Rows of this rank's part, int64 [G], repeated if several ranks looked up the same row; and their gradients,
        float32 [G, D], or [G, d] by columns.
    """
    ranks, asked, found = part.ranks, fetched.asked, fetched.rows.grad
    gradient = torch.zeros_like(fetched.rows) if found is None else found
    if isinstance(part, RowShard):
        return asked.given, ranks.swap(gradient, asked.sent, asked.received)
    widths, own = _widths(part), part.own.stop - part.own.start
    every = torch.cat([columns.reshape(-1) for columns in torch.split(gradient, widths, 1)])
    sent = [len(asked.codes) * width for width in widths]
    values = ranks.swap(every, sent, [number * own for number in asked.received])
    return asked.given, values.view(len(asked.given), own)


def run_of_rows(weight: Tensor, part: TableShard | None) -> Tensor | RowBlocks:
    """Return this rank's range of whole rows of a table, to be written to one file by all ranks (`save_rows`).

    With `RowShard`, this range is the part itself. With `ColumnShard`, the rows are fetched block by block, so no rank
    has more than one block in memory. A tensor that is not a part is returned unchanged.
    """
    if not isinstance(part, ColumnShard):
        return weight
    run = RowShard(part.ranks, part.rows)

    def blocks() -> Iterator[Tensor]:
        for begin in range(0, run.bounds[1], BLOCK):  # bounds[1]: number of rows of the rank with the most rows
            start = min(run.own.start + begin, run.own.stop)
            codes = torch.arange(start, min(start + BLOCK, run.own.stop), device=weight.device)
            yield fetch_rows(weight, part, request_rows(part, codes)).rows.detach().to(weight.dtype)

    return RowBlocks(len(run), part.width, weight.dtype, blocks)


def _widths(part: ColumnShard) -> list[int]:
    """Return the number of columns of each rank."""
    return [stop - start for start, stop in pairwise(part.bounds)]
