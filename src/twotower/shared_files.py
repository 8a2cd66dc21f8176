"""Folders and files that several ranks write together, each rank its own rows: complete or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.files import full_disk_named, whole_folder
from twotower.ranks import Ranks

#: safetensors names of the types that a table or its embeddings may have.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
#: Bytes written at a time.
BLOCK = 64 << 20


def write_folder(target: Path, ranks: Ranks, *writes: Callable[[Path], None]) -> None:
    """Call every `write(folder)` on every rank with one temporary folder, then rename it to `target`; collective.

    All ranks finish one `write` before the next one starts. So a failure on one rank, such as a full disk while it
    writes its own files, is raised before other ranks wait for it in an exchange.

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


@dataclass(frozen=True)
class RowBlocks:
    """A rank's range of the rows of a tensor, produced block by block.

    Attributes:
        rows: number of rows in this range.
        width: D.
        dtype: type of the values.
        blocks: yields the blocks; collective.
    """

    rows: int
    width: int
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]


def save_rows(
    path: Path,
    tensors: Mapping[str, Tensor | RowBlocks],
    rows: Mapping[str, int],
    ranks: Ranks,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file of tensors whose rows are spread over ranks, each its own rows; collective.

    Args:
        path: the file, on a file system that all ranks share.
        tensors: by name, in the same order on every rank. A tensor named in `rows` is this rank's range of rows,
            [n, ...] or in blocks, and the ranges follow in rank order; any other is whole, and written by rank 0.
        rows: N of the tensors that are spread over ranks.
        ranks: the processes that write.
        metadata: of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name, tensor in tensors.items():
        own = [tensor.rows, tensor.width] if isinstance(tensor, RowBlocks) else list(tensor.shape)
        shape = [rows.get(name, own[0]), *own[1:]] if own else []
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
                count = tensor.rows if isinstance(tensor, RowBlocks) else len(tensor)
                first = sum(ranks.sizes(count, ranks.device)[: ranks.rank])
            elif not ranks.is_first:
                continue
            if isinstance(tensor, RowBlocks):
                _write_blocks(file, tensor, data + begins[name] + first * tensor.width * tensor.dtype.itemsize)
                continue
            each = tensor[0].numel() * tensor.element_size() if tensor.ndim and len(tensor) else tensor.element_size()
            file.seek(data + begins[name] + first * each)
            _write(file, tensor.detach(), each)
    ranks.wait()


def _write_blocks(file: BinaryIO, tensor: RowBlocks, begin: int) -> None:
    """Write blocks; after an error the remaining blocks are still produced, because the other ranks wait for them."""
    file.seek(begin)
    failed: OSError | None = None
    for block in tensor.blocks():
        try:
            if failed is None:
                _write(file, block, tensor.width * tensor.dtype.itemsize)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def _write(file: BinaryIO, tensor: Tensor, each: int) -> None:
    flat = tensor.reshape(-1) if tensor.ndim < 2 else tensor
    for block in torch.split(flat, max(BLOCK // max(each, 1), 1)):
        raw = block.cpu().contiguous().view(-1).view(torch.uint8)
        file.write(raw.numpy().data)


def _write_all(folder: Path, target: Path, ranks: Ranks, write: Callable[[Path], None]) -> None:
    failed: Exception | None = None
    try:
        write(folder)
    except Exception as error:  # raised after the ranks agree, so that none waits for this one
        failed = error
    if ranks.agree(failed is not None):
        raise failed or InputError(f"{target}: another rank could not write its part; nothing was replaced")


def _shared_name(folder: Path | None, target: Path, ranks: Ranks) -> Path:
    """Return the temporary folder of rank 0, on every rank."""
    length = len(target.name) + len(f"..{'0' * 12}.partial")
    name = torch.zeros(4 * length, dtype=torch.uint8, device=ranks.device)
    if folder is not None:
        raw = folder.name.encode()
        name[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    ranks.copy_first([name])
    return target.with_name(bytes(name.tolist()).rstrip(b"\0").decode())
