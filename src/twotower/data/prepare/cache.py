"""The cache of prepared data: filled once, by all processes that need the same data at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from twotower.data.io.feature_tables import TableLike
from twotower.data.io.layout import META, appearing
from twotower.data.io.readers import open_source
from twotower.data.prepare.build import ReadOptions, build
from twotower.data.prepare.chunks import EncodedChunks
from twotower.data.prepare.first_pass import FileReader
from twotower.data.prepare.shards import (
    BYTES_PER_WORKER,
    FOLDER,
    Read,
    Shards,
    adopt,
    bytes_of,
    gone,
    take_all,
    worth_starting,
)
from twotower.data.schema.account import Account
from twotower.errors import InputError
from twotower.system.filesystem import locked

KEY = "key"


def is_ready(target: Path, key: str | None) -> bool:
    """Return whether a cache folder contains complete data with this key."""
    file = target / KEY
    return key is not None and (target / META).is_file() and file.is_file() and file.read_text(encoding="utf-8") == key


def prepare(
    target: Path,
    key: str | None,
    files: Sequence[Path],
    *,
    reading: ReadOptions,
    items: TableLike | None,
    queries: TableLike | None,
    account: Account,
    workers: int,
    purpose: str = "",
    anew: bool = False,
) -> None:
    """Prepare files in a cache folder.

    Several files are shards. All processes that prepare the same data at the same time, including helpers started here,
    share the reading: each shard is read by one of them. Then one process merges the rows while the others wait. If
    locks do not work, several processes may do the same work, and the first result is used (shards.py). If a
    preparation is interrupted, the next one reuses the shards already read.

    Args:
        target: the cache folder.
        key: cache key of the data; None to prepare it every time.
        files: in the order of their rows.
        reading: options.
        items: table of item features.
        queries: table of query features.
        account: receives the lines on what was read.
        workers: maximum number of processes that read shards.
        purpose: further text that identifies the preparation; only preparations with the same text share shards.
        anew: prepare the data again even if the cache seems complete, because it is damaged.

    Raises:
        InputError: an error in the files, with the file's name; or the disk is full.
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
                    if not ready():  # otherwise another process has finished and removed the shards
                        raise
            if shards is not None:
                shards.remove()
    except InputError:
        if shards is not None and bytes_of(files) < BYTES_PER_WORKER:
            shards.remove()  # reading them again is cheap
        raise


def _refuse_second(target: Path, ready: Callable[[], bool]) -> None:
    """Do not replace data that another process has just prepared: it may be open already."""
    if ready():
        raise FileExistsError(f"{target}: already prepared by another process")


def _stamp(target: Path) -> tuple[int, int] | None:
    """Return a value that changes when the data of a folder is replaced; None if there is no data."""
    try:
        found = (target / META).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _adopted(shards: Shards, read: Read, collected: EncodedChunks) -> list[pl.DataFrame | None]:
    """Collect the rows of all shards, in file order."""
    found: list[pl.DataFrame | None] = []
    for file in shards.files:
        shards.take(file, read, wait=True)  # already read, unless another process has finished and removed the shards
        found.append(adopt(collected, shards.folder(file), str(file)))
    return found


def into_folder(first: FileReader) -> Read:
    """Return a function that reads one file into its own folder."""

    def read(file: Path, folder: Path) -> tuple[EncodedChunks, pl.DataFrame | None]:
        if not file.is_file():
            raise gone(file)
        collected = first.empty(folder)
        return collected, first.read(open_source(file), collected)

    return read
