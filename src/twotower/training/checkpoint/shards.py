"""Sharded tables in a checkpoint, with their optimizer state, saved and loaded by torch.distributed.checkpoint.

Each rank writes its part to its own files, in safetensors format with the offsets of the part in the header. So any
number of ranks can read the rows they need, for any old and new placement, and nothing is unpickled. Writing never
needs a second copy of a table. Importing this file takes seconds, so only training imports it; parts.py is enough to
read a checkpoint row by row.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.row_files import save_rows
from twotower.training.checkpoint.parts import OFFSETS, PLACE, StoredTensor, TensorShard


class StreamedWriter(HuggingFaceStorageWriter):
    """A writer of the same files as `HuggingFaceStorageWriter` with `save_distributed`, one per tensor and rank.

    The base class serializes a file in memory before writing it, so a rank would need up to three times the memory of
    its rows. This class writes the rows block by block.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors."""
        shard = plan.storage_data["shard_index"]
        for number, item in enumerate(plan.items, start=1):
            data = item.tensor_data
            assert data is not None
            place = {item.index.fqn: {OFFSETS: list(data.chunk.offsets)}}
            name = f"shard-{shard:05d}-model-{number:05d}-of-{len(plan.items):05d}.safetensors"
            tensor: Any = planner.resolve_data(item)
            save_rows(Path(self.path) / name, {item.index.fqn: tensor}, {}, Communicator(), {PLACE: json.dumps(place)})
        done: Future[Any] = Future()
        done.set_result([])
        return done


def save_parts(folder: Path, parts: Mapping[str, TensorShard], ranks: Communicator) -> None:
    """Write parts, by name, into a folder; collective.

    Args:
        folder: where the files are written; created if missing.
        parts: the parts to write, on the CPU.
        ranks: the processes that write; their group exchanges CPU tensors.

    Raises:
        OSError: a rank could not write its part.
    """
    mesh = _mesh(ranks)
    folder.mkdir(exist_ok=True)
    state = {name: _distributed(found.tensor, found.part, mesh) for name, found in parts.items() if _has(found.part)}
    try:
        with ranks.exchange():
            save(state, storage_writer=StreamedWriter(str(folder)), process_group=ranks.group)
    except CheckpointException as error:
        raise OSError(f"{folder}: {'; '.join(str(one) for one in error.failures.values())}") from error


def load_parts(
    folder: Path, stored: Mapping[str, StoredTensor], ranks: Communicator, parts: Mapping[str, RowShard]
) -> dict[str, Tensor]:
    """Read this rank's parts of the tables in `parts`, and any other table whole; collective.

    Args:
        folder: a folder written by `save_parts`, with any number of ranks and any placement.
        stored: the tensors to read, by name.
        ranks: the processes that read.
        parts: this rank's parts of sharded tables, by name.

    Raises:
        ValueError: a table is incomplete, because the file of a rank is missing.
    """
    reader = HuggingFaceStorageReader(str(folder))
    kept = reader.read_metadata().state_dict_metadata
    for name, tensor in stored.items():
        # torch silently leaves values that are in no file uninitialized.
        chunks: list[Any] = getattr(kept.get(name), "chunks", [])
        there, needed = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(tensor.shape)
        if there != needed:
            raise ValueError(f"{folder.name}/: found {there:,} of the {needed:,} numbers of {name}; a file is missing")
    state: dict[str, Tensor] = {}
    loaded: dict[str, Tensor] = {}
    mesh = _mesh(ranks) if ranks.size > 1 else None
    for name, tensor in stored.items():
        part = parts.get(tensor.table or "")
        if (
            mesh is None
            or part is None
            or part.cut(torch.empty(tensor.shape, device="meta")).shape == tuple(tensor.shape)
        ):
            loaded[name] = state[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            continue
        loaded[name] = torch.empty(part.cut(torch.empty(tensor.shape, device="meta")).shape, dtype=tensor.dtype)
        if _has(part):
            state[name] = _distributed(loaded[name], part, mesh)
    with warnings.catch_warnings(), ranks.exchange():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
        load(state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
    return loaded


def _mesh(ranks: Communicator) -> DeviceMesh:
    group: Any = torch.distributed.group.WORLD if ranks.group is None else ranks.group
    return DeviceMesh.from_group(group, "cpu")


def _has(part: RowShard) -> bool:
    """Return whether this rank reads and writes rows of the table; a table-wise table belongs to one rank."""
    return part.holder in (None, part.ranks.rank)


def _distributed(own: Tensor, part: RowShard, mesh: DeviceMesh) -> Tensor:
    """Wrap a part as a DTensor, which knows its offsets in the whole tensor; leave a table on a single rank as is."""
    if part.holder is not None:
        return own
    shape = torch.Size(part.whole_shape(own))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
