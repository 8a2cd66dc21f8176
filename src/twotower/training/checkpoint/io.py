"""Checkpoints of a training run: a folder of safetensors and JSON files, without pickle, written atomically.

A checkpoint can be written by a background thread while training continues.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.row_files import write_folder
from twotower.errors import InputError
from twotower.system.checksums import verify_checksums, write_checksums
from twotower.system.filesystem import whole_folder
from twotower.training.checkpoint.codec import StateEncoder, decode, parts_in
from twotower.training.checkpoint.parts import FOLDER, TensorShard
from twotower.training.checkpoint.shards import load_parts, save_parts

ADVICE = "remove this checkpoint and resume from another, or train again"


class Background:
    """A thread that runs one task at a time; the error of a task is raised by the next call.

    The interpreter waits for the task before it exits, so no file is left half written.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start a task after the previous one has ended.

        Raises:
            Exception: the error of the previous task; the new task is then not started.
        """
        self.wait()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = self._threads.submit(work)

    def wait(self) -> None:
        """Wait until no task is running.

        Raises:
            Exception: the error of the task, raised once.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread. A pending error is dropped, because a different error is already propagating."""
        threads, self._threads, self._running = self._threads, None, None
        if threads is not None:
            threads.shutdown(wait=True)


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `state.json` (structure, numbers, strings) and `tensors.safetensors`.

    Parts of sharded tables are in `tables/`, in separate files per rank (shards.py). They are marked as `TensorShard`,
    and written and read by all ranks together; everything else is written by rank 0 alone and read by every rank.

    A checkpoint written in the background has the state of the step at which it was requested: `save_checkpoint` copies
    the state to the CPU and returns. Only one checkpoint is written at a time, so there is only one copy; the next
    `save_checkpoint`, `load_checkpoint` or `wait` waits for it and raises its error. torch's `async_save` uses a
    similar thread, but only for the tables; here the whole folder, including the files of rank 0, is renamed into place
    at once.

    Args:
        ranks: the processes of the run; None for a single process.
        parts: this rank's parts of sharded tables, by name. Any other table in `tables/` is read whole by every rank.
        in_background: write while training continues. Collective if there are `parts`: the ranks then use a separate
            process group, whose exchanges do not interleave with the exchanges of the steps.
        timeout: timeout of an exchange in this group, in seconds.
    """

    def __init__(
        self,
        ranks: Communicator | None = None,
        parts: Mapping[str, RowShard] | None = None,
        *,
        in_background: bool = False,
        timeout: int = 600,
    ) -> None:
        self.ranks, self.parts = ranks or Communicator(), dict(parts or {})
        self._background = Background() if in_background else None
        self._writers = self.ranks
        if in_background and self.parts and self.ranks.size > 1:
            self._writers = Communicator.current(_own_group(self.ranks, timedelta(seconds=timeout)))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a temporary folder next to `path`, then rename; collective if there are sharded tables.

        The files are on the disk before the rename. They have checksums, which `load_checkpoint` compares.

        Raises:
            InputError: the disk is full, or was full when the previous checkpoint was written in the background.
        """
        del storage_options
        self.wait()  # before anything is copied
        state = StateEncoder(copies=self._background is not None, of_parts=bool(self.parts) and not self.ranks.is_first)
        structure = state.encode(checkpoint, "checkpoint")
        if self._background is None:
            self._write(Path(path), structure, state.whole, state.parts)
        else:
            self._background.start(lambda: self._write(Path(path), structure, state.whole, state.parts))

    def _write(self, path: Path, structure: Any, whole: dict[str, Tensor], parts: dict[str, TensorShard]) -> None:
        def write(folder: Path) -> None:
            if not parts or self.ranks.is_first:
                save_file(whole, folder / "tensors.safetensors")
                (folder / "state.json").write_text(json.dumps(structure), encoding="utf-8")

        if parts:
            ranks = self._writers

            def seal(folder: Path) -> None:
                if ranks.is_first:
                    write_checksums(folder)

            write_folder(path, ranks, write, lambda folder: save_parts(folder / FOLDER, parts, ranks), seal)
            return
        with whole_folder(path) as folder:
            write(folder)
            write_checksums(folder)

    def wait(self) -> None:
        """Wait until the last checkpoint is in place.

        Raises:
            InputError: the disk was full.
            RankLost: another rank is gone.
        """
        if self._background is not None:
            self._background.wait()

    def settle(self) -> None:
        """Wait on every rank until the checkpoint is in place on all of them; collective.

        Raises:
            InputError, RankLost: see `wait`.
        """
        self.wait()
        if self._background is not None:
            self.ranks.wait()

    def close(self) -> None:
        """Wait, ignoring errors, and end the thread."""
        if self._background is not None:
            self._background.close()

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; collective if there are sharded tables.

        Raises:
            InputError: a file is missing or damaged, on this rank or on the first, which compares the checksums.
        """
        del map_location, weights_only
        self.wait()
        return self._load(Path(path))

    def load_weights(self, path: str | Path) -> dict[str, Tensor]:
        """Read only the model's state dict, without the optimizer state of sharded tables."""
        self.wait()
        weights: dict[str, Tensor] = self._load(Path(path), "state_dict")["state_dict"]
        return weights

    def _load(self, source: Path, only: str | None = None) -> dict[str, Any]:
        self._verify(source)
        try:
            tensors = load_file(source / "tensors.safetensors")
            structure = json.loads((source / "state.json").read_text(encoding="utf-8"))
            if only is not None:
                structure = {"dict": [pair for pair in structure["dict"] if pair[0] == only]}
            stored = dict(parts_in(structure))
            if stored:
                tensors |= load_parts(source / FOLDER, stored, self.ranks, self.parts)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{source}: not a readable checkpoint ({error}); remove it and train again") from error
        checkpoint: dict[str, Any] = decode(structure, tensors)
        return checkpoint

    def _verify(self, source: Path) -> None:
        """Compare the checksums on the first rank; collective, so that no rank waits for a failed rank."""
        failed: InputError | None = None
        if self.ranks.is_first:
            try:
                verify_checksums(source, ADVICE)  # older versions wrote none
            except InputError as error:
                failed = error
        if self.ranks.agree(failed is not None):
            raise failed or InputError(f"{source}: damaged, according to the first rank")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder."""
        self.wait()
        shutil.rmtree(path, ignore_errors=True)


def _own_group(ranks: Communicator, timeout: timedelta) -> Any:
    """Create a gloo process group of the same ranks: checkpoints have CPU tensors, whatever backend the steps use.

    It is never destroyed before the default group, because torch could reuse its name for a later group of some ranks.
    """
    members = None if ranks.group is None else dist.get_process_group_ranks(ranks.group)
    return dist.new_group(members, timeout, "gloo", use_local_synchronization=members is not None)


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's random generators, for the checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Restore torch's random generators from a checkpoint."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
