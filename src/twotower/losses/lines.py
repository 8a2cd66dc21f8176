"""Detection of rows with the same query, so that their logits are computed once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twotower.negatives import Hits

#: Maximum number of rows per line: each row is paired with the own items of the line's other rows.
MOST_ROWS = 16
#: If more lines than this share of the rows remain, finding them costs more than it saves.
WORTH_WHILE = 0.9


@dataclass(frozen=True)
class Lines:
    """Rows grouped by query into G lines.

    The rows of a line have the same query and differ only in their own item (the positive): everything else is masked
    alike. One line of logits, without the own items of its rows, therefore serves all of them; each row then adds the
    own items of the others. Rows are sorted by line here, and within a line by the place of their own item.

    Attributes:
        order: the row at each sorted position, int64 [B].
        of: line of each sorted row, int64 [B], ascending.
        first: one row of each line, int64 [G], ascending.
        hits: what is masked for all rows of a line, [G, M]; None for nothing.
        own_line: line of each own item that is a candidate, once per line, int64 [E], ascending.
        own_place: its position among the candidates, int64 [E].
        row: sorted rows, int64 [P], ascending; with `other`, the pairs of a row and another row's own item.
        other: index of that own item among the E, int64 [P].
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
        """Return, for lines starts[0]:starts[1], starts[1]:starts[2], ..., their sorted rows, own items and pairs."""
        edges = torch.tensor(starts)
        rows = torch.searchsorted(self.of, edges)
        ends = [rows, torch.searchsorted(self.own_line, edges), torch.searchsorted(self.row, rows)]
        found = [[slice(*ends) for ends in pairwise(one.tolist())] for one in ends]
        return list(zip(*found, strict=True))


def find_lines(query: Tensor, hits: Hits | None) -> Lines | None:
    """Group rows by query; None if there is little to gain, or if rows differ in more than their own item.

    Queries are the same if their embeddings are equal bit by bit. That happens with towers that read only ids or
    features, not with towers that read each row's own history.

    Args:
        query: [B, D].
        hits: the mask; its first pairs are each row's own item.
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
    width = hits.size + 1  # the first place is for an own item that is not a candidate
    key, order = torch.sort(line * width + place + 1)
    of, place = key // width, key % width - 1
    is_new = torch.ones_like(of, dtype=torch.bool)
    is_new[1:] = key[1:] != key[:-1]
    is_new &= place >= 0
    # Index of each row's own item; -1 if it is not a candidate.
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
    """Return (line of each row [B], first row of each line, ascending [G]); hash collisions may mix different rows."""
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
    """Test whether each row has the same items, given as pairs, in the same order, as the row `like[row]`, [B]."""
    if len(row) == 0:
        return True
    if bool((row[1:] < row[:-1]).any()):
        return False
    ends = torch.searchsorted(row, torch.arange(len(like) + 1))
    starts, count = ends[:-1], ends.diff()
    if not torch.equal(count[like], count):
        return False
    return torch.equal(item.index_select(0, torch.arange(len(row)) + (starts[like] - starts)[row]), item)
