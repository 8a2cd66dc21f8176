"""A checkpoint whose tensors stay in their files: for who goes on with some of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from twotower.errors import InputError
from twotower.stored_rows import StoredRows, joined, stored_tensors
from twotower.training.encoding import decode, parts_in
from twotower.training.table_parts import FOLDER


def open_checkpoint(source: Path) -> dict[str, Any]:
    """What `SafeCheckpointIO.load_checkpoint` gives, with `StoredRows` in place of tensors, whoever has written it.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        tensors, _ = stored_tensors(source / "tensors.safetensors")
        structure = json.loads((source / "state.json").read_text(encoding="utf-8"))
        shapes = dict(parts_in(structure))
        runs = _runs(source / FOLDER) if shapes else {}
        tensors |= {name: joined(name, torch.Size(shape), runs.get(name, [])) for name, (shape, _) in shapes.items()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: not a readable checkpoint ({error}); remove it, or train anew") from error
    opened: dict[str, Any] = decode(structure, tensors)
    return opened


def _runs(folder: Path) -> dict[str, list[tuple[int, StoredRows]]]:
    """Runs of rows of the shared tables, by name, from the files of all ranks."""
    from twotower.training.streamed_writer import OFFSETS, PLACE  # noqa: PLC0415  # torch.distributed.checkpoint: seconds

    found: dict[str, list[tuple[int, StoredRows]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors, metadata = stored_tensors(file)
        place = json.loads(metadata[PLACE])
        for name, rows in tensors.items():
            found.setdefault(name, []).append((place[name][OFFSETS][0], rows))
    return found
