"""Items that a search must leave out, tile by tile."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Exclusion = tuple[Tensor | np.ndarray, Tensor | np.ndarray]
"""Compressed rows `(offsets [B+1], items)`: row b excludes `items[offsets[b]:offsets[b+1]]`."""


@dataclass(frozen=True)
class Entries:
    """The excluded entries of one block of rows, sorted by column tile."""

    rows: Tensor
    columns: Tensor
    bounds: list[int]

    def tile(self, index: int, left: int) -> tuple[Tensor, Tensor]:
        """Return the rows and columns within tile number `index`, whose first column is `left`."""
        chosen = slice(self.bounds[index], self.bounds[index + 1])
        return self.rows[chosen], self.columns[chosen] - left


@dataclass(frozen=True)
class Excluded:
    """Validated exclusions, with items converted to columns."""

    offsets: Tensor
    columns: Tensor
    num_items: int

    @classmethod
    def of(cls, exclude: Exclusion, num_rows: int, order: Tensor) -> "Excluded":
        """Validate compressed rows [num_rows + 1] of items; `order` is [N], the item of each column.

        Raises:
            ValueError: the offsets are invalid, or an item is out of range.
        """
        offsets = torch.as_tensor(np.asarray(exclude[0], dtype=np.int64))
        items = torch.as_tensor(np.asarray(exclude[1], dtype=np.int64)).to(order.device)
        num_items = order.numel()
        if offsets.shape != (num_rows + 1,):
            raise ValueError(f"exclude: offsets must have shape [{num_rows + 1}], got {list(offsets.shape)}")
        if offsets[0] != 0 or offsets[-1] != len(items) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"exclude: offsets must increase from 0 to the number of items, {len(items)}")
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
            raise ValueError(f"exclude: items must be codes in 0 .. {num_items - 1}")
        column_of = torch.empty_like(order)
        column_of[order] = torch.arange(num_items, device=order.device)
        return cls(offsets, column_of[items], num_items)

    def block(self, start: int, stop: int, columns: int) -> Entries:
        """Return the entries of rows start:stop, for tiles of `columns` columns."""
        offsets = self.offsets[start : stop + 1]
        column = self.columns[int(offsets[0]) : int(offsets[-1])]
        row = torch.repeat_interleave(torch.arange(stop - start), offsets.diff()).to(column.device)
        if columns >= self.num_items:
            return Entries(row, column, [0, len(column)])
        tile, by_tile = (column // columns).sort()
        edges = torch.arange(-(-self.num_items // columns) + 1, device=column.device)
        bounds = torch.searchsorted(tile, edges)
        return Entries(row[by_tile], column[by_tile], bounds.tolist())
