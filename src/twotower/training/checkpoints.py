"""Checkpoints of a running training: one folder with safetensors and JSON, written whole or not at all, no pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.errors import InputError
from twotower.files import whole_folder


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `state.json` (structure, numbers, strings) beside `tensors.safetensors`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a temporary folder beside `path`, then rename."""
        del storage_options
        tensors: dict[str, Tensor] = {}
        structure = _encode(checkpoint, tensors, "checkpoint")
        with whole_folder(Path(path)) as folder:
            save_file(tensors, folder / "tensors.safetensors")
            (folder / "state.json").write_text(json.dumps(structure), encoding="utf-8")

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint back.

        Raises:
            InputError: a file is missing or damaged.
        """
        del map_location, weights_only
        source = Path(path)
        try:
            tensors = load_file(source / "tensors.safetensors")
            structure = json.loads((source / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{source}: not a readable checkpoint ({error}); remove it and train again") from error
        checkpoint: dict[str, Any] = _decode(structure, tensors)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder."""
        shutil.rmtree(path, ignore_errors=True)


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        own = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied weights; a copy of all would double the tables.
        place = own.untyped_storage().data_ptr()
        is_shared = place != 0 and any(place == other.untyped_storage().data_ptr() for other in tensors.values())
        tensors[name] = own.clone() if is_shared else own
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[_encode(key, tensors, name), _encode(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, tensors, f"{name}.{place}") for place, item in enumerate(value)]}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint without pickle")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def random_state() -> dict[str, Tensor]:
    """The state of torch's random generators, for the checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Go on with the random numbers where a checkpoint left off."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
