"""Construction of the prepared folder from sources and feature tables; `Interactions.open` reads it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.io.feature_tables import FeatureTable, TableLike
from twotower.data.io.layout import HASH_ROWS, combined, digest, vocabulary_digest, write_meta
from twotower.data.io.readers import FileSource, SequenceSource
from twotower.data.io.timestamps import report_times
from twotower.data.prepare.bucket_sort import SortedTable, finish
from twotower.data.prepare.chunks import ROLES, EncodedChunks
from twotower.data.prepare.first_pass import FileReader
from twotower.data.prepare.request_context import CONTEXT_FILE, ContextColumns, gathered
from twotower.data.schema.account import Account
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import CodedIds, Hashed, IdKind, Vocabulary
from twotower.errors import InputError

VOCABULARY_FILES = {"queries": "queries.parquet", "items": "items.parquet", "groups": "groups.parquet"}
#: Function that adds the rows of all files to `EncodedChunks`, and returns the query columns of each file, if any.
Gather = Callable[[EncodedChunks], Sequence[pl.DataFrame | None]]
_ROLE_OF = {"labels": "label", "groups": "group"}
#: Explanations in the account for the notes of `FileSource`.
NOTES = {
    "no header": "files without a header; their columns are named in the usual order",
    "columns without a name": "ignored, such as the index of a data frame",
    "line breaks in fields": "inside quotation marks; such a row spans several lines",
    "blanks around ids": "removed",
    "query ids written as floats": "such as 12.0 or 1.2E+12: rounded by a spreadsheet? Kept as text",
    "item ids written as floats": "such as 12.0 or 1.2E+12: rounded by a spreadsheet? Kept as text",
    "blanks kept around ids": "ids that differ only by blanks are different ids",
}
#: Ids, in lower case, that are often missing values written as text.
MISSING_WORDS = ("nan", "null", "none", "na", "n/a", "<na>", "nil", "nat", "undefined", "\\n", "#n/a", "-")
#: Characters without a width: soft hyphen, zero-width blanks and joiners, direction marks, byte order mark.
INVISIBLE = "[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]"
TABLE_FILES = {"item": "item_table.parquet", "query": "query_table.parquet"}


@dataclass(frozen=True)
class ReadOptions:
    """Options of `Interactions.read`."""

    columns: ColumnRoles = field(default_factory=ColumnRoles)
    positive_label: float | None = None
    catalog: str = "interactions"
    part: bool = False
    context: ContextColumns = None
    query_ids: IdKind = "vocabulary"
    item_ids: IdKind = "vocabulary"
    item_columns: Mapping[str, str] | None = None
    query_columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.catalog not in ("interactions", "table"):
            raise InputError(f"catalog: {self.catalog!r}; expected 'interactions' or 'table'.")
        if self.positive_label is not None and not np.isfinite(self.positive_label):
            raise InputError(f"positive_label: {self.positive_label!r}; expected a finite number.")
        for name, kind in (("query_ids", self.query_ids), ("item_ids", self.item_ids)):
            if not isinstance(kind, Hashed) and kind not in ("vocabulary", "codes"):
                raise InputError(f"{name}: {kind!r}; expected 'vocabulary', 'codes' or Hashed(rows).")
        if isinstance(self.item_ids, Hashed):
            raise InputError(
                "item_ids: hashed items could not be distinguished in results; expected 'vocabulary' or 'codes'."
            )

    def first_pass(self, sources: Sequence[FileSource]) -> FileReader:
        """Resolve the columns to read from each file."""
        return FileReader.of(
            sources,
            self.columns,
            labelled=self.positive_label,
            context=self.context,
            ids={"query_ids": self.query_ids, "item_ids": self.item_ids},
        )


def build(
    sources: Sequence[FileSource],
    *,
    reading: ReadOptions,
    items: TableLike | None,
    queries: TableLike | None,
    directory: Path,
    account: Account,
    first: FileReader | None = None,
    gather: Gather | None = None,
) -> None:
    """Write prepared interactions (see `layout`) to `directory`, which exists and is empty.

    Args:
        sources: the files, or a data frame.
        reading: the reading options.
        items: table of item features, or None.
        queries: table of query features, or None.
        directory: output folder.
        account: receives the lines about the data read.
        first: the columns to read from each file; None to resolve them here.
        gather: function that collects the rows of all files; None to read the files here.

    Raises:
        InputError: the input has an error; the message names file, column and row.
    """
    with tempfile.TemporaryDirectory(prefix="passes-", dir=directory) as passes:
        first = first or reading.first_pass(sources)
        columns, named = first.columns, list(first.context)
        collected = first.empty(Path(passes))
        read = [first.read(source, collected) for source in sources] if gather is None else gather(collected)
        described = [frame for frame in read if frame is not None]
        extras = pl.concat(described, how="diagonal_relaxed") if described else None
        if not collected.rows:
            raise InputError(f"{sources[0].name}: no interactions; every list of items is empty.")
        if isinstance(reading.query_ids, Hashed) and (queries is not None or described):
            raise InputError(
                "query_ids: query features are joined by id, and hashed ids are not stored; leave out the query table "
                "(or the columns next to the lists of items), or use 'vocabulary' or 'codes'."
            )
        tables = {
            "item": None
            if items is None
            else FeatureTable(items, "item", columns.item or "item", reading.item_columns),
            "query": None
            if queries is None
            else FeatureTable(queries, "query", columns.query or "query", reading.query_columns),
        }
        vocabularies = _vocabularies(collected, columns, tables["item"], reading, sources[0].name)
        negatives = directory / "negatives"
        negatives.mkdir()
        finished = finish(
            collected,
            vocabularies=vocabularies,
            positive_label=reading.positive_label,
            directory=directory,
            negative_directory=negatives,
            where=f"{sources[0].name}: column {columns.timestamp!r}",
        )
        columns = replace(columns, **dict.fromkeys(_ROLE_OF[name] for name in collected.unusable))
        rows, below = int(finished.offsets[-1]), int(finished.negative_offsets[-1])
        context, negative_context = (
            gathered(
                collected,
                named,
                arrival,
                timestamp=columns.timestamp,
                times=np.load(folder / "timestamps.npy", mmap_mode="r") if columns.timestamp in named else None,
                text=any(source.text for source in sources),
            )
            if count
            else None
            for folder, arrival, count in (
                (directory, finished.arrival, rows),
                (negatives, finished.negative_arrival, below),
            )
        )
    if not rows:
        raise InputError(
            f"{sources[0].name}: column {columns.label!r}: no row has a label of at least {reading.positive_label}."
        )
    _add_lines(
        account,
        collected=collected,
        finished=finished,
        vocabularies=vocabularies,
        columns=columns,
        reading=reading,
        sources=sources,
        directory=directory,
    )
    if context is not None:
        account.add("context", None, f"columns {', '.join(context.columns)}: one value for each row")
        context.write_parquet(directory / CONTEXT_FILE)
    joined = {
        role: table.join_to(vocabularies[_side(role)], account) for role, table in tables.items() if table is not None
    }
    if extras is not None:
        joined["query"] = _with_extras(extras, joined.get("query"), vocabularies["queries"], columns.query or "query")
    for role, table in joined.items():
        table.write_parquet(directory / TABLE_FILES[role])
    for side, vocabulary in vocabularies.items():
        vocabulary.write(directory / VOCABULARY_FILES[side])
    vocabulary_digests = {side: vocabulary_digest(v) for side, v in vocabularies.items()}
    written = {
        "columns": asdict(columns),
        "groups": "groups" in vocabularies,
        "tables": sorted(joined),
        "context": context is not None,
    }
    if below:
        np.save(negatives / "offsets.npy", finished.negative_offsets, allow_pickle=False)
        digests = {**finished.negative_digests, **vocabulary_digests, "offsets": digest(finished.negative_offsets)}
        if negative_context is not None:
            negative_context.write_parquet(negatives / CONTEXT_FILE)
        write_meta(
            negatives,
            {
                "rows": below,
                "fields": sorted(finished.negative_digests),
                "fingerprint": combined(digests),
                "context": negative_context is not None,
            },
        )
    else:
        for path in negatives.iterdir():
            path.unlink()
        negatives.rmdir()
    np.save(directory / "offsets.npy", finished.offsets, allow_pickle=False)
    digests = {**finished.digests, **vocabulary_digests, "offsets": digest(finished.offsets)}
    write_meta(
        directory,
        {
            "rows": rows,
            "fields": sorted(finished.digests),
            "fingerprint": combined(digests),
            "negatives": bool(below),
            "account": account.to_dict(),
            **written,
        },
    )


def _side(role: str) -> str:
    return "items" if role == "item" else "queries"


def _vocabularies(
    collected: EncodedChunks, columns: ColumnRoles, item_table: FeatureTable | None, reading: ReadOptions, where: str
) -> dict[str, Vocabulary]:
    extra: pl.Series | None = None
    if reading.catalog == "table":
        if item_table is None:
            raise InputError("data.catalog=table needs an item table; pass --items FILE (in Python items=...)")
        if "items" in collected.direct:
            raise InputError(
                "data.catalog=table adds ids to a vocabulary; codes have no vocabulary: N is the largest code plus one."
            )
        extra = item_table.ids_as(collected.distinct["items"][0].dtype)
        if extra.null_count():
            wrong = item_table.ids.filter(extra.is_null())[0]
            raise InputError(
                f"{item_table.where}: column {item_table.id_column!r}: id {wrong!r} is text, "
                "but the interactions have integer ids."
            )
    vocabularies = {
        "queries": collected.vocabulary("queries", columns.query or ""),
        "items": collected.vocabulary("items", columns.item or "", extra),
    }
    if collected.distinct["groups"] and "groups" not in collected.unusable:
        vocabularies["groups"] = collected.vocabulary("groups", columns.group or "")
    if len(vocabularies["items"]) < 2 and not reading.part:
        raise InputError(
            f"{where}: column {columns.item!r}: only one item, {vocabularies['items'].ids[0]!r}; "
            "retrieval needs at least two."
        )
    return vocabularies


def _with_extras(extras: pl.DataFrame, table: pl.DataFrame | None, vocabulary: Vocabulary, query: str) -> pl.DataFrame:
    typed = extras.with_columns(pl.col(query).cast(vocabulary.ids.dtype)).unique(
        query, keep="first", maintain_order=True
    )
    base = table if table is not None else pl.DataFrame({query: vocabulary.ids})
    left = base.columns[0]
    fresh = [name for name in typed.columns if name == query or name not in base.columns]
    return base.join(typed.select(fresh), left_on=left, right_on=query, how="left", maintain_order="left")


def _add_lines(
    account: Account,
    *,
    collected: EncodedChunks,
    finished: SortedTable,
    vocabularies: dict[str, Vocabulary],
    columns: ColumnRoles,
    reading: ReadOptions,
    sources: Sequence[FileSource],
    directory: Path,
) -> None:
    """Add the lines about rows read and dropped."""
    rows, below = int(finished.offsets[-1]), int(finished.negative_offsets[-1])
    files = sources[0].name if len(sources) == 1 else f"from {len(sources)} files, beginning with {sources[0].name}"
    account.add("rows read", collected.rows, files)
    roles = ", ".join(f"{role} = {name}" for role, name in columns.roles().items())
    account.add("columns", None, roles)
    for label, count in collected.notes.items():
        account.add(label, count, NOTES[label])
    for name, reason in collected.unusable.items():
        account.add(f"{_ROLE_OF[name]} ignored", None, reason)
    if collected.empty_lists:
        account.add("empty lists", collected.empty_lists, "rows whose list of items is empty, dropped")
    if columns.timestamp is None:
        gaps = any(isinstance(s, SequenceSource) and s.has_gaps for s in sources)
        account.add(
            "no timestamps",
            None,
            "row order is taken as time order; repeats of a (query, item) pair are kept"
            + ("; the gaps after the TAB have no origin and are not used" if gaps else ""),
        )
    else:
        account.add("duplicates", finished.duplicates, "same query, item and timestamp; the first is kept")
        times = np.load(directory / "timestamps.npy", mmap_mode="r")
        report_times(times, finished.unit, collected.units, columns.timestamp, account)
    if columns.label is not None and reading.positive_label is None:
        account.add(
            "labels ignored",
            None,
            f"every row counts as a positive, whatever its {columns.label}; with data.positive_label=4 "
            "only labels of at least 4 count",
        )
    if reading.positive_label is not None:
        account.add("negatives", below, f"{columns.label} below {reading.positive_label:g}, stored as .negatives")
    account.add("interactions", rows, "positives")
    account.add("queries", len(vocabularies["queries"]))
    account.add("items", len(vocabularies["items"]))
    counts = {"queries": np.diff(finished.offsets) + np.diff(finished.negative_offsets)}
    for side in ("queries", "items"):
        _report_missing_words(vocabularies[side], ROLES[side], counts.get(side), directory, account)
    for side, vocabulary in vocabularies.items():
        _report_twins(vocabulary, ROLES[side], account)
    for side, column in collected.direct.items():
        column.report(account, ROLES[side], finished.seen[side])
    if reading.positive_label is not None:
        silent = int(np.count_nonzero(np.diff(finished.offsets) == 0))
        account.add("queries without a positive", silent, "they stay in the vocabulary")


def _report_twins(vocabulary: Vocabulary, role: str, account: Account) -> None:
    """Report ids that look alike: equal except for Unicode form, blanks and invisible characters, or for case.

    They remain different ids. The check is cheap if all distinct ids are ASCII.
    """
    if isinstance(vocabulary, CodedIds) or vocabulary.ids.dtype != pl.String:
        return
    ids = vocabulary.ids
    if bool((ids.str.len_bytes() != ids.str.len_chars()).any()) or bool((ids.str.strip_chars() != ids).any()):
        visible = ids.str.replace_all(INVISIBLE, "").str.normalize("NFKC").str.strip_chars()
        _report_alike(ids, visible, "Unicode form, blanks or invisible characters", role, account)
    _report_alike(ids, ids.str.to_lowercase(), "case", role, account)


def _report_alike(ids: pl.Series, folded: pl.Series, difference: str, role: str, account: Account) -> None:
    """Report the ids whose folded forms are equal."""
    if not bool((folded != ids).any()) or folded.hash().n_unique() == len(ids):
        return
    pairs = pl.DataFrame({"id": ids, "folded": folded}).filter(pl.len().over("folded") > 1)
    if not len(pairs):  # only their hashes were equal
        return
    first = pairs.filter(pl.col("folded") == pairs["folded"][0])["id"]
    account.add(
        f"{role} ids that differ only by {difference}",
        len(pairs),
        f"such as {first[0][:40]!a} and {first[1][:40]!a}; they count as different ids. If they mean the "
        "same, write them the same way",
    )


def _report_missing_words(
    vocabulary: Vocabulary, role: str, counts: NDArray[np.int64] | None, directory: Path, account: Account
) -> None:
    """Report ids that look like missing values written as text."""
    if isinstance(vocabulary, CodedIds) or vocabulary.ids.dtype != pl.String:
        return
    for code in vocabulary.ids.str.to_lowercase().is_in(MISSING_WORDS).arg_true():
        if counts is None:
            codes = np.load(directory / "item_codes.npy", mmap_mode="r")
            rows = sum(int((codes[at : at + HASH_ROWS] == code).sum()) for at in range(0, len(codes), HASH_ROWS))
        else:
            rows = int(counts[code])
        account.add(
            f"rows with the {role} id {vocabulary.ids[code]!r}",
            rows,
            "missing values written as text? Remove these rows, or they count as one " + role,
        )
