"""The first pass over a folder of shards, shared by all processes that need the same data.

The validated and coded rows of each shard are written atomically to a separate folder, named after a hash of the file's
state and the reading options. Every process that needs the shards (helper processes started here, the ranks of a
training run, a second run on the same data) reads shards that no other process has taken. After an interruption, the
next preparation continues with the shards already read. The folders are removed once the data is prepared.

Locks prevent two processes from reading the same shard. If the file system has no locks, work may be done twice, but
the result is correct: no process removes a folder that changed within the last hour, the first complete folder is kept,
and a process whose shards were removed finds the prepared data. If locks hold only within one machine (some network
file systems), a process may remove a folder that another machine is still writing; the other process then fails, unless
the data is already prepared.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from twotower.data.io.layout import LAYOUT_VERSION, READ_VERSION
from twotower.data.prepare.chunks import SIDES, EncodedChunks
from twotower.distributed.launch import Launch
from twotower.errors import InputError
from twotower.system.filesystem import is_full_disk, locked, whole_folder
from twotower.system.hardware import cores
from twotower.system.parquet import read_parquet

#: Minimum bytes of shards per process: with fewer bytes, starting a process takes longer than reading. After a failed
#: read, the shards already read are kept only if the files total at least this many bytes.
BYTES_PER_WORKER = 64 << 20

#: A preparation in the same cache removes shards that have been unused for this many seconds.
KEPT_SECONDS = 14 * 24 * 3600
#: A partial folder counts as abandoned once it has been unchanged for this many seconds.
STALE_SECONDS = 3600
FOLDER = ".shards"
_STATE, _EXTRAS = "shard.json", "extras.parquet"

#: Function that reads a file into a folder and returns the arguments of `save`.
Read = Callable[[Path, Path], tuple[EncodedChunks, pl.DataFrame | None]]


@dataclass(frozen=True)
class Shards:
    """The shard files of a data set, and the folders for the rows of each shard.

    Attributes:
        root: parent of the folders.
        files: the files, in row order.
        reading: reading options as JSON values.
        purpose: text that identifies the preparation. Each purpose has its own folders, because the first process to
            finish removes them.
    """

    root: Path
    files: Sequence[Path]
    reading: dict[str, Any]
    purpose: str = ""

    def folder(self, file: Path) -> Path:
        """Return the folder for a file's rows; its name depends on the file's state and the reading options.

        Raises:
            InputError: the file no longer exists.
        """
        try:
            stat = file.stat()
        except FileNotFoundError:
            raise gone(file) from None
        key = [
            str(file.resolve()),
            stat.st_size,
            stat.st_mtime_ns,
            self.reading,
            self.purpose,
            LAYOUT_VERSION,
            READ_VERSION,
        ]
        return self.root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def take(self, file: Path, read: Read, *, wait: bool) -> bool:
        """Read one file into its folder, unless the folder exists.

        Args:
            file: the file.
            read: function that reads a file into a folder.
            wait: whether to wait if another process is reading the file.

        Returns:
            Whether the folder exists now; always true with `wait`.

        Raises:
            InputError: the file has an error, or the disk is full.
            OSError: the folder was removed, because another process has prepared the data.
        """
        target = self.folder(file)
        if _is_kept(target):
            return True
        with locked(self.root / f"{target.name}.lock", wait=wait) as lock:
            if not lock:
                return False
            if _is_kept(target):
                return True
            self._sweep(target, STALE_SECONDS)
            with whole_folder(target, replace=False, durable=False) as folder:
                save(*read(file, folder))
        return True

    def sweep(self) -> None:
        """Remove partial folders left by killed processes; without locks, only those unchanged for an hour."""
        for file in self.files:
            with suppress(InputError):
                target = self.folder(file)
                with locked(self.root / f"{target.name}.lock", wait=False) as lock:
                    if lock:
                        self._sweep(target, 0 if lock.keeps_out else STALE_SECONDS)

    def _sweep(self, target: Path, seconds: float) -> None:
        """Remove partial copies of a folder that have not changed for this many seconds."""
        for left in self.root.glob(f".{glob.escape(target.name)}.*.partial"):
            with suppress(FileNotFoundError):
                if not seconds or time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > seconds:
                    shutil.rmtree(left, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folders of all files, and old folders of other preparations.

        If the file system has no locks, another process may still read these folders, so only old folders are removed.
        """
        with suppress(OSError), locked(self.root / "remove.lock") as lock:
            for file in self.files if lock.keeps_out else ():
                with suppress(InputError):
                    target = self.folder(file)
                    with suppress(OSError):  # rename first, so that no process finds it partly deleted
                        target.rename(self.root / f".{target.name}.{uuid.uuid4().hex}.partial")
                    self._sweep(target, 0)
        remove_old(self.root)


def _is_kept(target: Path) -> bool:
    """Return whether a folder exists, and mark the folder as used now."""
    with suppress(OSError):
        os.utime(target)
    return target.is_dir()


def gone(file: Path) -> InputError:
    """Return the error for a shard that no longer exists."""
    return InputError(f"{file}: the shard no longer exists; restore it, or start again with the remaining files.")


def remove_old(root: Path) -> None:
    """Remove entries of a folder that were unused for `KEPT_SECONDS`, then the folder itself if it is empty."""
    with suppress(OSError):
        for left in root.iterdir():
            if time.time() - left.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        root.rmdir()


def take_all(shards: Shards, read: Read, *, workers: int, done: Callable[[], bool]) -> None:
    """Read all remaining shards, together with all other processes that do the same.

    Process r of W begins with the shards r, r + W, ..., and continues with shards that no other process has taken.

    Args:
        shards: the shards.
        read: see `Shards.take`.
        workers: number of processes that read for this rank, including this one.
        done: function that returns true if another process has prepared the data, so no more reading is needed.

    Raises:
        InputError: a shard is missing, damaged or invalid, or the disk is full.
    """
    launch = Launch.of_environment()
    files = in_turn(shards.files, launch.rank, launch.size * workers)
    try:
        with helpers(shards, workers - 1):
            for wait in (False, True):  # first the free shards, then wait for shards that other processes are reading
                for file in files:
                    if done():
                        return
                    try:
                        shards.take(file, read, wait=wait)
                    except OSError:
                        if not done():  # otherwise another process has finished and removed the shards
                            raise
    except InputError as error:
        shards.sweep()
        if error.__cause__ is not None and is_full_disk(error.__cause__):
            shards.remove()  # the shards are what fills the disk
        raise


def in_turn(files: Sequence[Path], number: int, processes: int) -> list[Path]:
    """Order the files for one of several processes: first every `processes`-th file from `number` on, then the rest.

    With this order, processes rarely compete for a file, and share the work even on file systems without locks.
    """
    return [*files[number::processes], *(file for place, file in enumerate(files) if (place - number) % processes)]


def bytes_of(files: Sequence[Path]) -> int:
    """Sum the sizes of the files that exist."""
    return sum(file.stat().st_size for file in files if file.exists())


@contextmanager
def helpers(shards: Shards, count: int) -> Iterator[None]:
    """Run helper processes that read shards, for the duration of the block."""
    processes: list[subprocess.Popen[str]] = []
    launch, shares = Launch.of_environment(), count + 1
    task = {
        "root": str(shards.root),
        "files": [str(file) for file in shards.files],
        "reading": shards.reading,
        "purpose": shards.purpose,
        "shares": shares,
        "processes": launch.size * shares,
    }
    threads = max(cores() // shares, 1)
    try:
        for number in range(1, shares):
            process = subprocess.Popen(
                [sys.executable, "-m", "twotower.data.prepare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # this process reads the files that a helper could not, and reports errors
                env=os.environ | {"POLARS_MAX_THREADS": str(threads)},
                text=True,
            )
            processes.append(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # continue without this helper
                process.stdin.write(json.dumps({**task, "number": launch.rank + number * launch.size}) + "\n")
                process.stdin.flush()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def worth_starting(files: Sequence[Path], most: int) -> int:
    """Choose the number of processes that read these files."""
    return max(1, min(most, len(files), bytes_of(files) // BYTES_PER_WORKER))


def save(collected: EncodedChunks, extras: pl.DataFrame | None) -> None:
    """Write the in-memory part of a first pass to its folder, for `adopt`."""
    for side in SIDES:
        for chunk, distinct in enumerate(collected.distinct[side]):
            pl.DataFrame({"id": distinct}).write_parquet(collected.directory / f"{chunk}.{side}.parquet")
    for side, column in collected.direct.items():
        arrays: dict[str, Any] = column.state()
        np.savez(collected.directory / f"{side}.npz", **arrays)
    if extras is not None:
        extras.write_parquet(collected.directory / _EXTRAS)
    state = {
        "chunk_rows": collected.chunk_rows,
        "text": {side: [text for _, text in collected.origin[side]] for side in SIDES},
        "columns": sorted(collected.columns),
        "calendar": collected.calendar,
        "units": collected.units.to_dict(),
        "unusable": collected.unusable,
        "notes": collected.notes,
        "empty_lists": collected.empty_lists,
    }
    (collected.directory / _STATE).write_text(json.dumps(state), encoding="utf-8")


def adopt(collected: EncodedChunks, folder: Path, where: str) -> pl.DataFrame | None:
    """Add the rows of a folder written by `save` to `collected`; return its query feature columns, or None.

    Raises:
        InputError: timestamps are dates in one file and numbers in another.
        FileNotFoundError: the folder does not exist, or was removed during reading.
    """
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    first = len(collected.chunk_rows)
    for number, rows in enumerate(state["chunk_rows"]):
        collected.adopted[first + number] = folder, number
        collected.chunk_rows.append(rows)
    for side in SIDES:
        for number, text in enumerate(state["text"][side]):
            collected.distinct[side].append(read_parquet(folder / f"{number}.{side}.parquet")["id"])
            collected.origin[side].append((where, text))
    for side, column in collected.direct.items():
        if (folder / f"{side}.npz").is_file():
            with np.load(folder / f"{side}.npz", allow_pickle=False) as arrays:
                column.join(dict(arrays))
    if state["calendar"] is not None:
        collected.same_calendar(where, state["calendar"])
    collected.where = collected.where or where
    collected.columns |= set(state["columns"])
    collected.units.join(state["units"])
    collected.unusable = {**state["unusable"], **collected.unusable}
    collected.take_notes(state["notes"])
    collected.empty_lists += state["empty_lists"]
    extras = read_parquet(folder / _EXTRAS) if (folder / _EXTRAS).is_file() else None
    # Raises if the folder was removed: a file that seemed absent above may have been deleted.
    (folder / _STATE).stat()
    return extras
