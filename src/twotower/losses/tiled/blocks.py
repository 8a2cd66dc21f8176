"""Tiles and blocks of the logit matrix: their sizes, their memory, and the precision of their products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: Maximum memory of a tile in bytes; including the workspace of the products the total stays below 256 MiB.
TILE_MEMORY = 245 << 20
#: Number of elements of a tile on the CPU, 8 MiB of float32, but at least `LEAST_ROWS` rows: small enough to be
#: still in cache when it is read again, and large enough for efficient matrix products.
TILE_NUMBERS = 1 << 21
LEAST_ROWS = 512
#: If `LEAST_ROWS` rows have more elements than this, 32 MiB of float32, a tile gets half as many rows: memory is then
#: the bottleneck.
WIDE_NUMBERS = 1 << 23
#: A larger tile is processed in blocks of about this many elements, at least `LEAST_WIDTH` candidates, because the
#: matrix library allocates a copy of each block. Narrow blocks are slow: 512 rows take a third longer in blocks of
#: 1,024 candidates than in one piece.
BLOCK_NUMBERS = 3 << 18
LEAST_WIDTH = 8192

_workspace = threading.local()

#: Masked entries of a tile: (row, place), int64 [H] each, or bool [R, M].
Mask = tuple[Tensor, Tensor] | Tensor


def tile_starts(rows: int, candidates: int, like: Tensor) -> list[int]:
    """Return the first row of each tile, followed by the total number of rows."""
    width = max(candidates, 1)
    most = max(TILE_MEMORY // (width * like.element_size()), 1)
    least = LEAST_ROWS if LEAST_ROWS * width <= WIDE_NUMBERS else LEAST_ROWS // 2
    size = most if like.device.type != "cpu" else min(max(TILE_NUMBERS // width, least), 4096, most)
    if size > 64:
        size -= size % 64
    return [*range(0, rows, size), rows]


def block_width(rows: int, candidates: int, like: Tensor) -> int:
    """Return the number of candidates per block of a tile."""
    return max(candidates if like.device.type != "cpu" else max(BLOCK_NUMBERS // max(rows, 1), LEAST_WIDTH), 1)


def tile_memory(numbers: int, like: Tensor) -> Tensor:
    """Return memory for the largest tile of an evaluation, [numbers].

    On an accelerator the allocator caches memory. On the CPU fresh memory costs a page fault every 4 KiB, so each
    thread reuses one buffer from step to step, enlarged when needed.
    """
    if like.device.type != "cpu":
        return like.new_empty(numbers)
    buffers: dict[torch.dtype, Tensor] = _workspace.__dict__.setdefault("buffers", {})
    buffer = buffers.get(like.dtype)
    if buffer is None or len(buffer) < numbers:
        buffers[like.dtype] = buffer = torch.empty(numbers, dtype=like.dtype)
    return buffer


def tile_blocks(memory: Tensor, rows: int, candidates: int, width: int) -> list[tuple[slice, Tensor]]:
    """Cut a tile's candidates into blocks, with the memory that each block's logits are written to, [rows, m].

    Block n ends no later in memory than block n of a tile with more rows. So it may overwrite the previous tile once
    blocks 0 to n of that tile have been used.
    """
    blocks = []
    for start in range(0, candidates, width):
        stop = min(start + width, candidates)
        blocks.append((slice(start, stop), memory[rows * start : rows * stop].view(rows, stop - start)))
    return blocks


def masks_of_blocks(mask: Mask | None, blocks: list[tuple[slice, Tensor]]) -> list[Tensor | None]:
    """Split a tile's mask by block: flat places, int64, or bool [R, m]; None for each block without a mask."""
    if mask is None or not blocks:
        return [None] * len(blocks)
    if isinstance(mask, Tensor):
        return [mask[:, cols] for cols, _ in blocks]
    return [*_by_block(*mask, blocks)]


def fill_masked(block: Tensor, mask: Tensor | None, value: float) -> None:
    """Set the masked entries of a block to a value, in place."""
    if mask is None:
        return
    if mask.dtype == torch.bool:
        block[:, : mask.shape[1]].masked_fill_(mask, value)
    else:
        block.view(-1).index_fill_(0, mask, value)


@contextmanager
def products(*, low: bool) -> Iterator[None]:
    """Round float32 matrix products to bfloat16, summed in float32, inside the block, if the machine supports it."""
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


def exact_products(device: str) -> AbstractContextManager[Any]:
    """Turn autocast off, if the device type supports it: precision is chosen explicitly for each product."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _by_block(row: Tensor, place: Tensor, blocks: list[tuple[slice, Tensor]]) -> list[Tensor]:
    """Return the flat places of a tile's hits in each of its blocks."""
    widths = [block.shape[1] for _, block in blocks]
    if len(blocks) == 1:
        return [row * widths[0] + place]
    of = place // widths[0]
    order = torch.argsort(of)
    counts = torch.bincount(of, minlength=len(blocks)).tolist()
    rows, places = torch.split(row[order], counts), torch.split(place[order], counts)
    return [r * width + p - n * widths[0] for n, (r, p, width) in enumerate(zip(rows, places, widths, strict=True))]
