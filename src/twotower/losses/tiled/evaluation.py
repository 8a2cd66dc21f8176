"""The tiled evaluation of a loss: some rows against all candidates at a time, in one reused buffer.

The gradients are computed in the same pass: because the weight of each row in the mean is known in advance, a tile's
contributions to the gradients of query, positive, candidates, temperature and bias can be computed as soon as the
losses of its rows are known. Nothing is computed twice, and no [B, M] matrix is stored. Costs: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.losses.tiled.blocks import (
    Mask,
    block_width,
    fill_masked,
    masks_of_blocks,
    products,
    tile_blocks,
    tile_memory,
    tile_starts,
)
from twotower.losses.tiled.forms import TileLoss, log2_unit, row_sums
from twotower.losses.tiled.inputs import LossInputs

#: If all logits are this close to zero, and the candidates' weights are within the range of float32, exponentials need
#: no row maximum subtracted first.
SAFE_LOGIT = 50.0
SAFE_RANGE = 80.0
#: Matrix products are faster if rows start at cache lines: up to twice as fast with 4,480 candidates as with 4,484.
WIDTH = 64


class TiledEvaluation:
    """One evaluation and the gradients accumulated so far.

    Args:
        form: the loss.
        inputs: checked inputs in the precision of the sums; the query is already divided by the temperature.
        needs_grad: whether gradients are computed.
    """

    def __init__(self, form: TileLoss, inputs: LossInputs, *, needs_grad: bool) -> None:
        scaled, candidates, bias = inputs.query, inputs.candidates, inputs.bias
        self.form, self.inputs, self.needs_grad = form, inputs, needs_grad
        self.scaled, self.rows, self.bias = scaled, inputs.row_candidates, bias
        assert inputs.weights is not None and not isinstance(inputs.mask, Tensor)  # done by `LossInputs.checked`
        self.weights, self.mask = inputs.weights, inputs.mask
        self.is_low = inputs.low_precision and scaled.dtype == torch.float32
        shift = None if inputs.log_expected_count is None else inputs.log_expected_count.to(scaled.dtype)
        if bias is not None:
            shift = -bias.expand(len(candidates)) if shift is None else shift - bias
        copies = None if inputs.multiplicity is None else inputs.multiplicity.to(scaled.dtype)
        self.candidates, self.shift = self._padded(candidates, shift)
        self.weight, self.base = self._weights()
        if copies is not None:
            self.weight = F.pad(copies, (0, len(self.candidates) - len(copies)))
        # The right-hand side when a block is multiplied for the queries' gradient.
        self.weighted = self.candidates if self.weight is None else self.candidates * self.weight[:, None]
        self.unit = log2_unit(scaled.dtype) if form.sums_exponentials and self.base is None else 1.0
        if self.shift is not None and self.unit != 1.0:
            self.shift = self.shift * self.unit
        # The two factors of the logits; the unit is applied to the smaller one.
        is_first = len(scaled) <= len(self.candidates)
        self.left = scaled * self.unit if self.unit != 1.0 and is_first else scaled
        self.right = self.candidates * self.unit if self.unit != 1.0 and not is_first else self.candidates
        positive = inputs.positive
        if positive is None:
            assert inputs.positive_places is not None
            positive = candidates.index_select(0, inputs.positive_places)
        self.positive = positive
        own = (self._of_rows(scaled) * positive).sum(1)
        if bias is not None:
            own += bias
        if inputs.own_offset is not None:
            own -= inputs.own_offset.to(own.dtype)
        offset = None if inputs.row_offset is None else inputs.row_offset.to(own.dtype)
        self.sums = form.begin(own, offset=offset, base=self.base)
        self.row_weights = self.weights.to(scaled.dtype)
        self.scaled_grad = torch.empty_like(scaled) if needs_grad else scaled.new_empty(0)
        self.line_weights = scaled.new_empty(len(scaled))
        self.candidates_grad = torch.empty_like(self.candidates) if needs_grad else scaled.new_empty(0)
        self.row_grad = None if self.rows is None or not needs_grad else torch.empty_like(self.rows)
        # One number per evaluation, summed over all blocks: double precision costs nothing.
        self.bias_grad = torch.zeros((), dtype=torch.float64, device=scaled.device)

    def _padded(self, candidates: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad the candidates to a width that makes the products fast; the padding has weight zero."""
        spare = -len(candidates) % WIDTH
        if not spare or shift is None or candidates.device.type != "cpu" or len(candidates) < WIDTH:
            return candidates, shift
        return F.pad(candidates, (0, 0, 0, spare)), F.pad(shift, (0, spare), value=torch.inf)

    def _weights(self) -> tuple[Tensor | None, float | None]:
        """Return the candidates' weights exp(base - log count) and the base; (None, None) if a row maximum is needed.

        With weights, sum_j exp(s_j - log kappa_j) = exp(-base) sum_j w_j exp(s_j), so the correction needs no extra
        pass over the tile: w is applied to the candidates that the tile is multiplied with.
        """
        # On an accelerator, reading the deciding numbers would synchronize.
        is_cpu = self.scaled.device.type == "cpu"
        if not (
            self.form.sums_exponentials
            and is_cpu
            and self.rows is None
            and self.candidates.numel()
            and self.scaled.numel()
        ):
            return None, None
        largest = float(largest_norm(self.scaled) * largest_norm(self.candidates))
        if not largest <= SAFE_LOGIT:  # also true for NaN
            return None, None
        if self.shift is None:
            return None, 0.0
        live = self.shift[torch.isfinite(self.shift)]
        if len(live) == 0 or not float(live.max() - live.min()) + largest <= SAFE_RANGE:
            return None, None
        base = float(live.min())
        return torch.exp(base - self.shift), base

    def total(self) -> Tensor:
        """Compute the weighted sum of the rows' losses and fill the gradients."""
        rows = len(self.scaled)
        starts = tile_starts(rows, len(self.candidates), self.scaled)
        tile_masks = None if self.mask is None else iter(self.mask.tiles(starts))
        largest = max((stop - start for start, stop in pairwise(starts)), default=0)
        memory = tile_memory(largest * len(self.candidates), self.scaled)
        width = block_width(largest, len(self.candidates), self.scaled)
        gathering: Iterator[None] = iter(())
        for start, stop in pairwise(starts):
            blocks = tile_blocks(memory, stop - start, len(self.candidates), width)
            gathering = self._tile(
                slice(start, stop), blocks, None if tile_masks is None else next(tile_masks), gathering
            )
        finish(gathering)
        losses, own_grad = self.sums.finish()
        if self.needs_grad:
            self._complete(own_grad * self.row_weights)
        return (self.weights.double() * losses).sum().to(losses.dtype)

    def _complete(self, own_grad: Tensor) -> None:
        """Add the positives' contribution to the gradients, and the factors that are the same for all tiles."""
        if len(self.scaled) == 0:
            self.candidates_grad.zero_()
        if self.weight is not None:
            self.candidates_grad.mul_(self.weight[:, None])
        self.query_grad = self._query_grad().addcmul_(self.positive, own_grad[:, None])
        self.bias_grad += own_grad.sum()
        self.positive_grad = self._of_rows(self.scaled) * own_grad[:, None]
        if self.inputs.positive_places is not None:
            self.candidates_grad.index_add_(0, self.inputs.positive_places, self.positive_grad)

    def _tile(
        self, part: slice, blocks: list[tuple[slice, Tensor]], mask: Mask | None, gathering: Iterator[None]
    ) -> Iterator[None]:
        """Visit a tile; return an iterator that gathers its gradients block by block while the next tile is visited.

        A block is then read from memory, gathered into the gradients and overwritten by the next tile's logits while it
        is in cache. For large catalogs memory traffic takes as long as the products.
        """
        left, sums = self.left[part], self.sums
        for (cols, block), masked in zip(blocks, masks_of_blocks(mask, blocks), strict=True):
            next(gathering, None)
            with products(low=self.is_low):
                torch.mm(left, self.right[cols].T, out=block)
            if self.base is None:
                if self.shift is not None:
                    block.sub_(self.shift[cols])
                fill_masked(block, masked, -torch.inf)
            else:
                fill_masked(block.exp_(), masked, 0.0)
            self._visit(part, cols, block)
            if self.needs_grad and sums.is_final:  # while the block is in the cache
                self._add_to_scaled(part, cols, block)
        finish(gathering)
        row_block = None if self.rows is None else self._row_logits(self.rows[part], part)
        if row_block is not None:
            sums.visit(part, row_block, None)
        weights = self.line_weights[part].copy_(self._weights_of_lines(part))
        return self._gather(part, blocks, row_block, weights) if self.needs_grad else iter(())

    def _of_rows(self, by_line: Tensor) -> Tensor:
        """Expand values per line of logits to rows, [G, ...] -> [B, ...]; in this class every row is its own line."""
        return by_line

    def _visit(self, part: slice, cols: slice, block: Tensor) -> None:
        """Add a block of masked logits to the sums."""
        self.sums.visit(part, block, None if self.weight is None else self.weight[cols])

    def _weights_of_lines(self, part: slice) -> Tensor:
        """Return the factor that turns block values into gradients of the sum; all blocks must have been visited."""
        scale = self.sums.scale(part)
        return self.row_weights[part] if scale is None else scale * self.row_weights[part]

    def _query_grad(self) -> Tensor:
        """Return the candidates' contribution to the gradient of each scaled query, [B, D]."""
        return self.scaled_grad.mul_(self.line_weights[:, None])

    def _row_logits(self, rows: Tensor, part: slice) -> Tensor:
        log_count, mask = self.inputs.row_log_expected_count, self.inputs.row_mask
        logits = torch.bmm(rows, self.scaled[part, :, None])[:, :, 0]
        if log_count is not None:
            logits -= log_count[part].to(logits.dtype)
        if self.bias is not None:
            logits += self.bias
        if self.unit != 1.0:
            logits *= self.unit
        return logits if mask is None else logits.masked_fill_(mask[part], -torch.inf)

    def _add_to_scaled(self, part: slice, cols: slice, block: Tensor) -> None:
        with products(low=self.is_low):
            self.scaled_grad[part].addmm_(block, self.weighted[cols], beta=0 if cols.start == 0 else 1)

    def _gather(
        self, part: slice, blocks: list[tuple[slice, Tensor]], row_block: Tensor | None, weights: Tensor
    ) -> Iterator[None]:
        """Add a finished tile's contribution to the gradients, given its lines' weights; yields after each block."""
        scaled, scaled_grad = self.scaled[part], self.scaled_grad[part]
        toward = scaled * weights[:, None]
        if not blocks:
            scaled_grad.zero_()
        for cols, block in blocks:
            self._make_whole(part, cols, block)
            if not self.sums.is_final:
                self._add_to_scaled(part, cols, block)
            candidates_grad = self.candidates_grad[cols]
            with products(low=self.is_low):
                torch.addmm(candidates_grad, block.T, toward, beta=0 if part.start == 0 else 1, out=candidates_grad)
            if self.bias is not None:
                self.bias_grad += row_sums(block, None if self.weight is None else self.weight[cols]) @ weights
            yield
        if row_block is not None and self.row_grad is not None and self.rows is not None:
            scaled_grad += torch.bmm(row_block[:, None, :], self.rows[part])[:, 0]
            torch.mul(row_block[:, :, None], toward[:, None, :], out=self.row_grad[part])
            self.bias_grad += row_block.sum(1) @ weights

    def _make_whole(self, part: slice, cols: slice, block: Tensor) -> None:
        """Restore entries of a visited block that count for the candidates' gradient only; none in this class."""


def finish(gathering: Iterator[None]) -> None:
    """Run the remaining steps of an iterator returned by `TiledEvaluation._tile`."""
    for _ in gathering:
        pass


def largest_norm(vectors: Tensor) -> Tensor:
    """Return the largest row norm."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1).max()
    return length
