"""Tensors in safetensors files: each rank writes its own rows, and readers read only the rows they request.

A folder that ranks write together (`write_folder`) appears complete or not at all.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.system.filesystem import PARTIAL, TOKEN_LENGTH, full_disk_named, whole_folder

#: safetensors names of the types that a table or embeddings may have.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
#: Number of bytes written at a time.
BLOCK = 64 << 20


def write_folder(target: Path, ranks: Communicator, *writes: Callable[[Path], None]) -> None:
    """Call every `write(folder)` on every rank with the same temporary folder, then rename it to `target`; collective.

    All ranks finish one `write` before the next `write` starts. So a failure on one rank, such as a full disk, is
    raised before other ranks wait for this rank in an exchange.

    Raises:
        InputError: the disk is full, or another rank could not write its part. A rank's own error is raised unchanged.
    """
    if ranks.is_first:
        with whole_folder(target) as folder:
            _shared_name(folder, target, ranks)
            for write in writes:
                _write_all(folder, target, ranks, write)
    else:
        folder = _shared_name(None, target, ranks)
        with full_disk_named(target):
            for write in writes:
                _write_all(folder, target, ranks, write)
    ranks.wait()  # no rank reads before rank 0 has renamed the folder


def save_rows(
    path: Path,
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, int],
    ranks: Communicator,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file of tensors whose rows are divided among the ranks; collective.

    Args:
        path: the file, on a file system that all ranks share.
        tensors: tensors by name, in the same order on every rank. A tensor named in `rows` is a rank's range of rows,
            [n, ...]; ranges are in rank order. All other tensors are whole, and written by rank 0.
        rows: N by name, for the tensors whose rows are divided among the ranks.
        ranks: the processes that write.
        metadata: metadata of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name, tensor in tensors.items():
        shape = [rows.get(name, len(tensor)), *tensor.shape[1:]] if tensor.ndim else []
        begins[name] = end
        end += int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    if ranks.is_first:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(data + end)
    ranks.wait()
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            first = 0
            if name in rows:
                first = sum(ranks.sizes(len(tensor), ranks.device)[: ranks.rank])
            elif not ranks.is_first:
                continue
            each = tensor[0].numel() * tensor.element_size() if tensor.ndim and len(tensor) else tensor.element_size()
            file.seek(data + begins[name] + first * each)
            _write(file, tensor.detach(), each)
    ranks.wait()


def _write(file: BinaryIO, tensor: Tensor, each: int) -> None:
    flat = tensor.reshape(-1) if tensor.ndim < 2 else tensor
    for block in torch.split(flat, max(BLOCK // max(each, 1), 1)):
        raw = block.cpu().contiguous().view(-1).view(torch.uint8)
        file.write(raw.numpy().data)


def _write_all(folder: Path, target: Path, ranks: Communicator, write: Callable[[Path], None]) -> None:
    failed: Exception | None = None
    try:
        write(folder)
    except Exception as error:  # raised after the ranks agree, so that no rank waits for this one
        failed = error
    if ranks.agree(failed is not None):
        raise failed or InputError(f"{target}: another rank could not write its part; nothing was replaced")


def _shared_name(folder: Path | None, target: Path, ranks: Communicator) -> Path:
    """Return rank 0's temporary folder on every rank."""
    length = len(target.name) + len(f"..{'0' * TOKEN_LENGTH}.{PARTIAL}")
    name = torch.zeros(4 * length, dtype=torch.uint8, device=ranks.device)
    if folder is not None:
        raw = folder.name.encode()
        name[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    ranks.copy_first([name])
    return target.with_name(bytes(name.tolist()).rstrip(b"\0").decode())


#: Types by safetensors name: the types in `DTYPES`, and some that only small tensors have.
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
        shape: shape of the whole tensor.
        dtype: type of the values.
        runs: the first row and the bytes, uint8 [n, bytes per row], of each range; the ranges cover all rows, in order.
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
            return self._read_rows(index.numpy())
        if isinstance(index, slice):
            return self._read_rows(np.arange(*index.indices(len(self))))
        return self._tensor(np.concatenate([run for _, run in self.runs]), self.shape)

    def _read_rows(self, rows: NDArray[np.int64]) -> Tensor:
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
    """A tensor whose ranges of columns are in files; each range contains all rows.

    Attributes:
        shape: shape of the whole tensor, [N, D].
        parts: the ranges, in order.
    """

    shape: torch.Size
    parts: Sequence[StoredRows]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""
        return self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice | EllipsisType) -> Tensor:
        """Return rows as in `StoredRows`."""
        return torch.cat([part[index] for part in self.parts], 1)


#: Bytes of one value by safetensors type.
VALUE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
#: Largest header of a safetensors file, enough for 10,000 tensors.
MOST_HEADER = 2 << 20


@dataclass(frozen=True)
class StoredShape:
    """Description of a tensor in the header of a safetensors file.

    Attributes:
        dtype: type of the values by its safetensors name, such as "F32".
        shape: shape of the tensor.
        begin: position of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int


def stored_shapes(path: Path) -> tuple[dict[str, StoredShape], dict[str, str]]:
    """Read the header of a safetensors file: its tensors by name, and the metadata. No tensor is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is incomplete or damaged; the tensors must fill it exactly.
    """
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        size = path.stat().st_size
        if 8 + length > size:
            raise ValueError(f"{path.name}: incomplete safetensors file")
        if length > MOST_HEADER:
            raise ValueError(f"{path.name}: a header of {length:,} bytes, expected at most {MOST_HEADER:,}")
        try:
            header = json.loads(file.read(length))
            metadata = dict(header.pop("__metadata__", None) or {})
            found = {
                name: StoredShape(one["dtype"], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
                for name, one in header.items()
            }
            ends = {name: 8 + length + one["data_offsets"][1] for name, one in header.items()}
            total = sum(
                math.prod(_counted(one.shape)) * VALUE_BYTES[one.dtype] if ends[name] - one.begin else 0
                for name, one in found.items()
            )
            fits = all(
                ends[name] - one.begin == math.prod(_counted(one.shape)) * VALUE_BYTES[one.dtype]
                and 8 + length <= one.begin <= ends[name] <= size
                for name, one in found.items()
            )
        except (RecursionError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path.name}: damaged safetensors header ({type(error).__name__}: {error})") from None
    if not fits or 8 + length + total != size:
        raise ValueError(f"{path.name}: {size:,} bytes, expected {8 + length + total:,}")
    return found, metadata


def _counted(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not all(type(count) is int and count >= 0 for count in shape):
        raise TypeError(f"shape {list(shape)!r:.80}")
    return shape


def stored_tensors(path: Path) -> tuple[dict[str, StoredRows], dict[str, str]]:
    """Open a safetensors file; return the tensors, which stay in the file, and the metadata.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    described, metadata = stored_shapes(path)
    found = {}
    for name, one in described.items():
        shape, dtype = torch.Size(one.shape), TYPES[one.dtype]
        bytes_shape = (shape[0] if shape else 1, dtype.itemsize * math.prod(shape[1:]))
        raw: NDArray[np.uint8] = np.empty(bytes_shape, dtype=np.uint8)
        if raw.size:  # an empty range cannot be mapped
            raw = np.memmap(path, np.uint8, "r", offset=one.begin, shape=bytes_shape)
        found[name] = StoredRows(shape, dtype, [(0, raw)])
    return found, metadata


def side_by_side(name: str, shape: torch.Size, parts: Sequence[tuple[int, StoredRows]]) -> StoredColumns:
    """Combine ranges of columns, each paired with the number of its first column, into one tensor.

    Raises:
        ValueError: columns are missing.
    """
    runs = [part for _, part in sorted(parts, key=lambda run: run[0]) if part.shape[1]]
    there = sum(part.shape[1] for part in runs if len(part) == shape[0])
    if there != shape[1]:
        raise ValueError(f"found {there:,} of the {shape[1]:,} columns of {name}; a file is missing")
    return StoredColumns(shape, runs)


def stack_rows(name: str, shape: torch.Size, parts: Sequence[tuple[int, StoredRows]]) -> StoredRows:
    """Combine ranges of rows, each paired with the number of its first row, into one tensor.

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
