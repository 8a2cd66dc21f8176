"""Which part of an id table a rank holds: a run of its rows, a run of its columns, or all of it on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.ranks import Ranks

#: Numbers drawn at once for a part: a multiple of 16.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Rows:
    """A run of rows, with all of their columns: ceil(N / W) of them, fewer or none on the last ranks.

    Attributes:
        ranks: the processes that share the table.
        rows: N, of the whole table.
        holder: the rank that has all rows, and the others none (table-wise); None: each has its run (row-wise).
    """

    ranks: Ranks
    rows: int
    holder: int | None = None

    @property
    def bounds(self) -> list[int]:
        """Where each rank's rows begin, and N: W + 1 numbers."""
        if self.holder is None:
            return runs(self.rows, self.ranks.size)
        return [0 if rank <= self.holder else self.rows for rank in range(self.ranks.size + 1)]

    @property
    def own(self) -> slice:
        """This rank's rows."""
        bounds = self.bounds
        return slice(bounds[self.ranks.rank], bounds[self.ranks.rank + 1])

    def __len__(self) -> int:
        """How many rows this rank holds."""
        bounds = self.bounds
        return bounds[self.ranks.rank + 1] - bounds[self.ranks.rank]

    def place(self, width: int) -> tuple[slice, slice]:
        """Rows and columns of this rank in a table of so many columns."""
        return self.own, slice(0, width)

    def whole_shape(self, tensor: Tensor) -> list[int]:
        """Shape of the tensor, such as a table or what an optimizer keeps for it, of which this is the rank's part."""
        return [self.rows, *tensor.shape[1:]]

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor, [N, ...]; a part is given back as it is."""
        return tensor[self.own] if len(tensor) == self.rows else tensor

    def __str__(self) -> str:
        """As the settings name it."""
        return "row-wise" if self.holder is None else f"table-wise (rank {self.holder})"


@dataclass(frozen=True)
class Columns:
    """A run of columns, with all N rows: ceil(D / W) of them, fewer or none on the last ranks.

    Whatever rows a step looks up, every rank serves as many numbers. What an optimizer keeps for each row as a whole,
    [N], every rank keeps, and all alike.

    Attributes:
        ranks: the processes that share the table.
        rows: N.
        width: D, of the whole table.
    """

    ranks: Ranks
    rows: int
    width: int

    @property
    def bounds(self) -> list[int]:
        """Where each rank's columns begin, and D: W + 1 numbers."""
        return runs(self.width, self.ranks.size)

    @property
    def own(self) -> slice:
        """This rank's columns."""
        bounds = self.bounds
        return slice(bounds[self.ranks.rank], bounds[self.ranks.rank + 1])

    def place(self, width: int) -> tuple[slice, slice]:
        """Rows and columns of this rank in a table of so many columns."""
        del width
        return slice(0, self.rows), self.own

    def whole_shape(self, tensor: Tensor) -> list[int]:
        """Shape of the tensor, such as a table or what an optimizer keeps for it, of which this is the rank's part."""
        return [self.rows] if tensor.ndim == 1 else [self.rows, self.width]

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor, [N, D] or [N]; a part is given back as it is."""
        return tensor[:, self.own] if tensor.ndim == 2 and tensor.shape[1] == self.width else tensor

    def __str__(self) -> str:
        """As the settings name it."""
        return "column-wise"


#: What a rank holds of a table that it does not have alone.
Part = Rows | Columns


def runs(total: int, size: int) -> list[int]:
    """Where each rank's run of `total` things begins, and `total`: W + 1 numbers; ceil(total / W) things each."""
    each = -(-total // size)
    return [min(rank * each, total) for rank in range(size + 1)]


_placed: ContextVar[Mapping[str, Part] | None] = ContextVar("placed", default=None)


@contextmanager
def placed_tables(parts: Mapping[str, Part]) -> Iterator[None]:
    """Tables of these names that are made in the block are held by parts; all others are whole on every rank."""
    token = _placed.set(parts)
    try:
        yield
    finally:
        _placed.reset(token)


def part_of(name: str | None, rows: int) -> Part | None:
    """The part of a table made here and now that this rank is to hold; None for the whole table.

    Raises:
        ValueError: it was planned with another number of rows.
    """
    part = (_placed.get() or {}).get(name or "")
    if part is not None and part.rows != rows:
        raise ValueError(f"table {name}: placed with {part.rows} rows, made with {rows}")
    return part


def fill_normal(weight: Tensor, scale: float, part: Part | None = None) -> None:
    """N(0, scale^2) in place; a part gets the very numbers that it would have in the whole table.

    A rank without the whole table draws all of its numbers too, a block at a time, and keeps its own: the generator
    cannot jump. It ends in the state it would have after the whole table.
    """
    if part is None:
        nn.init.normal_(weight, std=scale)
        return
    width = part.width if isinstance(part, Columns) else weight.shape[1]
    (rows, columns), total = part.place(width), part.rows * width
    begun, first, start = torch.empty(0), 0, 0  # numbers of a row that is not complete yet, and which row that is
    while start < total:
        # torch draws 16 numbers together, and the last 16 of a tensor anew where 16 does not divide it.
        stop = start + BLOCK if total - start >= BLOCK + 16 else total
        drawn = torch.cat([begun, torch.empty(stop - start, dtype=torch.float32).normal_(std=scale)])
        count = len(drawn) // width
        top, bottom = max(first, rows.start), min(first + count, rows.stop)
        if top < bottom:
            complete = drawn[: count * width].view(count, width)
            own = complete[top - first : bottom - first, columns]
            weight.detach()[top - rows.start : bottom - rows.start] = own.to(weight.device)
        begun, first, start = drawn[count * width :], first + count, stop
