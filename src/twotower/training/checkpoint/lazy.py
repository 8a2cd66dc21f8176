"""Lazily opened checkpoints, to read selected rows without loading whole tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from twotower.distributed.launch import Launch
from twotower.distributed.row_files import StoredColumns, StoredRows, side_by_side, stack_rows, stored_tensors
from twotower.errors import InputError
from twotower.system.checksums import verify_checksums
from twotower.training.checkpoint.codec import decode, parts_in
from twotower.training.checkpoint.parts import FOLDER, OFFSETS, PLACE


def open_checkpoint(source: Path) -> dict[str, Any]:
    """Open a checkpoint as `SafeCheckpointIO.load_checkpoint` does, but leave the tensors in their files.

    The first process of each machine compares the checksums.

    Raises:
        InputError: a file is missing or damaged.
    """
    if Launch.of_environment().local_rank == 0:
        verify_checksums(source, "remove it, or train again")  # older versions wrote none
    try:
        tensors, _ = stored_tensors(source / "tensors.safetensors")
        structure = json.loads((source / "state.json").read_text(encoding="utf-8"))
        kept = dict(parts_in(structure))
        parts = _parts(source / FOLDER) if kept else {}
        shared = {name: _whole(name, torch.Size(one.shape), parts.get(name, [])) for name, one in kept.items()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: not a readable checkpoint ({error}); remove it, or train again") from error
    opened: dict[str, Any] = decode(structure, {**tensors, **shared})
    return opened


def _whole(name: str, shape: torch.Size, parts: list[tuple[list[int], StoredRows]]) -> StoredRows | StoredColumns:
    """Combine the parts of all ranks into one tensor: ranges of its rows, or of its columns."""
    if any(rows.shape[1:] != shape[1:] for _, rows in parts):
        return side_by_side(name, shape, [(offsets[1], rows) for offsets, rows in parts])
    return stack_rows(name, shape, [(offsets[0], rows) for offsets, rows in parts])


def _parts(folder: Path) -> dict[str, list[tuple[list[int], StoredRows]]]:
    """Collect the parts of sharded tables by name from the files of all ranks, each with its offsets in the table."""
    parts: dict[str, list[tuple[list[int], StoredRows]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors, metadata = stored_tensors(file)
        place = json.loads(metadata[PLACE])
        for name, rows in tensors.items():
            parts.setdefault(name, []).append((place[name][OFFSETS], rows))
    return parts
