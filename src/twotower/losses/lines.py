"""Rows of one query, found so that their logits are computed once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twotower.negatives import Hits

#: Most rows in a line: each is paired with what the others of its line mask.
MOST_ROWS = 16
#: Where more lines than this share of the rows would be left, finding them costs more than it saves.
WORTH_WHILE = 0.9


@dataclass(frozen=True)
class Lines:
    """Rows whose queries are the same, G lines of them.

    The rows of a line differ in nothing but their own items: what else is masked is masked for all. So a line of
    logits serves them all, without the own items of any of them; each row is then given those of the others.
    Rows are sorted by line here, and within a line by the place of their own item.

    Attributes:
        order: the row that stands at each sorted place, int64 [B].
        of: line of each sorted row, int64 [B], ascending.
        first: one row of each line, int64 [G], ascending.
        hits: what is masked for all rows of a line, [G, M]; None for nothing.
        own_line: line of each item that is some row's own and a candidate, once for each line, int64 [E], ascending.
        own_place: its place among the candidates, int64 [E].
        row: sorted rows, int64 [P], ascending; with `other` the pairs of a row and an own item of another.
        other: which of the E it is, int64 [P].
    """

    order: Tensor
    of: Tensor
    first: Tensor
    hits: Hits | None
    own_line: Tensor
    own_place: Tensor
    row: Tensor
    other: Tensor

    def bounds(self, starts: list[int]) -> list[tuple[slice, slice, slice]]:
        """For lines starts[0]:starts[1], starts[1]:starts[2], ...: their sorted rows, own items and pairs."""
        asked = torch.tensor(starts)
        rows = torch.searchsorted(self.of, asked)
        ends = [rows, torch.searchsorted(self.own_line, asked), torch.searchsorted(self.row, rows)]
        found = [[slice(*ends) for ends in pairwise(one.tolist())] for one in ends]
        return list(zip(*found, strict=True))


def find_lines(query: Tensor, hits: Hits | None) -> Lines | None:
    """Lines of rows with the same query; None where little is to be gained, or more than their own items differs.

    Queries are the same where their embeddings are, bit by bit: towers of ids give a query's rows such, those that
    read each row's own history do not.

    Args:
        query: [B, D].
        hits: the first pairs are each row's own item.
    """
    if hits is None or hits.empty is not None or query.device.type != "cpu" or len(query) < 2 or not hits.pairs:
        return None
    rows = torch.arange(len(query))
    (own_row, own), *shared = hits.pairs
    line, first = _lines(query)
    if len(first) > WORTH_WHILE * len(query) or not torch.equal(own_row, rows):
        return None
    like = first[line]
    is_alike = torch.equal(query.index_select(0, like), query) and all(_is_shared(*pairs, like) for pairs in shared)
    place = hits.places(own) if is_alike else None
    if place is None:
        return None
    of_lines = []
    for row, item in shared:
        kept = (like == rows).index_select(0, row).nonzero()[:, 0]
        of_lines.append((line.index_select(0, row.index_select(0, kept)), item.index_select(0, kept)))
    width = hits.size + 1  # the first for an own item that is no candidate
    key, order = torch.sort(line * width + place + 1)
    of, place = key // width, key % width - 1
    is_new = torch.ones_like(of, dtype=torch.bool)
    is_new[1:] = key[1:] != key[:-1]
    is_new &= place >= 0
    # Which own item is each row's; -1 for one that is no candidate.
    entry = torch.where(place >= 0, is_new.cumsum(0) - 1, -1)
    own_line, own_place = of[is_new], place[is_new]
    count = torch.bincount(own_line, minlength=len(first))
    several = count[of]
    row = torch.repeat_interleave(rows, several)
    skipped = several.cumsum(0) - several - (count.cumsum(0) - count)[of]
    other = torch.arange(len(row)) - skipped[row]
    is_other = other != entry[row]
    return Lines(
        order=order,
        of=of,
        first=first,
        hits=Hits(of_lines, rows=len(first), items=hits.items, size=hits.size) if of_lines else None,
        own_line=own_line,
        own_place=own_place,
        row=row[is_other],
        other=other[is_other],
    )


def _lines(query: Tensor) -> tuple[Tensor, Tensor]:
    """(line of each row [B], first row of each line, ascending [G]); unlike rows of one hash may share a line."""
    bits = query.detach().contiguous()
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[query.element_size()]
    bits = bits.view(torch.int64 if query.shape[1] * query.element_size() % 8 == 0 else whole)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    ordered, order = torch.sort((bits * factors).sum(1), stable=True)
    place = torch.arange(len(query))
    is_new = torch.ones_like(place, dtype=torch.bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    since = place - torch.where(is_new, place, 0).cummax(0).values
    is_new |= since % MOST_ROWS == 0
    first, by_first = torch.sort(order[is_new])
    number = torch.empty_like(by_first).scatter_(0, by_first, torch.arange(len(first)))
    line = torch.empty_like(place).scatter_(0, order, number[is_new.cumsum(0) - 1])
    return line, first


def _is_shared(row: Tensor, item: Tensor, like: Tensor) -> bool:
    """Whether each row's items, given as pairs, are those of another row, [B], in the same order."""
    if len(row) == 0:
        return True
    if bool((row[1:] < row[:-1]).any()):
        return False
    ends = torch.searchsorted(row, torch.arange(len(like) + 1))
    starts, count = ends[:-1], ends.diff()
    if not torch.equal(count[like], count):
        return False
    return torch.equal(item.index_select(0, torch.arange(len(row)) + (starts[like] - starts)[row]), item)
