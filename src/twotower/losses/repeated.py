"""The tiled softmax for repeated queries: rows with the same query share one line of logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.losses.forms import Softmax, SoftmaxSums, row_sums
from twotower.losses.lines import Lines
from twotower.losses.tiles import tile_starts
from twotower.losses.tiling import Run, Task


class RepeatedRun(Run):
    """One evaluation with one line of logits per query, for logits that need no row maximum subtracted.

    A line's sum leaves out the own items of all its rows; each row then adds the own items of the other rows:

        Z_b = sum_{j masked for no row of the line} w_j exp s_j + sum_{own items j of other rows} w_j exp s_j

    Nothing is subtracted, so nothing cancels. The gradient with respect to the candidates is one product as well: at an
    own item the line contains its exponential times the share of the line's weight that belongs to rows with other own
    items. Products, exponentials and sums are computed per line. `base` is None if the logits are too large for this.
    """

    sums: SoftmaxSums

    def __init__(self, lines: Lines, *, scaled: Tensor, positive: Tensor | None, task: Task, **inputs: Any) -> None:
        self.lines = lines

        def sort(one: Tensor | None) -> Tensor | None:
            return None if one is None else one.index_select(0, lines.order)

        assert isinstance(task.form, Softmax)
        task = replace(
            task,
            form=Softmax(sort(task.form.log_left)),
            hits=lines.hits,
            weights=task.weights.index_select(0, lines.order),
            row_offset=sort(task.row_offset),
            own_offset=sort(task.own_offset),
            own_places=sort(task.own_places),
        )
        super().__init__(scaled=scaled.index_select(0, lines.first), positive=sort(positive), task=task, **inputs)
        starts = tile_starts(len(self.scaled), len(self.candidates), self.scaled)
        self.bounds = dict(zip(starts, lines.bounds(starts), strict=False))
        # Per line, per own item of a line, per row: see `Lines`.
        self.line_sums = scaled.new_zeros(len(lines.first))
        self.exponentials = scaled.new_zeros(len(lines.own_line))
        self.of_others = scaled.new_zeros(len(lines.own_line))
        self.scales = scaled.new_zeros(len(lines.of))

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

    def _by_query(self) -> Tensor:
        lines = self.lines
        place = lines.own_place.index_select(0, lines.other)
        starts = torch.searchsorted(lines.row, torch.arange(len(lines.of)))
        by_query = F.embedding_bag(
            place,
            self.weighted,
            starts,
            mode="sum",
            per_sample_weights=self.exponentials.index_select(0, lines.other),
        )
        return by_query.add_(self._of_rows(self.by_scaled)).mul_(self.scales[:, None])

    def _complete(self, by_own: Tensor) -> None:
        super()._complete(by_own)
        order = self.lines.order
        self.by_query = torch.empty_like(self.by_query).index_copy_(0, order, self.by_query)
        self.by_positive = torch.empty_like(self.by_positive).index_copy_(0, order, self.by_positive)

    def _own_in(self, part: slice, cols: slice, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lines' own items that are in a block, int64 [E'], and their places in its memory."""
        _, owns, _ = self.bounds[part.start]
        line, place = self.lines.own_line[owns] - part.start, self.lines.own_place[owns] - cols.start
        own = torch.arange(owns.start, owns.stop)
        if block.shape[1] < len(self.candidates):
            inside = ((place >= 0) & (place < block.shape[1])).nonzero()[:, 0]
            line, place, own = line[inside], place[inside], own[inside]
        return own, line * block.shape[1] + place
