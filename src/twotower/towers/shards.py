"""Tables that no process holds whole: every rank has a run of the rows, and fetches those that a step looks up.

A step looks up one table in several places: candidates, positives, histories. Its codes are known before any tower
runs, so each rank asks for its distinct rows once, and hands back the sum of their gradients once. A row then moves
once a step, by the gradient that one process would have, whatever was embedded again on the way (gradient cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from twotower.ranks import Ranks

#: Numbers drawn at once for a part: a multiple of 16.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """The rows of a table that this rank holds: ceil(N / W) in a run, fewer or none on the last ranks.

    Attributes:
        ranks: the processes that share the table.
        rows: N, of the whole table.
    """

    ranks: Ranks
    rows: int

    @property
    def bounds(self) -> list[int]:
        """Where each rank's rows begin, and N: W + 1 numbers."""
        each = -(-self.rows // self.ranks.size)
        return [min(rank * each, self.rows) for rank in range(self.ranks.size + 1)]

    @property
    def own(self) -> slice:
        """This rank's rows."""
        bounds = self.bounds
        return slice(bounds[self.ranks.rank], bounds[self.ranks.rank + 1])

    def __len__(self) -> int:
        """How many rows this rank holds."""
        bounds = self.bounds
        return bounds[self.ranks.rank + 1] - bounds[self.ranks.rank]


@dataclass(frozen=True)
class _Sharing:
    ranks: Ranks
    above: int


_sharing: ContextVar[_Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def shared_tables(ranks: Ranks, *, above: int = 0) -> Iterator[None]:
    """Id tables made in the block with more rows than `above` are held by parts; a process alone holds all it makes."""
    token = _sharing.set(None if ranks.size == 1 else _Sharing(ranks, above))
    try:
        yield
    finally:
        _sharing.reset(token)


def part_of(rows: int) -> Part | None:
    """The part of a table made here and now that this rank is to hold; None for the whole table."""
    sharing = _sharing.get()
    return None if sharing is None or rows <= sharing.above else Part(sharing.ranks, rows)


@dataclass(frozen=True)
class RowsAtHand:
    """Rows of a shared table that this rank has fetched.

    Attributes:
        codes: int64 [P], ascending and distinct.
        rows: float32 [P, D], a leaf that collects the gradient of every lookup.
        given: numbers, within this rank's part, of the rows that it has given to all ranks, in their order; int64 [G].
        sent, received: how many codes this rank asked each rank for, and each rank this one.
    """

    codes: Tensor
    rows: Tensor
    given: Tensor
    sent: list[int]
    received: list[int]

    def place(self, codes: Tensor) -> Tensor:
        """Where codes stand among the fetched rows, int64 of the same shape.

        Raises:
            RuntimeError: one of them was not fetched (looked at on a CPU alone: an accelerator would be waited for).
        """
        place = torch.searchsorted(self.codes, codes)
        if codes.device.type == "cpu" and codes.numel():
            place.clamp_(max=max(len(self.codes) - 1, 0))
            if not len(self.codes) or not torch.equal(self.codes[place], codes):
                raise RuntimeError("a row of a shared table is looked up that was not fetched")
        return place


@torch.no_grad()
def fetch_rows(weight: Tensor, part: Part, codes: Tensor, place: Tensor | None = None) -> RowsAtHand:
    """Fetch rows of a shared table from the ranks that hold them; collective.

    Args:
        weight: this rank's rows, [n, D].
        part: which rows of the table these are.
        codes: int64, any shape, any order, with copies; may be empty.
        place: which of this rank's rows each of its codes has, int64 [n]; in their order where None.
    """
    ranks = part.ranks
    distinct = torch.unique(codes)
    edges = torch.tensor(part.bounds[1:-1], device=distinct.device)
    places = [0, *torch.searchsorted(distinct, edges).tolist(), len(distinct)]
    sent = [stop - start for start, stop in pairwise(places)]
    received = ranks.swap(torch.tensor(sent, device=distinct.device)).tolist()
    given = ranks.swap(distinct, sent, received) - part.own.start
    given = given if place is None else place[given]
    rows = ranks.swap(weight.index_select(0, given), received, sent).float()
    return RowsAtHand(distinct, rows.requires_grad_(), given, sent, received)


@torch.no_grad()
def hand_back(at_hand: RowsAtHand, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Give every rank the gradients of the rows it has given; collective.

    Returns:
        Numbers of rows within this rank's part, int64 [G], with copies where several ranks looked up the same one; and
        their gradients, float32 [G, D].
    """
    found = at_hand.rows.grad
    gradient = torch.zeros_like(at_hand.rows) if found is None else found
    return at_hand.given, ranks.swap(gradient, at_hand.sent, at_hand.received)


def fill_normal(weight: Tensor, scale: float, part: Part | None = None) -> None:
    """N(0, scale^2) in place; a part gets the very numbers that its rows would have in the whole table.

    A rank without the whole table draws all of its numbers too, a block at a time, and keeps its own: the generator
    cannot jump. It ends in the state it would have after the whole table.
    """
    if part is None:
        nn.init.normal_(weight, std=scale)
        return
    width = weight.shape[1]
    total, own = part.rows * width, slice(part.own.start * width, part.own.stop * width)
    flat = weight.detach().view(-1)
    start = 0
    while start < total:
        # torch draws 16 numbers together, and the last 16 of a tensor anew where 16 does not divide it.
        stop = start + BLOCK if total - start >= BLOCK + 16 else total
        block = torch.empty(stop - start, dtype=torch.float32).normal_(std=scale)
        left, right = max(start, own.start), min(stop, own.stop)
        if left < right:
            flat[left - own.start : right - own.start] = block[left - start : right - start].to(flat.device)
        start = stop
