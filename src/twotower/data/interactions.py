"""`Interactions`: sorted rows of query, item and time, in memory or mapped from a folder with one file per column."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import ValidationError

from twotower.config.run import EligibilityConfig
from twotower.data.eligibility import Eligibility
from twotower.data.io.feature_tables import TableLike
from twotower.data.io.layout import (
    DTYPES,
    META,
    appearing,
    combined,
    digest,
    open_column,
    read_meta,
    read_table,
    vocabulary_digest,
    write_meta,
)
from twotower.data.io.readers import FrameSource
from twotower.data.prepare.build import TABLE_FILES, VOCABULARY_FILES, ReadOptions, build
from twotower.data.prepare.cache import Preparation
from twotower.data.prepare.request_context import CONTEXT_FILE, ContextColumns, read_context
from twotower.data.schema.account import Account
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import IdKind, Vocabulary, read_vocabulary
from twotower.errors import InputError
from twotower.system.hardware import cores

#: Fields of `Interactions` with one value per row, except the context.
ROW_FIELDS = ("item_codes", "timestamps", "weights", "labels", "groups")


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Compute the sha256 of the rows and vocabularies among the fields of `Interactions`."""
    rows = {name: digest(parts[name]) for name in ("offsets", *ROW_FIELDS) if parts[name] is not None}
    sides = {"queries": parts["queries"], "items": parts["items"], "groups_": parts["group_names"]}
    named = {side.rstrip("_"): vocabulary_digest(v) for side, v in sides.items() if v is not None}
    return combined({**rows, **named})


def write_saved(directory: Path, parts: Mapping[str, Any]) -> None:
    """Write the fields of `Interactions`, including `known_fingerprint`, to an existing empty folder."""
    for side, name in (("queries", "queries"), ("items", "items"), ("groups", "group_names")):
        if parts[name] is not None:
            parts[name].write(directory / VOCABULARY_FILES[side])
    for role in ("item", "query"):
        if parts[f"{role}_table"] is not None:
            parts[f"{role}_table"].write_parquet(directory / TABLE_FILES[role])
    below = parts["negatives"]
    if below is not None:
        (directory / "negatives").mkdir()
        _write_rows(directory / "negatives", {**below.__dict__, "known_fingerprint": below.fingerprint})
    _write_rows(directory, parts)  # last, because it also writes the checksums


def _write_rows(directory: Path, parts: Mapping[str, Any]) -> None:
    fields = [name for name in ROW_FIELDS if parts[name] is not None]
    for name in ("offsets", *fields):
        np.save(directory / f"{name}.npy", parts[name].astype(DTYPES[name], copy=False), allow_pickle=False)
    if parts["context"] is not None:
        parts["context"].write_parquet(directory / CONTEXT_FILE)
    write_meta(
        directory,
        {
            "rows": len(parts["item_codes"]),
            "fields": sorted(fields),
            "fingerprint": parts["known_fingerprint"],
            "negatives": parts["negatives"] is not None,
            "groups": parts["group_names"] is not None,
            "context": parts["context"] is not None,
            "tables": sorted(role for role in ("item", "query") if parts[f"{role}_table"] is not None),
            "account": parts["account"].to_dict(),
            "event": None if parts["event"] is None else asdict(parts["event"]),
            "eligibility": None if parts["eligibility"] is None else parts["eligibility"].settings.model_dump(),
        },
    )


def open_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Open a folder with memory-mapped arrays.

    Returns:
        The fields of `Interactions`; and those that differ for its observed negatives, None if it has no negatives.

    Raises:
        InputError: a file is missing or truncated, or has a different layout version.
    """
    meta = read_meta(folder)
    try:
        queries = read_vocabulary(folder / VOCABULARY_FILES["queries"])
        tables = {role: read_table(folder / TABLE_FILES[role]) for role in meta["tables"]}
        saved = {
            "queries": queries,
            "items": read_vocabulary(folder / VOCABULARY_FILES["items"]),
            "group_names": read_vocabulary(folder / VOCABULARY_FILES["groups"]) if meta["groups"] else None,
            "account": Account.from_dict(meta["account"]),
            "known_fingerprint": meta["fingerprint"],
            "item_table": tables.get("item"),
            "query_table": tables.get("query"),
            "context": read_context(folder, meta["rows"]) if meta.get("context") else None,
            **_columns(folder, meta, len(queries)),
        }
        saved["event"] = EventColumn(**meta["event"]) if meta.get("event") else None
        saved["eligibility"] = _rule(folder, meta.get("eligibility"), saved)
        if not meta["negatives"]:
            return saved, None
        below = read_meta(folder / "negatives")
        return saved, {
            **dict.fromkeys(ROW_FIELDS),
            **_columns(folder / "negatives", below, len(queries)),
            "context": read_context(folder / "negatives", below["rows"]) if below.get("context") else None,
            "known_fingerprint": below["fingerprint"],
            "account": Account(),
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / META}: damaged ({error}); prepare the data again.") from None


def _rule(folder: Path, settings: Any, saved: Mapping[str, Any]) -> Eligibility | None:
    """Rebuild the eligibility rule of saved rows from their item table; return None if they have no rule."""
    if not settings:
        return None
    try:
        rule = EligibilityConfig.model_validate(settings)
        return Eligibility.of_table(rule, saved["item_table"], len(saved["items"]), saved["group_names"])
    except (ValidationError, InputError) as error:
        raise InputError(
            f"{folder / META}: the eligibility rule does not match the data ({error}); save again."
        ) from None


def _columns(folder: Path, meta: dict[str, Any], num_queries: int) -> dict[str, Any]:
    """Open the arrays of one folder and check them against its meta.json."""
    arrays = {name: open_column(folder, name, meta["rows"]) for name in meta["fields"]}
    # Offsets are small and used in every training step, so they are read into memory.
    arrays["offsets"] = np.array(open_column(folder, "offsets", num_queries + 1))
    if int(arrays["offsets"][-1]) != meta["rows"]:
        raise InputError(f"{folder / 'offsets.npy'}: does not match the number of rows; prepare the data again.")
    return arrays


ColumnsLike = ColumnRoles | Mapping[str, str | int | None] | None
PathLike = str | Path
COUNT_ROWS = 4_000_000


@dataclass(frozen=True)
class EventColumn:
    """The context column with the type of each row's event (`with_events`).

    Attributes:
        column: name of the column.
        held_out: the only event type in the validation and test rows; None for all types.
    """

    column: str
    held_out: str | None = None


@dataclass(eq=False)
class Interactions:
    """Positive interactions, sorted by query code, then time, then input order.

    Attributes:
        queries: the query vocabulary.
        items: the item vocabulary.
        offsets: int64 [Q+1]; the rows of query q are ``offsets[q]:offsets[q+1]``.
        item_codes: int32 [n], the item of each row.
        timestamps: int64 [n], microseconds since 1970; None without a timestamp column: input order then counts as
            time order.
        weights: float32 [n], the weight of each row in the loss, not negative; None for equal weights.
        labels: float32 [n], the label of each row, such as a rating; or None.
        groups: int32 [n], the group of each row as a code in `group_names`; or None.
        group_names: the group vocabulary, or None.
        item_table: row i describes item code i and contains nulls if the item file has no row for its id.
        query_table: row i describes query code i in the same way.
        negatives: observed negatives with the same vocabularies, or None: rows below ``positive_label``, or
            passed-over impressions (`with_impressions`).
        context: row i describes the request of interaction i, such as the user's device; None if no context was read.
        event: the context column with the type of each row's event; None if rows have no types.
        query_text: the context column with the text of each row's query (`with_query_text`); None if rows have no
            texts, or if the texts are the queries.
        account: the numbers of rows read and dropped, with the reasons.
        eligibility: the rule that determines which items may be offered for a row (`with_eligibility`), or None.
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
    event: EventColumn | None = None
    query_text: str | None = None
    account: Account = field(default_factory=Account)
    known_fingerprint: str | None = field(default=None, repr=False)
    eligibility: Eligibility | None = field(default=None, repr=False)

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

    def event_types(self, rows: NDArray[np.int64] | None = None) -> pl.Series | None:
        """Return the event types of some rows (default: all) as a categorical column; None if rows have no types."""
        if self.event is None or self.context is None:
            return None
        types = self.context[self.event.column]
        return (types if rows is None else types[rows]).cast(pl.Enum(types.unique().drop_nulls().sort()))

    @property
    def fingerprint(self) -> str:
        """The sha256 of rows and vocabularies: stored in the folder, or computed on first use for data in memory."""
        if self.known_fingerprint is None:
            self.known_fingerprint = fingerprint_of(self.__dict__)
        return self.known_fingerprint

    def item_counts(self) -> NDArray[np.int64]:
        """Count the rows of each item, int64 [N]."""
        counts = np.zeros(self.num_items, dtype=np.int64)
        for start in range(0, len(self), COUNT_ROWS):  # in pieces, because bincount copies its input to int64
            counts += np.bincount(self.item_codes[start : start + COUNT_ROWS], minlength=self.num_items)
        return counts

    def query_codes(self) -> NDArray[np.int32]:
        """Return the query code of each row, int32 [n]."""
        return np.repeat(np.arange(self.num_queries, dtype=np.int32), np.diff(self.offsets))

    def select(self, rows: NDArray[Any]) -> Interactions:
        """Copy the selected rows into memory; vocabularies, tables and negatives are unchanged.

        Args:
            rows: a boolean mask [n], or distinct row numbers in ascending order.

        Raises:
            InputError: the mask has the wrong length, or the row numbers do not ascend or are out of range.
        """
        rows = np.asarray(rows)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise InputError(f"row mask: shape {rows.shape}, expected ({len(self)},)")
            rows = np.flatnonzero(rows)
        elif rows.size and (rows.min() < 0 or rows.max() >= len(self) or bool(np.any(rows[1:] <= rows[:-1]))):
            raise InputError(f"row numbers must ascend within 0..{len(self) - 1}")
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
        context: ContextColumns = None,
        query_ids: IdKind = "vocabulary",
        item_ids: IdKind = "vocabulary",
        workers: int | None = None,
        item_columns: Mapping[str, str] | None = None,
        query_columns: Mapping[str, str] | None = None,
    ) -> Interactions:
        """Read a file, a folder or several files. The first call prepares the data in a cache; later calls open it.

        Args:
            path: Parquet, CSV or TSV (also compressed with gzip), a text file of ``query item item ...`` lines, a
                folder (see `folders.find_files`), a folder written by `save`, or a list of files. A file may also have
                one row per query with a list of items. Wildcards in a path are not expanded.
            items: item features, a file or a data frame with one row per item.
            queries: query features, a file or a data frame with one row per query.
            columns: a mapping from role to column name; None for a role without a column. Roles not mentioned are
                matched by the usual column names.
            positive_label: rows with a smaller label become `negatives`; with None, all rows are positives.
            cache: folder for the prepared data; by default a folder in TWOTOWER_CACHE or ``~/.cache/twotower``.
            catalog: "interactions", or "table" to add the items that occur only in the item table.
            part: whether the file is only part of the data, such as a ready-made test set, and may have a single item.
            context: additional columns that describe the request of each row, such as the device, or "all" for every
                column without a role. They are kept in memory while the data is prepared.
            query_ids: "vocabulary", "codes" if the ids are already 0, 1, 2, ..., or `Hashed(rows)`; see docs/data.md.
            item_ids: "vocabulary" or "codes".
            workers: maximum number of processes that read the shards of a folder; None for one per core.
            item_columns: columns of the item table by role, "item" (the id) and "title"; for a role that is not given,
                the column is found by name.
            query_columns: columns of the query table by role, "query" (the id).

        Returns:
            Interactions mapped from the cache; in memory if a table is a data frame and `cache` is None.

        Raises:
            InputError: the data is invalid; the message names file, column and row.
        """
        if isinstance(path, str | Path) and (Path(path) / META).is_file():
            return cls.open(path)
        reading = ReadOptions(
            ColumnRoles.of(columns),
            positive_label,
            catalog,
            part,
            _several_names(context),
            query_ids,
            item_ids,
            item_columns,
            query_columns,
        )
        found = Preparation.of(path, reading, items=items, queries=queries, cache=cache)
        if found.target is None:
            return cls._in_memory(found.build)
        return found.open(cls.open, workers=workers or cores())

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
        context: ContextColumns = None,
        query_ids: IdKind = "vocabulary",
        item_ids: IdKind = "vocabulary",
        item_columns: Mapping[str, str] | None = None,
        query_columns: Mapping[str, str] | None = None,
    ) -> Interactions:
        """Build interactions in memory from a polars, pandas or Arrow frame; see `read`."""
        reading = ReadOptions(
            ColumnRoles.of(columns),
            positive_label,
            catalog,
            False,
            _several_names(context),
            query_ids,
            item_ids,
            item_columns,
            query_columns,
        )
        sources = [FrameSource(frame)]
        return cls._in_memory(
            lambda directory: build(
                sources, reading=reading, items=items, queries=queries, directory=directory, account=Account()
            )
        )

    @classmethod
    def _in_memory(cls, write: Callable[[Path], None]) -> Interactions:
        """Prepare the data in a temporary folder and load it into memory."""
        with tempfile.TemporaryDirectory(prefix="twotower-") as directory:
            write(Path(directory))
            return cls.open(directory)._resident()

    def _resident(self) -> Interactions:
        """Copy the arrays into memory, because the mapped files are about to be deleted."""
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, name)) for name in ROW_FIELDS if getattr(self, name) is not None
        }
        below = None if self.negatives is None else self.negatives._resident()
        return replace(self, offsets=np.array(self.offsets), negatives=below, **arrays)

    def save(self, directory: PathLike) -> None:
        """Write atomically to a folder that `open` can read.

        Raises:
            InputError: the folder contains something else, or cannot be written.
        """
        with appearing(Path(directory)) as building:
            write_saved(building, {**self.__dict__, "known_fingerprint": self.fingerprint})

    @classmethod
    def open(cls, directory: PathLike) -> Interactions:
        """Open a folder written by `save` or prepared by `read`, with memory-mapped arrays.

        Raises:
            InputError: a file is missing or truncated, or has a different layout version.
        """
        saved, below = open_saved(Path(directory))
        data = cls(**saved)
        if below is not None:
            data.negatives = replace(data, **below)
        return data


def _several_names(context: ContextColumns) -> ContextColumns:
    """Convert the names to a tuple, so that the options can be compared and hashed."""
    return context if context is None or isinstance(context, str) else tuple(context)
