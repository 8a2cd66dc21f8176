"""Triton kernels of the corrected softmax: sums and gradients without a matrix of logits in memory.

Import this module only where Triton is installed; `kernel.py` decides. With TRITON_INTERPRET=1 in the environment when
Triton is first imported, the kernels run on the CPU in its interpreter, which is for tests.

Logits are l_bj = <q_b, v_j> - log kappa_j, computed in the unit of log 2. A row's sum is kept relative to the largest
logit seen so far and rescaled when a larger one appears (Milakov and Gimelshein 2018, "Online normalizer calculation
for softmax"), together with the weighted sum of candidates, from which the gradient of the row's query follows. So one
pass over the candidates gives the value and the queries' gradient, and a second one the candidates' gradient. No sum
depends on the order in which programs run, so equal inputs give equal results.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _masked(logits, rows, group, first, offsets, hit_row, hit_group, tile_row, tile_column, tiles):
    """Set the hits of a tile to -inf.

    Hits are sorted by the tile of the first copy of their item. Copies are next to each other, so only the item of the
    tile's first candidate can have its first copy in an earlier tile, whose hits are then read too.
    """
    at = tile_row * tiles + tile_column
    for place in range(tl.load(offsets + at), tl.load(offsets + at + 1)):
        is_hit = (rows[:, None] == tl.load(hit_row + place)) & (group[None, :] == tl.load(hit_group + place))
        logits = tl.where(is_hit, float("-inf"), logits)
    earlier = tl.load(first + tile_column)
    if earlier < tile_column:
        at = tile_row * tiles + earlier
        for place in range(tl.load(offsets + at), tl.load(offsets + at + 1)):
            is_hit = (rows[:, None] == tl.load(hit_row + place)) & (group[None, :] == tl.load(hit_group + place))
            logits = tl.where(is_hit, float("-inf"), logits)
    return logits


@triton.jit
def _sums_kernel(
    query,
    candidates,
    shift,
    group,
    first,
    offsets,
    hit_row,
    hit_group,
    largest_out,
    total_out,
    gathered_out,
    num_rows,
    num_candidates,
    tiles,
    tiles_of_split,
    log2e,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute, for R rows and one split, m_b = max_j l_bj, sum_j 2^(l_bj - m_b) and sum_j 2^(l_bj - m_b) v_j."""
    tile_row, split = tl.program_id(0), tl.program_id(1)
    rows = tile_row * R + tl.arange(0, R)
    depth = tl.arange(0, WIDTH)
    is_row, is_deep = rows < num_rows, depth < D
    q = tl.load(
        query + rows[:, None].to(tl.int64) * D + depth[None, :], mask=is_row[:, None] & is_deep[None, :], other=0.0
    )
    largest = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    gathered = tl.zeros((R, WIDTH), tl.float32)
    for tile in range(split * tiles_of_split, tl.minimum((split + 1) * tiles_of_split, tiles)):
        columns = tile * C + tl.arange(0, C)
        is_column = columns < num_candidates
        v = tl.load(
            candidates + columns[:, None].to(tl.int64) * D + depth[None, :],
            mask=is_column[:, None] & is_deep[None, :],
            other=0.0,
        )
        logits = tl.dot(q, tl.trans(v), input_precision=PRECISION)
        if HAS_SHIFT:
            logits -= tl.load(shift + columns, mask=is_column, other=0.0)[None, :]
        logits = tl.where(is_column[None, :], logits * log2e, float("-inf"))
        if HAS_MASK:
            own = tl.load(group + columns, mask=is_column, other=-1)
            logits = _masked(logits, rows, own, first, offsets, hit_row, hit_group, tile_row, tile, tiles)
        new = tl.maximum(largest, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row whose candidates are all masked so far
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weights, 1)
        gathered = gathered * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = new
    place = split.to(tl.int64) * num_rows + rows
    tl.store(largest_out + place, largest, mask=is_row)
    tl.store(total_out + place, total, mask=is_row)
    tl.store(gathered_out + place[:, None] * D + depth[None, :], gathered, mask=is_row[:, None] & is_deep[None, :])


@triton.jit
def _candidates_kernel(
    query,
    candidates,
    shift,
    group,
    first,
    offsets,
    hit_row,
    hit_group,
    largest,
    row_weight,
    gradient_out,
    num_rows,
    num_candidates,
    tiles,
    row_tiles,
    tiles_of_split,
    log2e,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute, for C candidates and the rows of one split, sum_b w_b 2^(l_bj - m_b) q_b."""
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * C + tl.arange(0, C)
    depth = tl.arange(0, WIDTH)
    is_column, is_deep = columns < num_candidates, depth < D
    v = tl.load(
        candidates + columns[:, None].to(tl.int64) * D + depth[None, :],
        mask=is_column[:, None] & is_deep[None, :],
        other=0.0,
    )
    own = tl.load(group + columns, mask=is_column, other=-1)
    gradient = tl.zeros((C, WIDTH), tl.float32)
    for tile_row in range(split * tiles_of_split, tl.minimum((split + 1) * tiles_of_split, row_tiles)):
        rows = tile_row * R + tl.arange(0, R)
        is_row = rows < num_rows
        q = tl.load(
            query + rows[:, None].to(tl.int64) * D + depth[None, :], mask=is_row[:, None] & is_deep[None, :], other=0.0
        )
        logits = tl.dot(q, tl.trans(v), input_precision=PRECISION)
        if HAS_SHIFT:
            logits -= tl.load(shift + columns, mask=is_column, other=0.0)[None, :]
        logits = tl.where(is_column[None, :], logits * log2e, float("-inf"))
        if HAS_MASK:
            logits = _masked(logits, rows, own, first, offsets, hit_row, hit_group, tile_row, tile, tiles)
        base = tl.load(largest + rows, mask=is_row, other=0.0)
        weight = tl.load(row_weight + rows, mask=is_row, other=0.0)
        exponentials = tl.exp2(logits - base[:, None])
        gradient += tl.dot(
            tl.trans(exponentials.to(q.dtype)), (q * weight[:, None]).to(q.dtype), input_precision=PRECISION
        )
    place = split.to(tl.int64) * num_candidates + columns
    tl.store(gradient_out + place[:, None] * D + depth[None, :], gradient, mask=is_column[:, None] & is_deep[None, :])
