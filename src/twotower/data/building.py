"""Builds the saved form of interactions from sources and feature tables; `Interactions` opens it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from twotower.data.account import Account
from twotower.data.cleaning import clean, is_list
from twotower.data.context import CONTEXT_FILE, Wanted, context_columns, gathered
from twotower.data.features import FeatureTable, TableLike
from twotower.data.preparing import Collected, Finished, finish
from twotower.data.reading import ROW, SequenceSource, Source
from twotower.data.storing import combined, digest, vocabulary_digest, write_meta
from twotower.errors import InputError
from twotower.schema import Columns, Vocabulary, listed

VOCABULARY_FILES = {"queries": "queries.parquet", "items": "items.parquet", "groups": "groups.parquet"}
TABLE_FILES = {"item": "item_table.parquet", "query": "query_table.parquet"}


@dataclass(frozen=True)
class Reading:
    """Options of a reading; see `Interactions.read`."""

    columns: Columns = field(default_factory=Columns)
    positive_label: float | None = None
    catalog: str = "interactions"
    part: bool = False
    context: Wanted = None

    def __post_init__(self) -> None:
        if self.catalog not in ("interactions", "table"):
            raise InputError(f"catalog: {self.catalog!r}; expected 'interactions' or 'table'.")
        if self.positive_label is not None and not np.isfinite(self.positive_label):
            raise InputError(f"positive_label: {self.positive_label!r}; expected a finite number.")


def build(
    sources: Sequence[Source],
    *,
    reading: Reading,
    items: TableLike | None,
    queries: TableLike | None,
    directory: Path,
    account: Account,
) -> None:
    """Write the layout of `storing` into `directory`, which exists and is empty.

    Raises:
        InputError: whatever is wrong with the input, with file, column and row.
    """
    with tempfile.TemporaryDirectory(prefix="passes-", dir=directory) as passes:
        collected = Collected(Path(passes))
        columns, extras, named = _collect(sources, reading, collected)
        if not collected.rows:
            raise InputError(f"{sources[0].name}: no interactions; every list of items is empty.")
        tables = {
            "item": None if items is None else FeatureTable(items, "item", columns.item or "item"),
            "query": None if queries is None else FeatureTable(queries, "query", columns.query or "query"),
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
        context = gathered(
            collected,
            named,
            finished.arrival,
            timestamp=columns.timestamp,
            times=np.load(directory / "timestamps.npy", mmap_mode="r") if columns.timestamp in named else None,
            text=any(source.text for source in sources),
        )
    rows, below = int(finished.offsets[-1]), int(finished.negative_offsets[-1])
    if not rows:
        raise InputError(
            f"{sources[0].name}: column {columns.label!r}: no row has a label of at least {reading.positive_label}."
        )
    _tell(
        account,
        collected=collected,
        finished=finished,
        vocabularies=vocabularies,
        columns=columns,
        reading=reading,
        sources=sources,
    )
    if context is not None:
        account.add("context", None, f"columns {', '.join(context.columns)}: one value for each row")
        context.write_parquet(directory / CONTEXT_FILE)
    joined = {
        role: table.joined(vocabularies[_side(role)], account) for role, table in tables.items() if table is not None
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
        write_meta(
            negatives, {"rows": below, "fields": sorted(finished.negative_digests), "fingerprint": combined(digests)}
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


def _collect(
    sources: Sequence[Source], reading: Reading, collected: Collected
) -> tuple[Columns, pl.DataFrame | None, list[str]]:
    """The first pass over all sources.

    Returns:
        The roles; the plain columns beside lists of items, which describe the query; the names of the context columns.
    """
    columns = reading.columns.resolve(sources[0].columns, sources[0].name)
    extras: list[pl.DataFrame] = []
    named: list[str] = []
    for source in sources:
        missing = [name for name in columns.roles().values() if name not in source.columns]
        if missing:
            raise InputError(
                f"{source.name}: column {missing[0]!r} is missing, {sources[0].name} has it. "
                f"Columns found: {listed(source.columns)}."
            )
        if reading.positive_label is not None and columns.label is None:
            raise InputError(
                f"{source.name}: positive_label={reading.positive_label} needs a label column (rating, label, score). "
                f"Columns found: {listed(source.columns)}."
            )
        wanted, lists = list(columns.roles().values()), False
        if not source.text:
            probe = next(iter(source.chunks([columns.item or ""])))
            lists = is_list(probe, columns.item or "")
        if source is sources[0]:
            named = context_columns(reading.context, columns, source.columns, source.name, lists=lists)
        beside = [name for name in named if name != columns.timestamp]
        context_columns(beside, columns, source.columns, source.name, lists=lists)
        wanted = list(dict.fromkeys([*wanted, *beside, *(source.columns if lists else [])]))
        for frame in source.chunks(wanted):
            if is_list(frame, columns.item or ""):
                described = [
                    name
                    for name in frame.columns
                    if name not in (ROW, *columns.roles().values(), *beside) and not frame.schema[name].is_nested()
                ]
                if described:
                    extras.append(frame.select(columns.query or "", *described))
            collected.add(clean(frame, columns, source, beside), source.name, source.text)
    return columns, pl.concat(extras, how="diagonal_relaxed") if extras else None, named


def _vocabularies(
    collected: Collected, columns: Columns, item_table: FeatureTable | None, reading: Reading, where: str
) -> dict[str, Vocabulary]:
    extra: pl.Series | None = None
    if reading.catalog == "table":
        if item_table is None:
            raise InputError("catalog='table' needs an item table; give items=...")
        extra = item_table.ids_as(collected.distinct["items"][0].dtype)
        if extra.null_count():
            wrong = item_table.ids.filter(extra.is_null())[0]
            raise InputError(
                f"{item_table.where}: column {item_table.id_column!r}: id {wrong!r} is text, "
                "the interactions have integers."
            )
    vocabularies = {
        "queries": collected.vocabulary("queries", columns.query or ""),
        "items": collected.vocabulary("items", columns.item or "", extra),
    }
    if collected.distinct["groups"]:
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


def _tell(
    account: Account,
    *,
    collected: Collected,
    finished: Finished,
    vocabularies: dict[str, Vocabulary],
    columns: Columns,
    reading: Reading,
    sources: Sequence[Source],
) -> None:
    """The account of the reading."""
    rows, below = int(finished.offsets[-1]), int(finished.negative_offsets[-1])
    files = sources[0].name if len(sources) == 1 else f"{len(sources)} files, {sources[0].name} and so on"
    account.add("rows read", collected.rows, files)
    roles = ", ".join(f"{role} = {name}" for role, name in columns.roles().items())
    account.add("columns", None, roles)
    if collected.empty_lists:
        account.add("empty lists", collected.empty_lists, "queries without an item, dropped")
    if columns.timestamp is None:
        gaps = any(isinstance(s, SequenceSource) and s.has_gaps for s in sources)
        account.add(
            "no timestamps",
            None,
            "row order stands for time; repeats of a (query, item) pair are kept"
            + ("; the gaps after the TAB have no origin and are not used" if gaps else ""),
        )
    else:
        account.add("duplicates", finished.duplicates, "same query, item and timestamp; the first is kept")
    if columns.label is not None and reading.positive_label is None:
        account.add(
            "labels ignored",
            None,
            f"every row counts as a positive, whatever its {columns.label}; give positive_label=4 "
            "to count only labels of at least 4",
        )
    if reading.positive_label is not None:
        account.add("negatives", below, f"{columns.label} below {reading.positive_label:g}, kept apart as .negatives")
    account.add("interactions", rows, "positives")
    account.add("queries", len(vocabularies["queries"]))
    account.add("items", len(vocabularies["items"]))
    if reading.positive_label is not None:
        silent = int(np.count_nonzero(np.diff(finished.offsets) == 0))
        account.add("queries without a positive", silent, "they stay in the vocabulary")
