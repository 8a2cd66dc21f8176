"""The partition of id tables among ranks: by rows, or whole tables on single ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twotower.distributed.communicator import Communicator

#: Number of random values drawn at a time when a part is initialised; a multiple of 16.
BLOCK = 1 << 20


@dataclass(frozen=True)
class RowShard:
    """A rank's part of a table: a contiguous range of ceil(N / W) rows, fewer or none on the last ranks.

    Attributes:
        ranks: the processes that share the table.
        rows: N, number of rows of the whole table.
        holder: the rank with all rows (table-wise, only with TorchRec); None if each rank has its own range (row-wise).
    """

    ranks: Communicator
    rows: int
    holder: int | None = None

    @property
    def bounds(self) -> list[int]:
        """The first row of each rank, followed by N; W + 1 numbers."""
        if self.holder is None:
            return runs(self.rows, self.ranks.size)
        return [0 if rank <= self.holder else self.rows for rank in range(self.ranks.size + 1)]

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        bounds = self.bounds
        return slice(bounds[self.ranks.rank], bounds[self.ranks.rank + 1])

    def __len__(self) -> int:
        """Return the number of rows on this rank."""
        bounds = self.bounds
        return bounds[self.ranks.rank + 1] - bounds[self.ranks.rank]

    def whole_shape(self, tensor: Tensor) -> list[int]:
        """Return the shape of the whole tensor (table or optimizer state) of which `tensor` is this rank's part."""
        return [self.rows, *tensor.shape[1:]]

    def cut(self, tensor: Tensor) -> Tensor:
        """Cut this rank's part from a whole tensor, [N, ...]; a part is returned unchanged."""
        return tensor[self.own] if len(tensor) == self.rows else tensor

    def __str__(self) -> str:
        """Return the placement as named in the settings, with the rank of a table-wise table."""
        return "row-wise" if self.holder is None else f"table-wise (rank {self.holder})"


def runs(total: int, size: int) -> list[int]:
    """Split `total` into ranges of ceil(total / W); return the start of each rank's range, then `total`."""
    each = -(-total // size)
    return [min(rank * each, total) for rank in range(size + 1)]


_placed: ContextVar[tuple[Mapping[str, RowShard], Any]] = ContextVar("placed", default=({}, None))


@contextmanager
def placed_tables(parts: Mapping[str, RowShard], engine: Any = None) -> Iterator[None]:
    """Split tables with these names that are created in the block; all other tables are whole on every rank.

    With an `engine` (`TorchRecTables`), the parts are in its memory, and it looks up and updates their rows.
    """
    token = _placed.set((parts, engine))
    try:
        yield
    finally:
        _placed.reset(token)


def shard_of_table(name: str | None, rows: int) -> tuple[RowShard | None, Any]:
    """Return this rank's part of a table that is being created, and the engine that holds it; None for a whole table.

    Raises:
        ValueError: the table was placed with a different number of rows.
    """
    parts, engine = _placed.get()
    part = parts.get(name or "")
    if part is not None and part.rows != rows:
        raise ValueError(f"table {name}: placed with {part.rows} rows, created with {rows}")
    return part, None if part is None else engine


def fill_normal(weight: Tensor, scale: float, part: RowShard | None = None) -> None:
    """Fill with N(0, scale^2) in place; a part gets exactly the values that it would have in the whole table.

    A rank with a part draws all values of the table, a block at a time, and keeps only the values of its part, because
    the generator cannot skip values. The generator ends in the same state as after filling the whole table.
    """
    if weight.is_meta:  # no memory to fill; torch would take seconds to import its compiler
        return
    if part is None:
        nn.init.normal_(weight, std=scale)
        return
    width, rows = weight.shape[1], part.own
    total = part.rows * width
    begun, first, start = torch.empty(0), 0, 0  # values of an incomplete row, its index, values drawn
    while start < total:
        # torch draws 16 numbers at a time, and redraws the last 16 of a tensor if its size is not a multiple of 16.
        stop = start + BLOCK if total - start >= BLOCK + 16 else total
        drawn = torch.cat([begun, torch.empty(stop - start, dtype=torch.float32).normal_(std=scale)])
        count = len(drawn) // width
        top, bottom = max(first, rows.start), min(first + count, rows.stop)
        if top < bottom:
            complete = drawn[: count * width].view(count, width)
            own = complete[top - first : bottom - first]
            weight.detach()[top - rows.start : bottom - rows.start] = own.to(weight.device)
        begun, first, start = drawn[count * width :], first + count, stop
