"""Shared tables in a checkpoint: the rows and their optimizer state, written by torch.distributed.checkpoint.

Each rank writes its rows into a file of its own, safetensors with the place of the rows in its header, so that any
number of ranks finds its rows in them again, and nothing is unpickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twotower.ranks import Ranks
from twotower.towers.lookups import shared_tables_of
from twotower.towers.shards import Part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Folder of a checkpoint that holds the rows of shared tables.
FOLDER = "tables"


@dataclass(frozen=True)
class PartOf:
    """A tensor of which this rank has some rows.

    Attributes:
        tensor: this rank's rows, [n, ...].
        part: which rows of how many these are.
    """

    tensor: Tensor
    part: Part


def mark_parts(checkpoint: dict[str, Any], module: nn.Module, optimizers: Collection[torch.optim.Optimizer]) -> None:
    """Replace in a checkpoint of Lightning what belongs to rows of shared tables by `PartOf`."""
    parts = {id(table.weight): table.part for table in shared_tables_of(module)}
    marked: dict[int, PartOf] = {}  # a table with two names is one object under both, and so written once
    for name, parameter in module.named_parameters(remove_duplicate=False):
        part = parts.get(id(parameter))
        if part is not None:
            marked.setdefault(id(parameter), PartOf(checkpoint["state_dict"][name], part))
            checkpoint["state_dict"][name] = marked[id(parameter)]
    for optimizer, saved in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        for number, part in _numbered(optimizer, parts).items():
            if number in saved["state"]:  # a new mapping: the optimizer goes on with the old one
                state = saved["state"][number]
                saved["state"][number] = {n: PartOf(v, part) if v.ndim else v for n, v in state.items()}


def cut_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Leave this rank's rows of a state that was saved whole."""
    parts = {id(table.weight): table.part for table in shared_tables_of(module)}
    for number, part in _numbered(optimizer, parts).items():
        for name, value in state["state"].get(number, {}).items():
            if value.ndim and len(value) == part.rows != len(part):
                state["state"][number][name] = value[part.own].clone()


def _numbered(optimizer: torch.optim.Optimizer, parts: Mapping[int, Part | None]) -> dict[int, Part]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {number: parts.get(id(parameter)) for number, parameter in enumerate(parameters)}
    return {number: part for number, part in found.items() if part is not None}


def save_parts(folder: Path, parts: Mapping[str, PartOf], ranks: Ranks) -> None:
    """Write parts, by name, into a folder; collective.

    Args:
        folder: made where it is not there.
        parts: on the CPU.
        ranks: who writes; their group exchanges CPU tensors.

    Raises:
        OSError: a rank could not write.
    """
    # Seconds, which only shared tables are worth.
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    from twotower.training.streamed_writer import StreamedWriter  # noqa: PLC0415

    mesh = _mesh(ranks)
    folder.mkdir(exist_ok=True)
    state = {name: _distributed(found.tensor, found.part, mesh) for name, found in parts.items()}
    try:
        with ranks.exchange():
            save(state, storage_writer=StreamedWriter(str(folder)), process_group=ranks.group)
    except CheckpointException as error:
        raise OSError(f"{folder}: {'; '.join(str(one) for one in error.failures.values())}") from error


def load_parts(
    folder: Path, shapes: Mapping[str, tuple[list[int], torch.dtype]], ranks: Ranks, shared: Collection[int]
) -> dict[str, Tensor]:
    """Read this rank's rows of tables with so many rows as `shared` names, and any other table whole; collective.

    Args:
        folder: what `save_parts` wrote, by any number of ranks.
        shapes: of the whole tensors, and their types, by name: those that are wanted.
        ranks: who reads.
        shared: N of the tables that these ranks hold by parts.

    Raises:
        ValueError: rows are missing: the file of a rank is not there.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    reader = HuggingFaceStorageReader(str(folder))
    kept = reader.read_metadata().state_dict_metadata
    for name, (shape, _) in shapes.items():
        # What no file holds would be left as it is, without a word.
        chunks: list[Any] = getattr(kept.get(name), "chunks", [])
        there = sum(int(chunk.sizes[0]) for chunk in chunks)
        if there != shape[0]:
            raise ValueError(f"{folder.name}/: {there:,} of the {shape[0]:,} rows of {name}; a file is missing")
    state: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    mesh = _mesh(ranks) if ranks.size > 1 else None
    for name, (shape, dtype) in shapes.items():
        if mesh is not None and shape[0] in shared:
            part = Part(ranks, shape[0])
            found[name] = torch.empty(len(part), *shape[1:], dtype=dtype)
            state[name] = _distributed(found[name], part, mesh)
        else:
            found[name] = state[name] = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings(), ranks.exchange():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
        load(state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
    return found


def _mesh(ranks: Ranks) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415

    group: Any = torch.distributed.group.WORLD if ranks.group is None else ranks.group
    return DeviceMesh.from_group(group, "cpu")


def _distributed(own: Tensor, part: Part, mesh: DeviceMesh) -> Tensor:
    """The rows as a tensor that knows where among all rows it stands."""
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    shape = (part.rows, *own.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
