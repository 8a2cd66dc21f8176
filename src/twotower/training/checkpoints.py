"""Checkpoints of a running training: one folder with safetensors and JSON, written whole or not at all, no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.errors import InputError
from twotower.files import whole_folder
from twotower.ranks import Ranks
from twotower.shared_files import write_folder
from twotower.towers.parts import Part
from twotower.training.background import Background
from twotower.training.encoding import Encoder, decode, parts_in
from twotower.training.table_parts import FOLDER, PartOf, load_parts, save_parts


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `state.json` (structure, numbers, strings) beside `tensors.safetensors`.

    Parts of tables that ranks share stand beside them in `tables/`, in files of each rank (table_parts.py); what is
    marked as such (`PartOf`) is written and read by all ranks together, and everything else by the first alone.

    Written in the background, a checkpoint is that of the step at which it was asked for: `save_checkpoint` copies the
    state, on a CPU, and returns. One is written at a time, so there is one copy; the next `save_checkpoint`, a load and
    `wait` come after it, and raise what it has failed with. torch's `async_save` is the same thread around the
    tables alone; here the whole folder has to appear at once, with what the first rank writes beside them.

    Args:
        ranks: the processes of the run; a process alone where None.
        parts: the tables that they hold by parts, by name. Any other table in `tables/` every rank reads whole.
        in_background: write while training goes on. Collective where there are `parts`: the ranks then have a process
            group of their own for it, whose exchanges do not meet those of the steps.
        timeout: seconds that an exchange of this group waits for the others.
    """

    def __init__(
        self,
        ranks: Ranks | None = None,
        parts: Mapping[str, Part] | None = None,
        *,
        in_background: bool = False,
        timeout: int = 600,
    ) -> None:
        self.ranks, self.parts = ranks or Ranks(), dict(parts or {})
        self._background = Background() if in_background else None
        self._writers = self.ranks
        if in_background and self.parts and self.ranks.size > 1:
            self._writers = Ranks.current(_own_group(self.ranks, timedelta(seconds=timeout)))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a temporary folder beside `path`, then rename; collective where there are parts of tables.

        Raises:
            InputError: the disk is full; in the background, it was when the one before was written.
        """
        del storage_options
        self.wait()  # before anything is copied
        state = Encoder(copies=self._background is not None, of_parts=bool(self.parts) and not self.ranks.is_first)
        structure = state.encode(checkpoint, "checkpoint")
        if self._background is None:
            self._write(Path(path), structure, state.whole, state.parts)
        else:
            self._background.start(lambda: self._write(Path(path), structure, state.whole, state.parts))

    def _write(self, path: Path, structure: Any, whole: dict[str, Tensor], parts: dict[str, PartOf]) -> None:
        def write(folder: Path) -> None:
            if not parts or self.ranks.is_first:
                save_file(whole, folder / "tensors.safetensors")
                (folder / "state.json").write_text(json.dumps(structure), encoding="utf-8")

        if parts:
            ranks = self._writers
            write_folder(path, ranks, write, lambda folder: save_parts(folder / FOLDER, parts, ranks))
            return
        with whole_folder(path) as folder:
            write(folder)

    def wait(self) -> None:
        """Return when the last checkpoint is in its place.

        Raises:
            InputError: the disk was full.
            RankLost: another rank is gone.
        """
        if self._background is not None:
            self._background.wait()

    def settle(self) -> None:
        """`wait` on every rank, so that all of them find the checkpoint; collective.

        Raises:
            InputError, RankLost: as `wait`.
        """
        self.wait()
        if self._background is not None:
            self.ranks.wait()

    def close(self) -> None:
        """Wait, whatever comes of it, and end the thread."""
        if self._background is not None:
            self._background.close()

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint back; collective where there are parts of tables.

        Raises:
            InputError: a file is missing or damaged.
        """
        del map_location, weights_only
        self.wait()
        return self._load(Path(path))

    def load_weights(self, path: str | Path) -> dict[str, Tensor]:
        """The model's state dict alone: optimizer state of shared tables stays on disk."""
        self.wait()
        weights: dict[str, Tensor] = self._load(Path(path), "state_dict")["state_dict"]
        return weights

    def _load(self, source: Path, only: str | None = None) -> dict[str, Any]:
        try:
            tensors = load_file(source / "tensors.safetensors")
            structure = json.loads((source / "state.json").read_text(encoding="utf-8"))
            if only is not None:
                structure = {"dict": [pair for pair in structure["dict"] if pair[0] == only]}
            wanted = dict(parts_in(structure))
            if wanted:
                tensors |= load_parts(source / FOLDER, wanted, self.ranks, self.parts)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{source}: not a readable checkpoint ({error}); remove it and train again") from error
        checkpoint: dict[str, Any] = decode(structure, tensors)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder."""
        self.wait()
        shutil.rmtree(path, ignore_errors=True)


def _own_group(ranks: Ranks, timeout: timedelta) -> Any:
    """A process group of the same ranks, by gloo: tensors in files are CPU tensors, whatever the steps exchange.

    It lasts as long as the processes are joined: torch gives the next one of some ranks the name of one that has ended.
    """
    members = None if ranks.group is None else dist.get_process_group_ranks(ranks.group)
    return dist.new_group(members, timeout, "gloo", use_local_synchronization=members is not None)


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
