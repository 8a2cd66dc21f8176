"""`Interactions`: one sorted, compressed-row table of who met what when, memory-mapped where it comes from a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.account import Account
from twotower.data.building import Reading, build
from twotower.data.context import Wanted
from twotower.data.features import TableLike
from twotower.data.folders import cache_key, cache_root, find_files, several
from twotower.data.preparation import KEY, is_ready, prepare
from twotower.data.reading import FrameSource, Source, open_source
from twotower.data.saved import ROW_FIELDS, fingerprint_of, open_saved, write_saved
from twotower.data.storing import LAYOUT_VERSION, META, appearing
from twotower.errors import InputError
from twotower.ids import IdKind
from twotower.machine import cores
from twotower.schema import Columns, Vocabulary

ColumnsLike = Columns | Mapping[str, str | None] | None
PathLike = str | Path
COUNT_ROWS = 4_000_000


@dataclass(eq=False)
class Interactions:
    """Positives sorted by query code, then time, then order of arrival.

    Attributes:
        queries: the query ids; position = code.
        items: the item ids; position = code.
        offsets: int64 [Q+1], rows of query q are ``offsets[q]:offsets[q+1]``.
        item_codes: int32 [n].
        timestamps: int64 [n], microseconds since 1970; None where row order stands for time.
        weights: float32 [n], 0 or more, or None.
        labels: float32 [n] or None.
        groups: int32 [n], codes in `group_names`, or None.
        group_names: the groups' ids.
        item_table: row i describes item code i; nulls where the table had no such id.
        query_table: row i describes query code i.
        negatives: rows below ``positive_label``, same vocabularies.
        context: row i describes the request of row i, such as its device; None where no such column was read.
        account: what was read, what was dropped and why.
    """

    queries: Vocabulary
    items: Vocabulary
    offsets: NDArray[np.int64]
    item_codes: NDArray[np.int32]
    timestamps: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    labels: NDArray[np.float32] | None = None
    groups: NDArray[np.int32] | None = None
    group_names: Vocabulary | None = None
    item_table: pl.DataFrame | None = None
    query_table: pl.DataFrame | None = None
    negatives: Interactions | None = None
    context: pl.DataFrame | None = None
    account: Account = field(default_factory=Account)
    known_fingerprint: str | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.item_codes)

    def __repr__(self) -> str:
        return f"Interactions({len(self):,} rows, {self.num_queries:,} queries, {self.num_items:,} items)"

    @property
    def num_queries(self) -> int:
        """Q, the size of the query vocabulary."""
        return len(self.queries)

    @property
    def num_items(self) -> int:
        """N, the size of the catalog."""
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """sha256 over rows and vocabularies; known beforehand where the data came from a file."""
        if self.known_fingerprint is None:
            self.known_fingerprint = fingerprint_of(self.__dict__)
        return self.known_fingerprint

    def item_counts(self) -> NDArray[np.int64]:
        """How often each item occurs, int64 [N]."""
        counts = np.zeros(self.num_items, dtype=np.int64)
        for start in range(0, len(self), COUNT_ROWS):  # in pieces: bincount widens its input to int64
            counts += np.bincount(self.item_codes[start : start + COUNT_ROWS], minlength=self.num_items)
        return counts

    def query_codes(self) -> NDArray[np.int32]:
        """The query code of each row, int32 [n]."""
        return np.repeat(np.arange(self.num_queries, dtype=np.int32), np.diff(self.offsets))

    def select(self, rows: NDArray[Any]) -> Interactions:
        """Only these rows, with the same vocabularies, tables and negatives, in memory.

        Args:
            rows: boolean mask [n], or ascending distinct row numbers.

        Raises:
            ValueError: a mask of another length, or row numbers not ascending or out of range.
        """
        rows = np.asarray(rows)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise ValueError(f"a mask of shape {rows.shape} for {len(self)} rows")
            rows = np.flatnonzero(rows)
        elif rows.size and (rows.min() < 0 or rows.max() >= len(self) or bool(np.any(rows[1:] <= rows[:-1]))):
            raise ValueError(f"row numbers must ascend within 0..{len(self) - 1}")
        rows = rows.astype(np.int64, copy=False)
        chosen: dict[str, Any] = {
            name: np.asarray(getattr(self, name)[rows]) for name in ROW_FIELDS if getattr(self, name) is not None
        }
        if self.context is not None:
            chosen["context"] = self.context[rows]
        offsets = np.searchsorted(rows, self.offsets).astype(np.int64)
        return replace(
            self, offsets=offsets, account=Account(list(self.account.lines)), known_fingerprint=None, **chosen
        )

    @classmethod
    def read(
        cls,
        path: PathLike | Sequence[PathLike],
        items: TableLike | None = None,
        queries: TableLike | None = None,
        columns: ColumnsLike = None,
        positive_label: float | None = None,
        *,
        cache: PathLike | None = None,
        catalog: str = "interactions",
        part: bool = False,
        context: Wanted = None,
        query_ids: IdKind = "vocabulary",
        item_ids: IdKind = "vocabulary",
        workers: int | None = None,
    ) -> Interactions:
        """Read a file, a folder or several files once; later readings open the prepared form.

        Args:
            path: Parquet, CSV or TSV (``.gz`` too), a text file of ``query item item ...`` lines, a folder (see
                `folders.find_files`), what `save` wrote, or a list of files. One row a query with a list of items
                is read too.
            items: item features, a file or a data frame with one row for each item.
            queries: query features, likewise.
            columns: which column is what; by their usual names where not told.
            positive_label: rows with a smaller label become `negatives`; None counts every row as a positive.
            cache: folder of the prepared form, kept there for the next reading; default below TWOTOWER_CACHE or
                ``~/.cache/twotower``.
            catalog: "interactions", or "table" to add the items that stand only in the item table.
            part: the file is a part of the data, such as a ready-made test; then a single item is enough.
            context: further columns that describe the request of each row, such as its device, or "all" that have no
                role. While the data is prepared they are in memory.
            query_ids: "vocabulary", "codes" where ids are 0, 1, 2, ... already, or `Hashed(rows)`; see docs/data.md.
            item_ids: "vocabulary" or "codes".
            workers: processes that read the shards of a folder; one for each core where None.

        Returns:
            Memory-mapped interactions.

        Raises:
            InputError: with file, column and row.
        """
        reading = Reading(
            Columns.of(columns), positive_label, catalog, part, _several_names(context), query_ids, item_ids
        )
        if isinstance(path, str | Path) and (Path(path) / META).is_file():
            return cls.open(path)
        files = find_files(Path(path)) if isinstance(path, str | Path) else several(path)
        items = files.items if items is None else items
        queries = files.queries if queries is None else queries
        framed = any(not isinstance(table, str | Path | None) for table in (items, queries))
        account = Account()
        if files.ignored:
            account.add("files ignored", len(files.ignored), ", ".join(files.ignored))
        told = {name: value for name, value in asdict(reading).items() if name != "context" or value is not None}
        options = {"reading": told, "tables": [str(items), str(queries)], "layout": LAYOUT_VERSION}

        def stamp() -> str | None:
            if framed:  # a frame in memory has no time of change, so it is always prepared anew
                return None
            tables = [Path(t) for t in (items, queries) if isinstance(t, str | Path) and Path(t).is_file()]
            return cache_key([*files.interactions, *tables], options)

        key = stamp()
        if cache is not None:
            target = Path(cache)
        elif key is not None:
            target = cache_root() / "interactions" / key
        else:
            with tempfile.TemporaryDirectory(prefix="twotower-") as directory:
                sources = [open_source(p) for p in files.interactions]
                return cls._built(sources, reading, items, queries, Path(directory), account=account)
        if (target / META).is_file() and not (target / KEY).is_file() and key is not None:
            raise InputError(f"{target}: holds saved interactions, not a cache; give another folder.")
        damaged = False
        if is_ready(target, key):
            try:
                return cls.open(target)
            except InputError:
                damaged = True  # a damaged cache is only a cache
        prepare(
            target,
            key,
            files.interactions,
            reading=reading,
            items=items,
            queries=queries,
            account=account,
            workers=workers or cores(),
            purpose=repr((cache and str(cache), str(items), str(queries))) if key is not None else str(target),
            anew=damaged,
        )
        return cls.open(target)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        items: TableLike | None = None,
        queries: TableLike | None = None,
        columns: ColumnsLike = None,
        positive_label: float | None = None,
        *,
        catalog: str = "interactions",
        context: Wanted = None,
        query_ids: IdKind = "vocabulary",
        item_ids: IdKind = "vocabulary",
    ) -> Interactions:
        """Interactions from a polars, pandas or Arrow frame, in memory; arguments and errors as in `read`."""
        reading = Reading(
            Columns.of(columns), positive_label, catalog, False, _several_names(context), query_ids, item_ids
        )
        source = FrameSource(frame)
        with tempfile.TemporaryDirectory(prefix="twotower-") as directory:
            return cls._built([source], reading, items, queries, Path(directory), account=Account())

    @classmethod
    def _built(
        cls,
        sources: Sequence[Source],
        reading: Reading,
        items: TableLike | None,
        queries: TableLike | None,
        directory: Path,
        *,
        account: Account,
    ) -> Interactions:
        build(sources, reading=reading, items=items, queries=queries, directory=directory, account=account)
        return cls.open(directory)._resident()

    def _resident(self) -> Interactions:
        """The same with its arrays in memory instead of mapped from files about to vanish."""
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, name)) for name in ROW_FIELDS if getattr(self, name) is not None
        }
        below = None if self.negatives is None else self.negatives._resident()
        return replace(self, offsets=np.array(self.offsets), negatives=below, **arrays)

    def save(self, directory: PathLike) -> None:
        """Write to a folder that `open` reads, complete or not at all.

        Raises:
            InputError: the folder holds something else, or cannot be written.
        """
        with appearing(Path(directory)) as building:
            write_saved(building, {**self.__dict__, "known_fingerprint": self.fingerprint})

    @classmethod
    def open(cls, directory: PathLike) -> Interactions:
        """Open what `save` or an earlier reading wrote; arrays stay on disk, memory-mapped.

        Raises:
            InputError: missing, truncated, or of another layout.
        """
        saved, below = open_saved(Path(directory))
        data = cls(**saved)
        if below is not None:
            data.negatives = replace(data, **below)
        return data


def _several_names(context: Wanted) -> Wanted:
    """Names as a tuple, so that options compare and hash."""
    return context if context is None or isinstance(context, str) else tuple(context)
