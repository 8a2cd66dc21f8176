"""Sharded tables in a training state: which tensors are parts of a table, and which rows they contain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twotower.distributed.partition import RowShard
from twotower.towers.sharded_lookup import shared_tables_of

if TYPE_CHECKING:
    from twotower.towers import EmbeddingTable

#: Metadata keys under which `HuggingFaceStorageReader` looks for the offsets of a file's rows.
PLACE, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
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
