"""How a loss is evaluated tile by tile: some rows against all candidates at a time, in one buffer used again and again.

The gradients are taken on the way: what a tile gives to the query, the positive, the candidates, the temperature and
the bias is known once its rows' losses are, because the weight of each row in the mean is given beforehand. So nothing
is computed twice, and no matrix [B, M] is kept. docs/performance.md tells what it costs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from twotower.losses.forms import Form
from twotower.negatives import Hits

#: Most memory of the tile, bytes.
TILE_MEMORY = 256 << 20
#: On CPU a tile of this many numbers, and within it blocks of that many: what is computed is still in the caches when
#: it is read again (measured: benchmarks/step.py --tiles).
TILE_NUMBERS = 1 << 21
BLOCK_NUMBERS = 1 << 19
#: Where every logit is this near to zero, and weights of candidates within the range of float32, exponentials need no
#: row maximum taken out first.
SAFE_LOGIT = 50.0
SAFE_RANGE = 80.0

_workspace = threading.local()


@dataclass
class Task:
    """What a tiled loss needs beside the tensors that it gives gradients to.

    Attributes:
        form: the loss of a tile.
        weights: of each row in the sum that is returned, [B].
        log_count: subtracted from the shared candidates' logits, [M]; None for nothing.
        hits: masked places of the shared candidates.
        row_log_count: subtracted from the row candidates' logits, [B, R].
        row_hits: bool [B, R].
        row_offset: a further number subtracted from every candidate's logit in a row, [B].
        own_offset: subtracted from the positive's logit, [B].
        own_places: int64 [B], where the positives stand among the candidates, which then take their gradient.
        low_precision: products in bfloat16, sums in float32.
    """

    form: Form
    weights: Tensor
    log_count: Tensor | None = None
    hits: Hits | None = None
    row_log_count: Tensor | None = None
    row_hits: Tensor | None = None
    row_offset: Tensor | None = None
    own_offset: Tensor | None = None
    own_places: Tensor | None = None
    low_precision: bool = False


#: What gradients are given to: query, positive, candidates, row candidates, temperature, bias.
Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]


class Tiled(torch.autograd.Function):
    """`apply(task, *inputs)` gives the weighted sum of the rows' losses; gradients are taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, task: Task, *inputs: Any) -> Tensor:
        """Value and gradients at once."""
        total, ctx.gradients = evaluate(inputs, task, wanted=any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs)
        ctx.task = task
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the sum."""
        (grad,) = grads
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second pass through a graph that was kept: the first gave the gradients away
            _, gradients = evaluate(ctx.saved_tensors, ctx.task, wanted=True)
        # On an accelerator the number would have to be awaited.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            gradients = [None if one is None else one * grad.to(one.dtype) for one in gradients]
        needed = ctx.needs_input_grad[1:]
        return (None, *(one if wants else None for one, wants in zip(gradients, needed, strict=True)))


def evaluate(inputs: Inputs, task: Task, *, wanted: bool) -> tuple[Tensor, list[Tensor | None]]:
    """The weighted sum, and its gradients by the inputs where they are wanted."""
    query, positive, candidates, row_candidates, temperature, bias = inputs
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False), _products(low=task.low_precision):
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        run = _Run(
            scaled=query.to(dtype) / temperature.to(dtype),
            positive=None if positive is None else positive.to(dtype),
            candidates=candidates.to(dtype),
            rows=None if row_candidates is None else row_candidates.to(dtype),
            bias=None if bias is None else bias.to(dtype),
            task=task,
            wanted=wanted,
        )
        losses = run.losses()
        total = (task.weights.to(dtype) * losses).sum()
        if not wanted:
            return total, []
        # The logit is a product of scaled query and item: its gradient by T is - <dL/dscaled, scaled> / T.
        by_temperature = -(run.by_scaled * run.scaled).sum() / temperature.to(dtype)
        given: list[Tensor | None] = [
            run.by_scaled.div_(temperature.to(dtype)),
            run.by_positive if positive is not None else None,
            run.by_candidates,
            run.by_rows,
            by_temperature.reshape(temperature.shape),
            None if bias is None else run.by_bias.reshape(bias.shape),
        ]
        return total, [None if g is None or i is None else g.to(i.dtype) for g, i in zip(given, inputs, strict=True)]


class _Run:
    """One evaluation: its inputs in the precision of the sums, and the gradients as they gather."""

    def __init__(
        self,
        *,
        scaled: Tensor,
        positive: Tensor | None,
        candidates: Tensor,
        rows: Tensor | None,
        bias: Tensor | None,
        task: Task,
        wanted: bool,
    ) -> None:
        self.scaled, self.positive, self.candidates, self.rows = scaled, positive, candidates, rows
        self.bias, self.task, self.wanted = bias, task, wanted
        self.by_scaled = torch.empty_like(scaled)
        self.by_positive = torch.empty_like(scaled)
        self.by_candidates = torch.empty_like(candidates) if wanted else candidates.new_empty(0)
        self.by_rows = None if rows is None or not wanted else torch.empty_like(rows)
        self.by_bias = scaled.new_zeros(())
        self.shift = None if task.log_count is None else task.log_count.to(scaled.dtype)
        if bias is not None:
            self.shift = -bias.expand(len(candidates)) if self.shift is None else self.shift - bias
        self.weight, self.base = self._weights()
        # What a tile of exponentials is multiplied with.
        self.weighted = candidates if self.weight is None else candidates * self.weight[:, None]

    def _weights(self) -> tuple[Tensor | None, float | None]:
        """Candidates' weights exp(base - log count) and the base, if exponentials need no maximum; else (None, None).

        Then sum_j exp(s_j - log kappa_j) = exp(-base) sum_j w_j exp(s_j), and the correction costs no pass over the
        tile: w joins the candidates that the tile is multiplied with.
        """
        # Off the CPU the numbers that decide would have to be awaited.
        is_cpu = self.scaled.device.type == "cpu"
        if not (self.task.form.sums_exponentials and is_cpu and self.rows is None and self.candidates.numel()):
            return None, None
        largest = float(largest_norm(self.scaled) * largest_norm(self.candidates))
        if not largest <= SAFE_LOGIT:  # nor is NaN
            return None, None
        if self.shift is None:
            return None, 0.0
        live = self.shift[torch.isfinite(self.shift)]
        if len(live) == 0 or not float(live.max() - live.min()) + largest <= SAFE_RANGE:
            return None, None
        base = float(live.min())
        return torch.exp(base - self.shift), base

    def losses(self) -> Tensor:
        """One loss for each row, [B]; fills the gradients."""
        task, rows = self.task, len(self.scaled)
        losses = self.scaled.new_empty(rows)
        starts = tile_starts(rows, len(self.candidates), self.scaled)
        masks = None if task.hits is None else iter(task.hits.tiles(starts))
        for start, stop in pairwise(starts):
            losses[start:stop] = self._tile(slice(start, stop), None if masks is None else next(masks))
        if self.wanted:
            if rows == 0:
                self.by_candidates.zero_()
            if self.weight is not None:
                self.by_candidates.mul_(self.weight[:, None])
            if task.own_places is not None:
                self.by_candidates.index_add_(0, task.own_places, self.by_positive)
        return losses

    def _tile(self, part: slice, mask: tuple[Tensor, Tensor] | None) -> Tensor:
        task, scaled = self.task, self.scaled[part]
        positive = self.candidates[task.own_places[part]] if self.positive is None else self.positive[part]  # type: ignore[index]
        own = (scaled * positive).sum(1)
        if self.bias is not None:
            own += self.bias
        if task.own_offset is not None:
            own -= task.own_offset[part].to(own.dtype)
        offset = None if task.row_offset is None else task.row_offset[part].to(own.dtype)
        tile = task.form.begin(own, part, offset=offset, base=self.base)

        blocks = tile_blocks(len(scaled), len(self.candidates), self.scaled)
        hits = _by_block(mask, blocks)
        for cols, block in blocks:
            torch.mm(scaled, self.candidates[cols].T, out=block)
            if self.shift is not None and self.weight is None:
                block.sub_(self.shift[cols])
            if hits is not None:
                block.view(-1).index_fill_(0, next(hits), -torch.inf)
            tile.visit(block, None if self.weight is None else self.weight[cols])
            if self.wanted and tile.is_final:  # while the block is in the cache
                self.by_scaled[part].addmm_(block, self.weighted[cols], beta=0 if cols.start == 0 else 1)
        row_block = None if self.rows is None else self._row_logits(self.rows[part], part)
        if row_block is not None:
            tile.visit(row_block, None)
        loss, by_own, scale = tile.finish(task.weights[part].to(own.dtype))
        if self.wanted:
            self._gather(part, blocks, row_block, positive=positive, by_own=by_own, scale=scale, is_final=tile.is_final)
        return loss

    def _row_logits(self, rows: Tensor, part: slice) -> Tensor:
        task = self.task
        logits = torch.bmm(rows, self.scaled[part, :, None])[:, :, 0]
        if task.row_log_count is not None:
            logits -= task.row_log_count[part].to(logits.dtype)
        if self.bias is not None:
            logits += self.bias
        return logits if task.row_hits is None else logits.masked_fill_(task.row_hits[part], -torch.inf)

    def _gather(
        self,
        part: slice,
        blocks: list[tuple[slice, Tensor]],
        row_block: Tensor | None,
        *,
        positive: Tensor,
        by_own: Tensor,
        scale: Tensor,
        is_final: bool,
    ) -> None:
        """Add what a finished tile gives to the gradients."""
        scaled, by_scaled = self.scaled[part], self.by_scaled[part]
        torch.mul(scaled, by_own[:, None], out=self.by_positive[part])
        toward = scaled * scale[:, None]
        if not blocks:
            by_scaled.zero_()
        for cols, block in blocks:
            if not is_final:
                by_scaled.addmm_(block, self.weighted[cols], beta=0 if cols.start == 0 else 1)
            by_candidates = self.by_candidates[cols]
            torch.addmm(by_candidates, block.T, toward, beta=0 if part.start == 0 else 1, out=by_candidates)
            if self.bias is not None:
                self.by_bias += block.sum(1) @ scale
        if row_block is not None and self.by_rows is not None and self.rows is not None:
            by_scaled += torch.bmm(row_block[:, None, :], self.rows[part])[:, 0]
            torch.mul(row_block[:, :, None], toward[:, None, :], out=self.by_rows[part])
            self.by_bias += row_block.sum(1) @ scale
        by_scaled.mul_(scale[:, None]).addcmul_(positive, by_own[:, None])
        self.by_bias += by_own.sum()


def tile_starts(rows: int, candidates: int, like: Tensor) -> list[int]:
    """First row of each tile, and the number of rows at the end."""
    width = max(candidates, 1)
    most = max(TILE_MEMORY // (width * like.element_size()), 1)
    size = most if like.device.type != "cpu" else min(max(TILE_NUMBERS // width, 64), 4096, most)
    return [*range(0, rows, size), rows]


def tile_blocks(rows: int, candidates: int, like: Tensor) -> list[tuple[slice, Tensor]]:
    """A tile's candidates in blocks, with the memory that each block's logits are written to, [rows, m]."""
    width = candidates if like.device.type != "cpu" else max(BLOCK_NUMBERS // rows, 1)
    # On an accelerator the allocator keeps its memory; on the CPU fresh memory costs a page fault every 4 KiB.
    buffer = like.new_empty(rows * candidates) if like.device.type != "cpu" else _buffer(rows * candidates, like.dtype)
    blocks = []
    for start in range(0, candidates, max(width, 1)):
        stop = min(start + width, candidates)
        blocks.append((slice(start, stop), buffer[rows * start : rows * stop].view(rows, stop - start)))
    return blocks


def largest_norm(vectors: Tensor) -> Tensor:
    """The length of the longest row."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1).max()
    return length


def _by_block(mask: tuple[Tensor, Tensor] | None, blocks: list[tuple[slice, Tensor]]) -> Iterator[Tensor] | None:
    """The flat places of a tile's hits in each of its blocks."""
    if mask is None or not blocks:
        return None
    row, place = mask
    widths = [block.shape[1] for _, block in blocks]
    if len(blocks) == 1:
        return iter([row * widths[0] + place])
    of = place // widths[0]
    order = torch.argsort(of)
    counts = torch.bincount(of, minlength=len(blocks)).tolist()
    rows, places = torch.split(row[order], counts), torch.split(place[order], counts)
    return iter(
        [r * width + p - n * widths[0] for n, (r, p, width) in enumerate(zip(rows, places, widths, strict=True))]
    )


def _buffer(numbers: int, dtype: torch.dtype) -> Tensor:
    """The tile's memory of this thread, kept from step to step and made larger when needed."""
    buffers: dict[torch.dtype, Tensor] = _workspace.__dict__.setdefault("buffers", {})
    kept = buffers.get(dtype)
    if kept is None or len(kept) < numbers:
        buffers[dtype] = kept = torch.empty(numbers, dtype=dtype)
    return kept


@contextmanager
def _products(*, low: bool) -> Iterator[None]:
    """Products of float32 matrices rounded to bfloat16 and summed in float32, where the machine has such."""
    if not low:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set by torch at import
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
