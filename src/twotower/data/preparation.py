"""The prepared form of files in a cache: made once, by all processes that want it at the same moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from twotower.data.account import Account
from twotower.data.building import Reading, build
from twotower.data.collecting import Collected
from twotower.data.features import TableLike
from twotower.data.first_pass import FirstPass
from twotower.data.reading import open_source
from twotower.data.shards import BYTES_PER_WORKER, FOLDER, Read, Shards, adopt, bytes_of, gone, take_all, worth_starting
from twotower.data.storing import META, appearing
from twotower.errors import InputError
from twotower.files import locked

KEY = "key"


def is_ready(target: Path, key: str | None) -> bool:
    """Whether a cache holds what is wanted."""
    told = target / KEY
    return key is not None and (target / META).is_file() and told.is_file() and told.read_text(encoding="utf-8") == key


def prepare(
    target: Path,
    key: str | None,
    files: Sequence[Path],
    *,
    reading: Reading,
    items: TableLike | None,
    queries: TableLike | None,
    account: Account,
    workers: int,
    purpose: str = "",
    anew: bool = False,
) -> None:
    """Prepare files in a cache.

    Several files are shards: each is read by one of the processes that prepare the same data at this moment, those that
    are started for it among them; then one of them brings the rows together, and the others wait for it. Where locks do
    not keep them apart several do the same work, and the first to be done serves all (shards.py). What was read when a
    preparation is stopped is there for the next one.

    Args:
        target: the cache's folder.
        key: by which what is in it is known; None where it is always prepared anew.
        files: in the order of their rows.
        reading: options.
        items: table of item features.
        queries: table of query features.
        account: told what was read.
        workers: processes that read shards, at most.
        purpose: what the shards are read for besides; only preparations of the same purpose share them.
        anew: although it seems to be there.

    Raises:
        InputError: whatever is wrong with the files, by name; the disk is full.
    """
    before = _stamp(target) if anew else None

    def ready() -> bool:
        return is_ready(target, key) and (before is None or _stamp(target) != before)

    sources = [open_source(file) for file in files]
    first = reading.first_pass(sources)
    shards = None
    if len(files) > 1:
        purpose = repr((purpose, [str(file) for file in files], reading))
        shards = Shards(target.parent / FOLDER, files, first.to_dict(), purpose)
    try:
        if shards is not None:
            take_all(shards, into_folder(first), workers=worth_starting(files, workers), done=ready)
        with locked(target.parent / f".{target.name}.lock"):
            if not ready():
                try:
                    with appearing(target) as directory:
                        build(
                            sources,
                            reading=reading,
                            items=items,
                            queries=queries,
                            directory=directory,
                            account=account,
                            first=first,
                            gather=None if shards is None else partial(_adopted, shards, into_folder(first)),
                        )
                        if key is not None:
                            (directory / KEY).write_text(key, encoding="utf-8")
                        _refuse_second(target, ready)
                except OSError:
                    if not ready():  # else whoever was first has cleared up the shards
                        raise
            if shards is not None:
                shards.remove()
    except InputError:
        if shards is not None and bytes_of(files) < BYTES_PER_WORKER:
            shards.remove()  # reading them again is cheap
        raise


def _refuse_second(target: Path, ready: Callable[[], bool]) -> None:
    """Keep what others may have opened already."""
    if ready():
        raise FileExistsError(f"{target}: prepared by another process meanwhile")


def _stamp(target: Path) -> tuple[int, int] | None:
    """By which the data of a folder are known from those that took their place; None where there are none."""
    try:
        found = (target / META).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _adopted(shards: Shards, read: Read, collected: Collected) -> list[pl.DataFrame | None]:
    """The rows of all shards, in the order of the files."""
    found: list[pl.DataFrame | None] = []
    for file in shards.files:
        shards.take(file, read, wait=True)  # it is there, unless another process was faster and has cleared up
        found.append(adopt(collected, shards.folder(file), str(file)))
    return found


def into_folder(first: FirstPass) -> Read:
    """Reads a file into a folder of its own."""

    def read(file: Path, folder: Path) -> tuple[Collected, pl.DataFrame | None]:
        if not file.is_file():
            raise gone(file)
        collected = first.empty(folder)
        return collected, first.read(open_source(file), collected)

    return read
