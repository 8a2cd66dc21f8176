"""Reading and splitting data according to the settings, consistently on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from twotower.config.run import Config, DataConfig, HashedConfig
from twotower.data import (
    Interactions,
    Parts,
    Split,
    by_time,
    held_out_queries,
    leave_last_out,
    random_rows,
    with_impressions,
    with_query_text,
)
from twotower.data.datasets import registry
from twotower.data.eligible_rows import with_eligibility
from twotower.data.events import with_events
from twotower.data.io.folders import Files, find_files, listing, refuse_other_files
from twotower.data.io.layout import META
from twotower.data.prepare.request_context import ContextColumns
from twotower.data.schema.vocabulary import Hashed
from twotower.distributed.launch import Coordinator, Launch
from twotower.errors import InputError
from twotower.features.suggest import FeatureSuggestion, propose, propose_context
from twotower.system.hardware import cores


def read_data(
    source: str | Path, settings: DataConfig, *, items: str | None = None, context: ContextColumns = None
) -> Interactions | Parts:
    """Read a file, a folder or a named data set with the settings of section `data`, and apply the event weights.

    `context` selects additional columns of the interactions; `context_to_read` returns those that a configuration
    needs.

    Returns:
        Interactions to split, or a ready-made split if the settings name its files or the folder contains them.
    """
    if (parts := ready_made(source, settings)) is not None:
        return _read_parts(parts, settings, items=items, context=context)
    query_ids, columns = settings.query_ids, _columns(settings)
    read = registry.load(
        source,
        items=items or settings.items,
        queries=settings.queries,
        columns=columns,
        positive_label=settings.positive_label,
        catalog=settings.catalog,
        context=context,
        query_ids=Hashed(query_ids.hashed) if isinstance(query_ids, HashedConfig) else query_ids,
        item_ids=settings.item_ids,
        workers=settings.workers or max(cores() // Launch.of_environment().local_size, 1),
        **_table_columns(settings),
    )
    feedback = settings.feedback
    if feedback.file is not None:
        read = with_impressions(
            read,
            _near(Path(source), feedback.file),
            columns=_feedback_columns(settings),
            passed_over=feedback.passed_over,
            request=feedback.request,
        )
    if settings.eligibility is not None:
        if isinstance(read, Parts):
            raise InputError(NO_PARTS)
        read = with_eligibility(read, settings.eligibility)
    return _described(read, settings)


def _columns(settings: DataConfig) -> dict[str, Any]:
    """Return the column of each named role; if the texts are the queries, their column has the role `query`."""
    named = settings.columns.model_dump(exclude_none=True)
    return {**named, "query": settings.query_text} if settings.texts_are_queries else named


def _feedback_columns(settings: DataConfig) -> dict[str, Any]:
    """Return the columns of the feedback file; query texts are by default in the same column as in the data."""
    named = settings.feedback.columns.model_dump(exclude_none=True)
    return {"query": settings.query_text, **named} if settings.texts_are_queries else named


def _described(data: Interactions, settings: DataConfig) -> Interactions:
    """Apply `data.query_text` and `data.events`."""
    if settings.query_text is not None:
        data = with_query_text(data, settings.query_text, texts_are_queries=settings.texts_are_queries)
    events = settings.events
    if events is None:
        return data
    assert events.column is not None
    return with_events(data, events.column, events.weights, held_out=events.held_out)


def ready_made(source: str | Path, settings: DataConfig) -> Files | None:
    """Find the files of a ready-made split; return None if neither `data.test` nor the source names such files.

    Raises:
        InputError: a file is missing, or `data.validation` is a file and `data.test` is not.
    """
    path = Path(source)
    named = {part: value for part in ("validation", "test") if isinstance(value := getattr(settings, part), str)}
    if named:
        if "test" not in named:
            raise InputError(
                f"data.validation: {named['validation']} is a file, so the test must be a file too; pass --test FILE"
            )
        found = Files([], parts={"train": path, **{part: _near(path, name) for part, name in named.items()}})
        for part, file in found.parts.items():
            if not file.is_file():
                raise InputError(f"{part} file {file}: no such file; with --test, DATA is the training file")
        return found
    if not path.is_dir() or (path / META).is_file():
        return None
    if any((path / name).is_file() for name in ("ratings.dat", "ratings.parquet")):
        return None
    files = find_files(path, parts=True)
    return files if files.parts else None


def _near(source: Path, name: str) -> Path:
    """Return the path, or the file of that name next to the training file if the data has moved."""
    path = Path(name)
    return path if path.exists() or not (source.parent / path.name).exists() else source.parent / path.name


#: Message if eligibility rules are set for a ready-made split.
NO_PARTS = (
    "data.eligibility: not supported for a ready-made split of train and test files; use one data file with "
    "data.split=time, random or leave-last-out"
)


def _read_parts(files: Files, settings: DataConfig, *, items: str | None, context: ContextColumns) -> Parts:
    if settings.feedback.file is not None:
        raise InputError(
            "data.feedback.file: a split from train and test files has no observed negatives; use "
            "data.feedback.column, or a single data file"
        )
    if settings.eligibility is not None:
        raise InputError(NO_PARTS)
    if settings.texts_are_queries:
        raise InputError(
            "data.query_text: not supported for a ready-made split of train and test files; train on one file, and "
            "evaluate on judged queries with twotower evaluate MODEL --qrels FILE --queries FILE"
        )
    for name in ("query_ids", "item_ids"):
        if getattr(settings, name) != "vocabulary":
            raise InputError(f"data.{name}: a split from train and test files needs a vocabulary; expected vocabulary")
    if settings.catalog == "table":
        raise InputError(
            "data.catalog: a split from train and test files has only the items in these files; expected interactions"
        )
    read = {
        part: _described(
            Interactions.read(
                file,
                columns=settings.columns.model_dump(exclude_none=True),
                positive_label=settings.positive_label,
                part=True,
                context=context,
            ),
            settings,
        )
        for part, file in files.parts.items()
    }
    return Parts(
        read["train"],
        read.get("validation"),
        read["test"],
        items=items or settings.items or files.items,
        queries=settings.queries or files.queries,
        **_table_columns(settings),
    )


def _table_columns(settings: DataConfig) -> dict[str, Any]:
    """Return the named columns of the feature tables as arguments; None for a table without named columns."""
    named = {"item_columns": settings.item_columns, "query_columns": settings.query_columns}
    return {name: columns.model_dump(exclude_none=True) or None for name, columns in named.items()}


def read_by_all(
    source: str | Path, settings: DataConfig, team: Coordinator, *, context: ContextColumns, before: Path | None
) -> tuple[dict[str, int], Interactions | Parts]:
    """Read the data on every rank, checking that all ranks read the same rows.

    If the file `before` exists, also check that the input files are the ones listed in it, from the start of the run.

    Returns:
        The input files with their sizes, and the interactions.

    Raises:
        InputError: the files or rows differ from rank 0's, or the files differ from the ones in `before`.
    """
    parts = ready_made(source, settings)
    files = listing(source) if parts is None else {str(p): p.stat().st_size for p in parts.parts.values()}
    refuse_other_files(json.loads(team.broadcast_text("files", json.dumps(files))), files, "the first rank has")
    if before is not None and before.is_file():
        refuse_other_files(json.loads(before.read_text(encoding="utf-8")), files, "the run began with")
    # Shards are read by all ranks together. A single file is read by the first rank; the others find it in the cache.
    share = team.all_at_once if len(files) > 1 and parts is None else team.first_then_others
    data = share(lambda: read_data(source, settings, context=context), "data")
    if team.broadcast_text("fingerprint", data.fingerprint) != data.fingerprint:
        raise InputError(
            f"{source}: rank {team.ranks.rank} read different rows than the first rank; give all ranks the same files"
        )
    return files, data


def split_options(config: Config) -> dict[str, Any]:
    """Return the arguments of `split_data` that depend on what the towers read.

    If the texts are the queries, items without a training row are targets too, provided the item tower has features.
    """
    keeps = config.data.texts_are_queries and config.item_tower.features != "none"
    return {"histories": config.query_tower.history is not None, "cold": "keep" if keeps else None}


def read_together(
    source: str | Path, settings: DataConfig, team: Coordinator, *, context: ContextColumns
) -> Interactions | Parts:
    """Read the data for a command; several ranks read it as in `read_by_all`."""
    if team.ranks.size == 1:
        return read_data(source, settings, context=context)
    return read_by_all(source, settings, team, context=context, before=None)[1]


def split_data(
    data: Interactions | Parts,
    settings: DataConfig,
    *,
    cold: Literal["drop", "keep"] | None = None,
    histories: bool = False,
) -> Split:
    """Split data by the settings of section `data`; a ready-made split is returned unchanged.

    Args:
        data: the result of `read_data`.
        settings: section `data`.
        cold: how the protocol handles cold targets; None for its default.
        histories: whether the model reads histories; a query without a training row is then tested if it has a history.
    """
    if settings.windows > 1 and (isinstance(data, Parts) or settings.split != "time"):
        raise InputError(
            f"data.windows: {settings.windows}: test windows are consecutive in time; use data.split=time and a "
            "single data file, or data.windows=1"
        )
    if isinstance(data, Parts):
        return data.split()
    options: dict[str, Any] = {} if cold is None else {"cold": cold}
    if settings.split == "leave-last-out":
        return leave_last_out(data, validation_queries=settings.validation_queries, **options)
    if isinstance(settings.validation, str) or isinstance(settings.test, str):
        raise InputError(
            "data.validation, data.test: files belong to a ready-made split; to split other interactions, use fractions"
        )
    options |= {"validation": settings.validation, "test": settings.test}
    if settings.split == "held-out-queries":
        if settings.texts_are_queries and not histories:
            options["fold_in"] = 0.0  # a new text has no history, so all of its rows are targets
        return held_out_queries(data, **options)
    if settings.split == "random":
        return random_rows(data, **options)
    return by_time(data, histories=histories, new_queries=settings.texts_are_queries, **options)


def with_catalog(settings: DataConfig) -> DataConfig:
    """Return settings that read the complete item table, because new data may update the features of old items."""
    return settings if settings.items is None else settings.model_copy(update={"catalog": "table"})


def absolute(source: str | Path) -> str:
    """Return the absolute path of a file or folder; the name of a data set is returned unchanged."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else str(source)


def propose_features(
    source: str | Path, settings: DataConfig, *, items: str | None = None, queries: str | None = None
) -> dict[str, list[FeatureSuggestion]]:
    """Implement `twotower features`: propose how to encode the columns of each table.

    Returns:
        Proposals by side: "item", "query", and "context" for the additional columns of the interactions, including the
        timestamp. A side without a table is absent.

    Raises:
        InputError: the data cannot be read, or has neither a feature table nor additional columns.
    """
    settings = settings.model_copy(update={"queries": queries or settings.queries})
    read = read_data(source, settings, items=items, context="all")
    data = read.split().data if isinstance(read, Parts) else read
    tables = {"item": data.item_table, "query": data.query_table}
    found = {side: propose(table) for side, table in tables.items() if table is not None and table.width > 1}
    if data.context is not None:
        found["context"] = propose_context(data)
    if not found:
        raise InputError(f"{source}: no table of item or query features; pass one with --items or --queries")
    return found
