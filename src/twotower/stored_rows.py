"""Tensors left in safetensors files, of which only requested rows are read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.shared_files import DTYPES

#: Types by their safetensors name: those of shared_files.py, and some that only small tensors have.
TYPES = {name: dtype for dtype, name in DTYPES.items()} | {"F64": torch.float64, "I32": torch.int32, "U8": torch.uint8}


class RowSource(Protocol):
    """A tensor, in memory or in files, from which a larger table is filled."""

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class StoredRows:
    """A tensor whose ranges of rows are in files.

    The files are memory-mapped: rows that are not requested are not read, and mapped pages do not count as this
    process's memory. Requested rows are copied.

    Attributes:
        shape: of the whole tensor.
        dtype: of the whole tensor.
        runs: the first row of each range and its bytes, uint8 [n, bytes per row]; together all rows, in order.
    """

    shape: torch.Size
    dtype: torch.dtype
    runs: Sequence[tuple[int, NDArray[np.uint8]]]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice | EllipsisType) -> Tensor:
        """Return rows by number, int64 [M], a slice of rows, or all rows for `...`.

        Raises:
            IndexError: a row does not exist.
        """
        if isinstance(index, Tensor):
            return self._some(index.numpy())
        if isinstance(index, slice):
            return self._some(np.arange(*index.indices(len(self))))
        return self._tensor(np.concatenate([run for _, run in self.runs]), self.shape)

    def _some(self, rows: NDArray[np.int64]) -> Tensor:
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} requested of {len(self)}")
        first = np.array([start for start, _ in self.runs])
        run_of = np.searchsorted(first, rows, side="right") - 1
        found = np.empty((len(rows), self.runs[0][1].shape[1]), dtype=np.uint8)
        for number in np.unique(run_of):
            start, run = self.runs[number]
            here = run_of == number
            found[here] = run[rows[here] - start]
        return self._tensor(found, torch.Size([len(rows), *self.shape[1:]]))

    def _tensor(self, raw: NDArray[np.uint8], shape: torch.Size) -> Tensor:
        return (
            torch.from_numpy(raw.reshape(-1)).view(self.dtype).view(shape)
            if raw.size
            else torch.empty(shape, dtype=self.dtype)
        )


@dataclass(frozen=True)
class StoredColumns:
    """A tensor whose ranges of columns are in files, each range with all rows.

    Attributes:
        shape: of the whole tensor, [N, D].
        parts: the ranges, in order.
    """

    shape: torch.Size
    parts: Sequence[StoredRows]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice | EllipsisType) -> Tensor:
        """Return rows, as `StoredRows` does."""
        return torch.cat([part[index] for part in self.parts], 1)


def stored_tensors(path: Path) -> tuple[dict[str, StoredRows], dict[str, str]]:
    """Open a safetensors file: its tensors, left in the file, and its metadata.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        size = path.stat().st_size
        if 8 + length > size:
            raise ValueError(f"{path.name}: incomplete safetensors file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        shape, dtype, (begin, end) = torch.Size(entry["shape"]), TYPES[entry["dtype"]], entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"{path.name}: {size:,} bytes, expected {8 + length + end:,}")
        bytes_shape = (shape[0] if shape else 1, dtype.itemsize * math.prod(shape[1:]))
        raw: NDArray[np.uint8] = np.empty(bytes_shape, dtype=np.uint8)
        if end > begin:  # an empty range cannot be mapped
            raw = np.memmap(path, np.uint8, "r", offset=8 + length + begin, shape=bytes_shape)
        found[name] = StoredRows(shape, dtype, [(0, raw)])
    return found, metadata


def side_by_side(name: str, shape: torch.Size, parts: Sequence[tuple[int, StoredRows]]) -> StoredColumns:
    """Combine ranges of columns into one tensor, each given with the number of its first column.

    Raises:
        ValueError: columns are missing.
    """
    runs = [part for _, part in sorted(parts, key=lambda run: run[0]) if part.shape[1]]
    there = sum(part.shape[1] for part in runs if len(part) == shape[0])
    if there != shape[1]:
        raise ValueError(f"found {there:,} of the {shape[1]:,} columns of {name}; a file is missing")
    return StoredColumns(shape, runs)


def joined(name: str, shape: torch.Size, parts: Sequence[tuple[int, StoredRows]]) -> StoredRows:
    """Combine ranges of rows into one tensor, each given with the number of its first row.

    Raises:
        ValueError: rows are missing.
    """
    runs = sorted(((first, part) for first, part in parts if len(part)), key=lambda run: run[0])
    there = 0
    for first, part in runs:
        there = there + len(part) if first == there and part.shape[1:] == shape[1:] else -1
        if there < 0:
            break
    if there != shape[0]:
        held = sum(len(part) for _, part in runs)
        raise ValueError(f"found {held:,} of the {shape[0]:,} rows of {name}; a file is missing")
    return StoredRows(shape, parts[0][1].dtype, [(first, part.runs[0][1]) for first, part in runs])
