"""The first pass over a folder of shards, shared by all processes that need the same data.

A shard's rows are checked and coded into a folder of its own, which appears whole and whose name says which file, as it
is now, was read how. Whoever needs the shards takes those that nobody else has taken: processes started for it, the
ranks of a training, another run on the same data. What was read stays when a preparation is stopped, so the next one
goes on from there; it goes when the data is prepared.

Locks keep two processes from reading one shard. Where they do not (some file systems of several machines know none, or
none that another machine sees) work may be done twice: what another process may be writing is left alone, the first
whole folder stays, and a process whose shards were removed finds that the data is prepared.
"""

from __future__ import annotations

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

from twotower.data.collecting import SIDES, Collected
from twotower.data.storing import LAYOUT_VERSION
from twotower.errors import InputError
from twotower.files import full_disk_named, is_full_disk, locked, whole_folder
from twotower.launch import Launch
from twotower.machine import cores

#: A process is started for each so many bytes of shards: below, starting takes longer than reading. So much is also
#: worth keeping when a later shard is refused.
BYTES_PER_WORKER = 64 << 20

#: Shards that nobody has asked for in so long are removed by the next preparation in the same cache.
KEPT_SECONDS = 14 * 24 * 3600
#: Nobody is at work any more on a folder that has not been written to for so long.
STALE_SECONDS = 3600
FOLDER = ".shards"
_STATE, _EXTRAS = "shard.json", "extras.parquet"

#: Reads a file into a folder: what `save` takes.
Read = Callable[[Path, Path], tuple[Collected, pl.DataFrame | None]]


@dataclass(frozen=True)
class Shards:
    """Files that are read into folders.

    Attributes:
        root: where the folders are.
        files: in the order of their rows.
        reading: JSON values that decide how a file is read.
        purpose: of these folders; another purpose has folders of its own, for whoever is done removes them.
    """

    root: Path
    files: Sequence[Path]
    reading: dict[str, Any]
    purpose: str = ""

    def folder(self, file: Path) -> Path:
        """Where a file's rows go; another place once the file, or how it is read, has changed.

        Raises:
            InputError: the file is gone.
        """
        try:
            stat = file.stat()
        except FileNotFoundError:
            raise gone(file) from None
        told = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, self.reading, self.purpose, LAYOUT_VERSION]
        return self.root / hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    def take(self, file: Path, read: Read, *, wait: bool) -> bool:
        """Read one file into its folder, unless that is there already.

        Args:
            file: which.
            read: reads a file into a folder.
            wait: for another process that reads it just now.

        Returns:
            Whether its folder is there: False only without `wait`.

        Raises:
            InputError: whatever is wrong with the file; the disk is full.
            OSError: what was written is gone: another process has prepared the data.
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
            with (
                full_disk_named(file, f"its rows are kept in {self.root} for a while: free space there"),
                whole_folder(target, replace=False) as folder,
            ):
                save(*read(file, folder))
        return True

    def sweep(self) -> None:
        """Remove what killed processes have left half written; without locks only what is an hour old."""
        for file in self.files:
            with suppress(InputError):
                target = self.folder(file)
                with locked(self.root / f"{target.name}.lock", wait=False) as lock:
                    if lock:
                        self._sweep(target, 0 if lock.keeps_out else STALE_SECONDS)

    def _sweep(self, target: Path, seconds: float) -> None:
        """Remove what is half written of a folder, and has not been written to for so long."""
        for left in self.root.glob(f".{target.name}.*.partial"):
            with suppress(FileNotFoundError):
                if not seconds or time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > seconds:
                    shutil.rmtree(left, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folders of all files, unless for want of locks others may read them, and very old ones."""
        with suppress(OSError), locked(self.root / "remove.lock") as lock:
            for file in self.files if lock.keeps_out else ():
                with suppress(InputError):
                    target = self.folder(file)
                    with suppress(OSError):  # in one step, so that nobody finds a part of it
                        target.rename(self.root / f".{target.name}.{uuid.uuid4().hex}.partial")
                    self._sweep(target, 0)
        remove_old(self.root)


def _is_kept(target: Path) -> bool:
    """Whether a folder is there; it counts as asked for now."""
    with suppress(OSError):
        os.utime(target)
    return target.is_dir()


def gone(file: Path) -> InputError:
    """What to tell of a shard that is not there any more."""
    return InputError(f"{file}: the shard is gone; put it back, or start anew with the files that are there.")


def remove_old(root: Path) -> None:
    """Remove what nobody has asked for in a long time, and the folder itself where it is empty."""
    with suppress(OSError):
        for left in root.iterdir():
            if time.time() - left.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        root.rmdir()


def take_all(shards: Shards, read: Read, *, workers: int, done: Callable[[], bool]) -> None:
    """Read all shards that are not read yet, together with whoever else does so.

    Rank r of W begins with shards r, r + W, ..., and goes on with what the others have not come to.

    Args:
        shards: which.
        read: see `Shards.take`.
        workers: processes that read, this one included.
        done: says that the data has been prepared by another process meanwhile, and the rest is not needed.

    Raises:
        InputError: a shard is gone, damaged or wrong, or the disk is full.
    """
    launch = Launch.of_environment()
    files = in_turn(shards.files, launch.rank, launch.size * workers)
    try:
        with helpers(shards, workers - 1):
            for wait in (False, True):  # first what nobody reads, then what others have not finished
                for file in files:
                    if done():
                        return
                    try:
                        shards.take(file, read, wait=wait)
                    except OSError:
                        if not done():  # else whoever was first has cleared up
                            raise
    except InputError as error:
        shards.sweep()
        if error.__cause__ is not None and is_full_disk(error.__cause__):
            shards.remove()  # they are what fills it
        raise


def in_turn(files: Sequence[Path], number: int, processes: int) -> list[Path]:
    """The order in which one of several processes takes files: every so many, those of its number, then the others.

    So they seldom meet, and share the work also where the file system knows no locks.
    """
    return [*files[number::processes], *(file for place, file in enumerate(files) if (place - number) % processes)]


def bytes_of(files: Sequence[Path]) -> int:
    """The size of all files that are there."""
    return sum(file.stat().st_size for file in files if file.exists())


@contextmanager
def helpers(shards: Shards, count: int) -> Iterator[None]:
    """Processes that take shards, for as long as the block lasts."""
    processes: list[subprocess.Popen[str]] = []
    launch, shares = Launch.of_environment(), count + 1
    told = {
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
                [sys.executable, "-m", "twotower.data.shard_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what a helper cannot read this process reads itself, and says so
                env=os.environ | {"POLARS_MAX_THREADS": str(threads)},
                text=True,
            )
            processes.append(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it goes on without this helper
                process.stdin.write(json.dumps({**told, "number": launch.rank + number * launch.size}) + "\n")
                process.stdin.flush()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def worth_starting(files: Sequence[Path], most: int) -> int:
    """How many processes to read some files with."""
    return max(1, min(most, len(files), bytes_of(files) // BYTES_PER_WORKER))


def save(collected: Collected, extras: pl.DataFrame | None) -> None:
    """Write what is in memory of a first pass beside its files, so that `adopt` finds it."""
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
        "largest_time": collected.largest_time,
        "empty_lists": collected.empty_lists,
    }
    (collected.directory / _STATE).write_text(json.dumps(state), encoding="utf-8")


def adopt(collected: Collected, folder: Path, where: str) -> pl.DataFrame | None:
    """Add the rows that `save` left in a folder, which stays as it is; gives what else was found.

    Raises:
        InputError: dates in one file and numbers in another.
        FileNotFoundError: the folder is gone, or went meanwhile.
    """
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    first = len(collected.chunk_rows)
    for number, rows in enumerate(state["chunk_rows"]):
        collected.adopted[first + number] = folder, number
        collected.chunk_rows.append(rows)
    for side in SIDES:
        for number, text in enumerate(state["text"][side]):
            collected.distinct[side].append(pl.read_parquet(folder / f"{number}.{side}.parquet")["id"])
            collected.origin[side].append((where, text))
    for side, column in collected.direct.items():
        if (folder / f"{side}.npz").is_file():
            with np.load(folder / f"{side}.npz", allow_pickle=False) as arrays:
                column.join(dict(arrays))
    if state["calendar"] is not None:
        collected.same_calendar(where, state["calendar"])
    collected.where = collected.where or where
    collected.columns |= set(state["columns"])
    collected.largest_time = max(collected.largest_time, state["largest_time"])
    collected.empty_lists += state["empty_lists"]
    extras = pl.read_parquet(folder / _EXTRAS) if (folder / _EXTRAS).is_file() else None
    (folder / _STATE).stat()  # a file that was not found above is none of a folder that has gone
    return extras
