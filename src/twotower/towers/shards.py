"""Tables that no process holds whole: every rank fetches the rows that a step looks up from those that have them.

A step looks up one table in several places: candidates, positives, histories. Its codes are known before any tower
runs, so each rank asks for its distinct rows once, and hands back the sum of their gradients once. A row then moves
once a step, by the gradient that one process would have, whatever was embedded again on the way (gradient cache).

By rows (`Rows`) a code goes to the rank that has its row. By columns (`Columns`) the codes of all ranks go to all, each
gives its columns of their rows, and whoever has asked puts them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twotower.shared_files import RowBlocks
from twotower.towers.parts import Columns, Part, Rows

#: Rows put together at once where a table is written.
BLOCK = 65_536


@dataclass(frozen=True)
class Asked:
    """Who asks whom for which rows of a shared table.

    Attributes:
        codes: what this rank asks for, int64 [P], ascending and distinct.
        given: rows of this rank's part that it gives, those for each rank in the order of ranks; int64 [G].
        sent, received: how many codes this rank asked each rank for, and each rank this one.
    """

    codes: Tensor
    given: Tensor
    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class RowsAtHand:
    """Rows of a shared table that this rank has fetched.

    Attributes:
        asked: who has asked whom.
        rows: float32 [P, D], a leaf that collects the gradient of every lookup.
    """

    asked: Asked
    rows: Tensor

    def place(self, codes: Tensor) -> Tensor:
        """Where codes stand among the fetched rows, int64 of the same shape.

        Raises:
            RuntimeError: one of them was not fetched (looked at on a CPU alone: an accelerator would be waited for).
        """
        known = self.asked.codes
        place = torch.searchsorted(known, codes)
        if codes.device.type == "cpu" and codes.numel():
            place.clamp_(max=max(len(known) - 1, 0))
            if not len(known) or not torch.equal(known[place], codes):
                raise RuntimeError("a row of a shared table is looked up that was not fetched")
        return place


@torch.no_grad()
def ask(part: Part, codes: Tensor) -> Asked:
    """Tell the ranks which rows this one needs, and learn which of its own they need; collective.

    Args:
        part: what this rank holds of the table.
        codes: int64, any shape, any order, with copies; may be empty.
    """
    ranks, distinct = part.ranks, torch.unique(codes)
    if isinstance(part, Columns):
        sizes = ranks.sizes(len(distinct), distinct.device)
        return Asked(distinct, ranks.gather(distinct, sizes), [len(distinct)] * ranks.size, sizes)
    edges = torch.tensor(part.bounds[1:-1], device=distinct.device)
    places = [0, *torch.searchsorted(distinct, edges).tolist(), len(distinct)]
    sent = [stop - start for start, stop in pairwise(places)]
    received = ranks.swap(torch.tensor(sent, device=distinct.device)).tolist()
    return Asked(distinct, ranks.swap(distinct, sent, received) - part.own.start, sent, received)


@torch.no_grad()
def fetch_rows(weight: Tensor, part: Part, asked: Asked) -> RowsAtHand:
    """Fetch what was asked for; collective.

    Args:
        weight: this rank's part, [n, D] by rows and [N, d] by columns.
        part: which part of the table this is.
        asked: for which rows.
    """
    ranks, own = part.ranks, weight.index_select(0, asked.given)
    if isinstance(part, Rows):
        rows = ranks.swap(own, asked.received, asked.sent)
    else:
        widths, count = _widths(part), len(asked.codes)
        sent = [number * weight.shape[1] for number in asked.received]
        found = ranks.swap(own.view(-1), sent, [count * width for width in widths])
        parts = torch.split(found, [count * width for width in widths])
        rows = torch.cat([one.view(count, width) for one, width in zip(parts, widths, strict=True)], 1)
    return RowsAtHand(asked, rows.float().requires_grad_())


@torch.no_grad()
def hand_back(at_hand: RowsAtHand, part: Part) -> tuple[Tensor, Tensor]:
    """Give every rank the gradients of the rows it has given; collective.

    Returns:
        Rows of this rank's part, int64 [G], with copies where several ranks looked up the same one; and their
        gradients, float32 [G, D], or [G, d] by columns.
    """
    ranks, asked, found = part.ranks, at_hand.asked, at_hand.rows.grad
    gradient = torch.zeros_like(at_hand.rows) if found is None else found
    if isinstance(part, Rows):
        return asked.given, ranks.swap(gradient, asked.sent, asked.received)
    widths, own = _widths(part), part.own.stop - part.own.start
    every = torch.cat([columns.reshape(-1) for columns in torch.split(gradient, widths, 1)])
    sent = [len(asked.codes) * width for width in widths]
    values = ranks.swap(every, sent, [number * own for number in asked.received])
    return asked.given, values.view(len(asked.given), own)


def run_of_rows(weight: Tensor, part: Part | None) -> Tensor | RowBlocks:
    """A table as a rank writes it into one file with the others (`save_rows`): a run of whole rows.

    By rows that is the part itself. By columns the rows are fetched, so that no rank ever has more than a block
    of them. A tensor that is no part is given back as it is.
    """
    if not isinstance(part, Columns):
        return weight
    run = Rows(part.ranks, part.rows)

    def blocks() -> Iterator[Tensor]:
        for begin in range(0, run.bounds[1], BLOCK):  # of the rank with most
            start = min(run.own.start + begin, run.own.stop)
            codes = torch.arange(start, min(start + BLOCK, run.own.stop), device=weight.device)
            yield fetch_rows(weight, part, ask(part, codes)).rows.detach().to(weight.dtype)

    return RowBlocks(len(run), part.width, weight.dtype, blocks)


def _widths(part: Columns) -> list[int]:
    """How many columns each rank has."""
    return [stop - start for start, stop in pairwise(part.bounds)]
