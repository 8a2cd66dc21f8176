"""How a matrix of logits is cut into tiles and blocks, where these lie, and how precise their products are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: Most memory of a tile, bytes; with what the products themselves need it stays below 256 MiB.
TILE_MEMORY = 245 << 20
#: On CPU a tile has about this many numbers, 8 MiB of float32, but at least `LEAST_ROWS` rows: what is computed is
#: still in the caches when it is read again, and the products are large enough for their library to be at its best.
TILE_NUMBERS = 1 << 21
LEAST_ROWS = 512
#: A tile of so many rows that has more numbers than these, 32 MiB of float32, gets half of the rows: it is memory then
#: that there is least of.
WIDE_NUMBERS = 1 << 23
#: A larger tile is worked on in blocks of about so many numbers, at least `LEAST_WIDTH` candidates: the library
#: takes memory for a copy of them. Narrow blocks cost: a third more at 512 rows in blocks of 1,024 than at once.
BLOCK_NUMBERS = 3 << 18
LEAST_WIDTH = 8192

_workspace = threading.local()

#: Masked places of a tile: (row, place), int64 [H] each, or bool [R, M].
Mask = tuple[Tensor, Tensor] | Tensor


def tile_starts(rows: int, candidates: int, like: Tensor) -> list[int]:
    """First row of each tile, and the number of rows at the end."""
    width = max(candidates, 1)
    most = max(TILE_MEMORY // (width * like.element_size()), 1)
    least = LEAST_ROWS if LEAST_ROWS * width <= WIDE_NUMBERS else LEAST_ROWS // 2
    size = most if like.device.type != "cpu" else min(max(TILE_NUMBERS // width, least), 4096, most)
    if size > 64:
        size -= size % 64
    return [*range(0, rows, size), rows]


def block_width(rows: int, candidates: int, like: Tensor) -> int:
    """How many candidates of a tile are worked on at a time."""
    return max(candidates if like.device.type != "cpu" else max(BLOCK_NUMBERS // max(rows, 1), LEAST_WIDTH), 1)


def tile_memory(numbers: int, like: Tensor) -> Tensor:
    """Memory for the largest tile of a run, [numbers].

    On an accelerator the allocator keeps its memory; on the CPU fresh memory costs a page fault every 4 KiB, so that it
    is kept here from step to step, for each thread, and made larger when needed.
    """
    if like.device.type != "cpu":
        return like.new_empty(numbers)
    buffers: dict[torch.dtype, Tensor] = _workspace.__dict__.setdefault("buffers", {})
    kept = buffers.get(like.dtype)
    if kept is None or len(kept) < numbers:
        buffers[like.dtype] = kept = torch.empty(numbers, dtype=like.dtype)
    return kept


def tile_blocks(memory: Tensor, rows: int, candidates: int, width: int) -> list[tuple[slice, Tensor]]:
    """A tile's candidates in blocks, with the memory that each block's logits are written to, [rows, m].

    Block n ends no later in the memory than block n of a tile of more rows, whose numbers are not needed any more once
    those of its blocks 0 to n are used.
    """
    blocks = []
    for start in range(0, candidates, width):
        stop = min(start + width, candidates)
        blocks.append((slice(start, stop), memory[rows * start : rows * stop].view(rows, stop - start)))
    return blocks


def masks_of_blocks(mask: Mask | None, blocks: list[tuple[slice, Tensor]]) -> list[Tensor | None]:
    """A tile's mask in each of its blocks: flat places, int64, or bool [R, m]; None where nothing is masked."""
    if mask is None or not blocks:
        return [None] * len(blocks)
    if isinstance(mask, Tensor):
        return [mask[:, cols] for cols, _ in blocks]
    return [*_by_block(*mask, blocks)]


def fill_masked(block: Tensor, mask: Tensor | None, value: float) -> None:
    """Set the masked places of a block."""
    if mask is None:
        return
    if mask.dtype == torch.bool:
        block[:, : mask.shape[1]].masked_fill_(mask, value)
    else:
        block.view(-1).index_fill_(0, mask, value)


@contextmanager
def products(*, low: bool) -> Iterator[None]:
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


def exact_products(device: str) -> AbstractContextManager[Any]:
    """Autocast off, where the kind of device knows it: what is rounded is said product by product."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _by_block(row: Tensor, place: Tensor, blocks: list[tuple[slice, Tensor]]) -> list[Tensor]:
    """The flat places of a tile's hits in each of its blocks."""
    widths = [block.shape[1] for _, block in blocks]
    if len(blocks) == 1:
        return [row * widths[0] + place]
    of = place // widths[0]
    order = torch.argsort(of)
    counts = torch.bincount(of, minlength=len(blocks)).tolist()
    rows, places = torch.split(row[order], counts), torch.split(place[order], counts)
    return [r * width + p - n * widths[0] for n, (r, p, width) in enumerate(zip(rows, places, widths, strict=True))]
