"""Sharded tables in a checkpoint, with their optimizer state, by torch.distributed.checkpoint.

Each rank writes its part to its own files, in safetensors format with the offsets of the part in the header. So any
number of ranks can read the rows they need, for any old and new placement, and nothing is unpickled. Writing never
needs a second copy of a table.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.row_files import save_rows
from twotower.towers.sharded_lookup import shared_tables_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from twotower.towers import EmbeddingTable


#: Metadata key under which `HuggingFaceStorageReader` looks for the offsets of a file's rows.
PLACE, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


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


#: Folder of a checkpoint that contains the parts of sharded tables.
FOLDER = "tables"


@dataclass(frozen=True)
class TensorShard:
    """A tensor that is sharded over ranks.

    Attributes:
        tensor: this rank's part.
        part: the rows of the whole tensor in this part.
        table: the name of the table that it belongs to.
    """

    tensor: Tensor
    part: RowShard
    table: str

    @property
    def shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return self.part.whole_shape(self.tensor)


@dataclass(frozen=True)
class StoredTensor:
    """Description of a table, or of its optimizer state, in `tables/` of a checkpoint.

    Attributes:
        shape, dtype: shape and dtype of the whole tensor.
        table: the name of the table; None in checkpoints of older versions.
    """

    shape: list[int]
    dtype: torch.dtype
    table: str | None


def mark_parts(checkpoint: dict[str, Any], module: nn.Module, optimizers: Collection[torch.optim.Optimizer]) -> None:
    """Replace the tensors of sharded tables in a Lightning checkpoint with `TensorShard`."""
    tables = {id(table.weight): table for table in shared_tables_of(module)}
    marked: dict[int, TensorShard] = {}  # a table with two names is the same object under both, so it is written once
    for name, parameter in module.named_parameters(remove_duplicate=False):
        table = tables.get(id(parameter))
        if table is not None:
            marked.setdefault(id(parameter), _part_of(checkpoint["state_dict"][name], table))
            checkpoint["state_dict"][name] = marked[id(parameter)]
    for optimizer, saved in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        for number, table in _numbered(optimizer, tables).items():
            if number in saved["state"]:  # replaced, not modified: the optimizer still uses the old mapping
                state = saved["state"][number]
                saved["state"][number] = {n: _part_of(v, table) if v.ndim else v for n, v in state.items()}


def _part_of(tensor: Tensor, table: EmbeddingTable) -> TensorShard:
    part = table.part
    assert part is not None and table.name is not None
    return TensorShard(tensor, part, table.name)


def cut_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Cut a whole optimizer state to this rank's parts of sharded tables."""
    tables = {id(table.weight): table for table in shared_tables_of(module)}
    for number, table in _numbered(optimizer, tables).items():
        for name, value in state["state"].get(number, {}).items():
            own = value if table.part is None or not value.ndim else table.part.cut(value)
            if own.shape != value.shape:
                state["state"][number][name] = own.clone(memory_format=torch.contiguous_format)


def _numbered(optimizer: torch.optim.Optimizer, tables: Mapping[int, EmbeddingTable]) -> dict[int, EmbeddingTable]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: tables[id(one)] for number, one in enumerate(parameters) if id(one) in tables}


def save_parts(folder: Path, parts: Mapping[str, TensorShard], ranks: Communicator) -> None:
    """Write parts, by name, into a folder; collective.

    Args:
        folder: created if missing.
        parts: the parts to write, on the CPU.
        ranks: the processes that write; their group exchanges CPU tensors.

    Raises:
        OSError: a rank could not write its part.
    """
    # Importing these takes seconds, so only runs with sharded tables do.
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

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
        folder: written by `save_parts`, by any number of ranks and with any placement.
        stored: the tensors to read, by name.
        ranks: the processes that read.
        parts: this rank's parts of sharded tables, by name.

    Raises:
        ValueError: a table is incomplete, because the file of a rank is missing.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

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
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415

    group: Any = torch.distributed.group.WORLD if ranks.group is None else ranks.group
    return DeviceMesh.from_group(group, "cpu")


def _has(part: RowShard) -> bool:
    """Return whether this rank reads and writes rows of the table; an unsharded table belongs to one rank."""
    return part.holder in (None, part.ranks.rank)


def _distributed(own: Tensor, part: RowShard, mesh: DeviceMesh) -> Tensor:
    """Wrap the part as a DTensor, which has its offsets in the whole tensor."""
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    if part.holder is not None:
        return own
    shape = torch.Size(part.whole_shape(own))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
