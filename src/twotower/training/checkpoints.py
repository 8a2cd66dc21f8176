"""Checkpoints of a running training: one folder with safetensors and JSON, written whole or not at all, no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.errors import InputError
from twotower.files import whole_folder
from twotower.ranks import Ranks
from twotower.shared_files import write_folder
from twotower.training.table_parts import FOLDER, PartOf, load_parts, save_parts


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `state.json` (structure, numbers, strings) beside `tensors.safetensors`.

    Rows of tables that ranks share stand beside them in `tables/`, a file for each rank (table_parts.py); what is
    marked as such (`PartOf`) is written and read by all ranks together, and everything else by the first alone.

    Args:
        ranks: the processes of the run; a process alone where None.
        shared: N of the tables that they hold by parts. Of any other table in `tables/` every rank reads all rows.
    """

    def __init__(self, ranks: Ranks | None = None, shared: Collection[int] = ()) -> None:
        self.ranks, self.shared = ranks or Ranks(), frozenset(shared)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a temporary folder beside `path`, then rename; collective where there are parts of tables."""
        del storage_options
        tensors: dict[str, Tensor | PartOf] = {}
        structure = _encode(checkpoint, tensors, "checkpoint")
        parts = {name: one for name, one in tensors.items() if isinstance(one, PartOf)}
        whole = {name: one for name, one in tensors.items() if isinstance(one, Tensor)}

        def write(folder: Path) -> None:
            if not parts or self.ranks.is_first:
                save_file(whole, folder / "tensors.safetensors")
                (folder / "state.json").write_text(json.dumps(structure), encoding="utf-8")

        if parts:
            write_folder(Path(path), self.ranks, write, lambda folder: save_parts(folder / FOLDER, parts, self.ranks))
            return
        with whole_folder(Path(path)) as folder:
            write(folder)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint back; collective where there are parts of tables.

        Raises:
            InputError: a file is missing or damaged.
        """
        del map_location, weights_only
        return self._load(Path(path))

    def load_weights(self, path: str | Path) -> dict[str, Tensor]:
        """The model's state dict alone: optimizer state of shared tables stays on disk."""
        weights: dict[str, Tensor] = self._load(Path(path), "state_dict")["state_dict"]
        return weights

    def _load(self, source: Path, only: str | None = None) -> dict[str, Any]:
        try:
            tensors = load_file(source / "tensors.safetensors")
            structure = json.loads((source / "state.json").read_text(encoding="utf-8"))
            if only is not None:
                structure = {"dict": [pair for pair in structure["dict"] if pair[0] == only]}
            shapes = dict(_parts_in(structure))
            if shapes:
                tensors |= load_parts(source / FOLDER, shapes, self.ranks, self.shared)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{source}: not a readable checkpoint ({error}); remove it and train again") from error
        checkpoint: dict[str, Any] = _decode(structure, tensors)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder."""
        shutil.rmtree(path, ignore_errors=True)


def _encode(value: Any, tensors: dict[str, Tensor | PartOf], name: str) -> Any:
    if isinstance(value, PartOf):
        first = next((other for other, part in tensors.items() if part is value), name)
        tensors[first] = value
        shape, dtype = [value.part.rows, *value.tensor.shape[1:]], str(value.tensor.dtype).removeprefix("torch.")
        return {"part": {"name": first, "shape": shape, "dtype": dtype}}
    if isinstance(value, Tensor):
        own = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied weights; a copy of all would double the tables.
        place = own.untyped_storage().data_ptr()
        is_shared = place != 0 and any(
            isinstance(other, Tensor) and place == other.untyped_storage().data_ptr() for other in tensors.values()
        )
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
    if kind == "part":
        return tensors[content["name"]]
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _parts_in(value: Any) -> Iterator[tuple[str, tuple[list[int], torch.dtype]]]:
    """Names, whole shapes and types of the parts of tables in an encoded checkpoint."""
    if isinstance(value, dict) and "part" in value:
        told = value["part"]
        yield told["name"], (told["shape"], getattr(torch, told["dtype"]))
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _parts_in(inner)


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
