"""The cache of prepared data, filled once by all processes that need the same data at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import polars as pl

from twotower.data.io.feature_tables import TableLike
from twotower.data.io.folders import cache_key, cache_root, find_files, several
from twotower.data.io.layout import LAYOUT_VERSION, META, READ_VERSION, appearing
from twotower.data.io.readers import EmptyFileError, FileSource, open_source
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
from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError
from twotower.system.filesystem import locked

KEY = "key"
Opened = TypeVar("Opened")


def is_ready(target: Path, key: str | None) -> bool:
    """Return whether a cache folder contains complete data with this key."""
    file = target / KEY
    return key is not None and (target / META).is_file() and file.is_file() and file.read_text(encoding="utf-8") == key


@dataclass(frozen=True)
class Preparation:
    """The preparation of files in a cache folder.

    Attributes:
        files: the files, in row order.
        reading: the reading options.
        items: table of item features, or None.
        queries: table of query features, or None.
        account: receives the lines about the data read.
        key: cache key of the data; None if a table is a data frame, which has no modification time, so the data is
            prepared every time.
        target: the cache folder; None to prepare the data in memory.
        purpose: text that identifies the preparation; only preparations with the same text share shards.
    """

    files: Sequence[Path]
    reading: ReadOptions
    items: TableLike | None
    queries: TableLike | None
    account: Account
    key: str | None
    target: Path | None
    purpose: str = ""

    @classmethod
    def of(
        cls,
        path: str | Path | Sequence[str | Path],
        reading: ReadOptions,
        *,
        items: TableLike | None,
        queries: TableLike | None,
        cache: str | Path | None,
    ) -> Preparation:
        """Find the files at a path, and the cache folder for these files.

        Raises:
            InputError: there are no files, or `cache` is a folder of saved interactions.
        """
        found = find_files(Path(path)) if isinstance(path, str | Path) else several(path)
        items = found.items if items is None else items
        queries = found.queries if queries is None else queries
        account = Account()
        for label, names in found.reports().items():
            account.add(label, len(names), listed(names))
        key = None
        if all(isinstance(table, str | Path | None) for table in (items, queries)):
            later = ("context", "item_columns", "query_columns")  # omitted if unset, so that older keys stay valid
            chosen = {name: value for name, value in asdict(reading).items() if name not in later or value is not None}
            options = {
                "reading": chosen,
                "tables": [str(items), str(queries)],
                "layout": LAYOUT_VERSION,
                "read": READ_VERSION,
                "reports": found.reports(),
            }
            tables = [Path(table) for table in (items, queries) if table is not None and Path(table).is_file()]
            key = cache_key([*found.interactions, *tables], options)
        target = Path(cache) if cache is not None else None
        if target is None and key is not None:
            target = cache_root() / "interactions" / key
        if target is not None and (target / META).is_file() and not (target / KEY).is_file() and key is not None:
            raise InputError(f"{target}: contains saved interactions, not a cache; choose another folder.")
        purpose = str(target) if key is None else repr((cache and str(cache), str(items), str(queries)))
        return cls(found.interactions, reading, items, queries, account, key, target, purpose)

    def build(self, directory: Path) -> None:
        """Prepare the data in an empty folder, outside the cache."""
        sources, _ = open_all(self.files, self.account)
        build(
            sources,
            reading=self.reading,
            items=self.items,
            queries=self.queries,
            directory=directory,
            account=self.account,
        )

    def open(self, open_folder: Callable[[Path], Opened], *, workers: int) -> Opened:
        """Open the data in the cache; prepare it first if it is missing, outdated or damaged.

        Args:
            open_folder: function that opens a prepared folder, and raises an InputError if the folder is damaged.
            workers: maximum number of processes that read shards.
        """
        assert self.target is not None
        replaced = None
        if is_ready(self.target, self.key):
            try:
                return open_folder(self.target)
            except InputError:
                replaced = _stamp(self.target)
        self._prepare(self.target, workers, replaced)
        return open_folder(self.target)

    def _prepare(self, target: Path, workers: int, replaced: tuple[int, int] | None) -> None:
        """Read the files, and write the prepared data to the cache folder.

        Several files are treated as shards. All processes that prepare the same data at the same time, including
        helpers started here, share the reading, and each shard is read by one process. Then one process merges the rows
        while the others wait. If locks do not work, several processes may do the same work, and the first result is
        used (shards.py). After an interruption, the next preparation reuses the shards already read.

        Args:
            target: the cache folder.
            workers: maximum number of processes that read shards.
            replaced: stamp of the damaged data to replace, or None.

        Raises:
            InputError: a file has an error (the message names the file), or the disk is full.
        """

        def ready() -> bool:
            return is_ready(target, self.key) and (replaced is None or _stamp(target) != replaced)

        sources, files = open_all(self.files, self.account)
        first = self.reading.first_pass(sources)
        shards = None
        if len(files) > 1:
            purpose = repr((self.purpose, [str(file) for file in files], self.reading))
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
                                reading=self.reading,
                                items=self.items,
                                queries=self.queries,
                                directory=directory,
                                account=self.account,
                                first=first,
                                gather=None if shards is None else partial(_adopted, shards, into_folder(first)),
                            )
                            if self.key is not None:
                                (directory / KEY).write_text(self.key, encoding="utf-8")
                            _refuse_second(target, ready)
                    except OSError:
                        if not ready():  # otherwise another process has finished and removed the shards
                            raise
                if shards is not None:
                    shards.remove()
        except InputError:
            if shards is not None and bytes_of(files) < BYTES_PER_WORKER:
                shards.remove()  # reading the shards again is cheap
            raise


def open_all(files: Sequence[Path], account: Account) -> tuple[list[FileSource], list[Path]]:
    """Open the files with rows; skip and count files without rows, which Spark writes.

    Raises:
        InputError: a file cannot be read, or no file has rows.
    """
    sources, kept, empty = list[FileSource](), list[Path](), list[str]()
    for file in files:
        try:
            sources.append(open_source(file, interactions=True))
            kept.append(file)
        except EmptyFileError:
            if len(files) == 1:
                raise
            empty.append(file.name)
    if not sources:
        raise InputError(f"{files[0].parent}: none of the {len(files)} files has rows.")
    if empty:
        account.add("empty files", len(empty), f"without rows, skipped: {listed(empty)}")
    return sources, kept


def _refuse_second(target: Path, ready: Callable[[], bool]) -> None:
    """Check that no other process has just prepared the data, because its folder may be open already.

    Raises:
        FileExistsError: the folder contains prepared data.
    """
    if ready():
        raise FileExistsError(f"{target}: already prepared by another process")


def _stamp(target: Path) -> tuple[int, int] | None:
    """Return a value that changes when the data in a folder is replaced; None if there is no data."""
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
        return collected, first.read(open_source(file, interactions=True), collected)

    return read
