"""The tiled softmax for repeated queries: rows with the same query share one line of logits.

`find_repeated` groups the rows of a batch by query; `RepeatedEvaluation` computes each group's logits once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.losses.tiled.blocks import tile_starts
from twotower.losses.tiled.evaluation import TiledEvaluation
from twotower.losses.tiled.forms import SoftmaxSums, TiledSoftmax, row_sums
from twotower.losses.tiled.inputs import LossInputs
from twotower.negatives import NegativeMask

#: Maximum number of rows per line: each row is paired with the own items of the line's other rows.
MOST_ROWS = 16
#: If more lines than this share of the rows remain, finding them costs more than it saves.
WORTH_WHILE = 0.9


@dataclass(frozen=True)
class RepeatedQueries:
    """Rows grouped by query into G lines.

    The rows of a line have the same query and differ only in their own item (the positive); everything else that is
    masked is the same. They therefore share one line of logits, without the own items of any of them, and each row adds
    the own items of the other rows. Rows are sorted by line, and within a line by the place of their own item.

    Attributes:
        order: the row at each sorted position, int64 [B].
        of: line of each sorted row, int64 [B], ascending.
        first: one row of each line, int64 [G], ascending.
        mask: the mask that all rows of a line share, [G, M]; None if nothing is masked.
        own_line: line of each own item that is a candidate, once per line, int64 [E], ascending.
        own_place: its position among the candidates, int64 [E].
        row: sorted rows, int64 [P], ascending; with `other`, the pairs of a row and another row's own item.
        other: index of that own item among the E, int64 [P].
    """

    order: Tensor
    of: Tensor
    first: Tensor
    mask: NegativeMask | None
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


def find_repeated(query: Tensor, mask: NegativeMask | Tensor | None) -> RepeatedQueries | None:
    """Group rows by query; return None if there is little to gain, or if rows differ in more than their own item.

    Queries are the same if their embeddings are bitwise equal. That happens with towers that read only ids or features,
    not with towers that read each row's own history.

    Args:
        query: query embeddings, [B, D].
        mask: the mask; its first pairs are each row's own item.
    """
    if (
        not isinstance(mask, NegativeMask)
        or mask.empty is not None
        or mask.eligible is not None  # rows of one query may be in different groups or at different times
        or query.device.type != "cpu"
        or len(query) < 2
        or not mask.pairs
    ):
        return None
    rows = torch.arange(len(query))
    (own_row, own), *shared = mask.pairs
    line, first = _lines(query)
    if len(first) > WORTH_WHILE * len(query) or not torch.equal(own_row, rows):
        return None
    like = first[line]
    is_alike = torch.equal(query.index_select(0, like), query) and all(_is_shared(*pairs, like) for pairs in shared)
    place = mask.places(own) if is_alike else None
    if place is None:
        return None
    of_lines = []
    for row, item in shared:
        kept = (like == rows).index_select(0, row).nonzero()[:, 0]
        of_lines.append((line.index_select(0, row.index_select(0, kept)), item.index_select(0, kept)))
    width = mask.size + 1  # the first place is for an own item that is not a candidate
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
    return RepeatedQueries(
        order=order,
        of=of,
        first=first,
        mask=NegativeMask(of_lines, rows=len(first), items=mask.items, size=mask.size) if of_lines else None,
        own_line=own_line,
        own_place=own_place,
        row=row[is_other],
        other=other[is_other],
    )


def _lines(query: Tensor) -> tuple[Tensor, Tensor]:
    """Return (line of each row [B], first row of each line, ascending [G]); a hash collision may merge two queries."""
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


class RepeatedEvaluation(TiledEvaluation):
    """An evaluation with one line of logits per query, for logits so small that no row maximum is subtracted.

    A line's sum leaves out the own items of all its rows; each row then adds the own items of the other rows:

        Z_b = sum_{j masked for no row of the line} w_j exp s_j + sum_{own items j of other rows} w_j exp s_j

    Nothing is subtracted, so nothing cancels. The gradient with respect to the candidates is also one product: at an
    own item the line contains its exponential times the share of the line's weight that belongs to rows with different
    own items. Products, exponentials and sums are computed per line. `base` is None if the logits are too large.
    """

    sums: SoftmaxSums

    def __init__(self, lines: RepeatedQueries, form: TiledSoftmax, inputs: LossInputs, *, needs_grad: bool) -> None:
        self.lines = lines

        def sort(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_select(0, lines.order)

        by_line = replace(
            inputs,
            query=inputs.query.index_select(0, lines.first),
            positive=sort(inputs.positive),
            positive_places=sort(inputs.positive_places),
            mask=lines.mask,
            weights=sort(inputs.weights),
            row_offset=sort(inputs.row_offset),
            own_offset=sort(inputs.own_offset),
        )
        super().__init__(TiledSoftmax(sort(form.log_left)), by_line, needs_grad=needs_grad)
        starts = tile_starts(len(self.scaled), len(self.candidates), self.scaled)
        self.bounds = dict(zip(starts, lines.bounds(starts), strict=False))
        # Per line, per own item of a line, per row: see `RepeatedQueries`.
        self.line_sums = self.scaled.new_zeros(len(lines.first))
        self.exponentials = self.scaled.new_zeros(len(lines.own_line))
        self.of_others = self.scaled.new_zeros(len(lines.own_line))
        self.scales = self.scaled.new_zeros(len(lines.of))

    def _of_rows(self, by_line: Tensor) -> Tensor:
        return by_line.index_select(0, self.lines.of)

    def _visit(self, part: slice, cols: slice, block: Tensor) -> None:
        own, place = self._own_in(part, cols, block)
        # An own item that is masked for the whole line is already 0 here.
        self.exponentials.index_copy_(0, own, block.view(-1).index_select(0, place))
        block.view(-1).index_fill_(0, place, 0.0)
        self.line_sums[part] += row_sums(block, None if self.weight is None else self.weight[cols])

    def _weights_of_lines(self, part: slice) -> Tensor:
        lines = self.lines
        rows, owns, pairs = self.bounds[part.start]
        row, other = lines.row[pairs], lines.other[pairs]
        exponentials = self.exponentials[owns]
        if self.weight is not None:
            exponentials = exponentials * self.weight.index_select(0, lines.own_place[owns])
        total = self.line_sums.index_select(0, lines.of[rows])
        total.index_add_(0, row - rows.start, exponentials.index_select(0, other - owns.start))
        self.sums.add(rows, total)
        scales = self.sums.scale(rows) * self.row_weights[rows]
        self.scales[rows] = scales
        weights = torch.zeros_like(self.line_sums[part]).index_add_(0, lines.of[rows] - part.start, scales)
        of_others = torch.zeros_like(exponentials)
        of_others.index_add_(0, other - owns.start, scales.index_select(0, row - rows.start))
        of_others /= weights.index_select(0, lines.own_line[owns] - part.start)
        self.of_others[owns] = of_others.nan_to_num_(0.0)  # a line without weight
        return weights

    def _make_whole(self, part: slice, cols: slice, block: Tensor) -> None:
        own, place = self._own_in(part, cols, block)
        back = self.exponentials.index_select(0, own) * self.of_others.index_select(0, own)
        block.view(-1).index_copy_(0, place, back)

    def _query_grad(self) -> Tensor:
        lines = self.lines
        place = lines.own_place.index_select(0, lines.other)
        starts = torch.searchsorted(lines.row, torch.arange(len(lines.of)))
        query_grad = F.embedding_bag(
            place,
            self.weighted,
            starts,
            mode="sum",
            per_sample_weights=self.exponentials.index_select(0, lines.other),
        )
        return query_grad.add_(self._of_rows(self.scaled_grad)).mul_(self.scales[:, None])

    def _complete(self, own_grad: Tensor) -> None:
        super()._complete(own_grad)
        order = self.lines.order
        self.query_grad = torch.empty_like(self.query_grad).index_copy_(0, order, self.query_grad)
        self.positive_grad = torch.empty_like(self.positive_grad).index_copy_(0, order, self.positive_grad)

    def _own_in(self, part: slice, cols: slice, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lines' own items that are in a block, int64 [E'], and their places in its memory."""
        _, owns, _ = self.bounds[part.start]
        line, place = self.lines.own_line[owns] - part.start, self.lines.own_place[owns] - cols.start
        own = torch.arange(owns.start, owns.stop)
        if block.shape[1] < len(self.candidates):
            inside = ((place >= 0) & (place < block.shape[1])).nonzero()[:, 0]
            line, place, own = line[inside], place[inside], own[inside]
        return own, line * block.shape[1] + place
