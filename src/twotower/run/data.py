"""Reading and splitting data by the settings, consistently on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from twotower.config.run import DataConfig, HashedConfig
from twotower.data import Interactions, Split, by_time, held_out_queries, leave_last_out
from twotower.data.datasets import registry
from twotower.data.io.folders import listing, refuse_other_files
from twotower.data.prepare.request_context import Wanted
from twotower.data.schema.vocabulary import Hashed
from twotower.distributed.launch import Coordinator, Launch
from twotower.errors import InputError
from twotower.features.suggest import FeatureSuggestion, propose, propose_context
from twotower.system.hardware import cores


def read_data(
    source: str | Path, settings: DataConfig, *, items: str | None = None, context: Wanted = None
) -> Interactions:
    """Read a file, a folder or a named data set with the settings of section `data`.

    `context` selects additional columns of the interactions; `wanted_context` returns those a configuration needs.
    """
    query_ids = settings.query_ids
    return registry.load(
        source,
        items=items or settings.items,
        queries=settings.queries,
        columns=settings.columns.model_dump(exclude_none=True),
        positive_label=settings.positive_label,
        catalog=settings.catalog,
        context=context,
        query_ids=Hashed(query_ids.hashed) if isinstance(query_ids, HashedConfig) else query_ids,
        item_ids=settings.item_ids,
        workers=settings.workers or max(cores() // Launch.of_environment().local_size, 1),
    )


def read_by_all(
    source: str | Path, settings: DataConfig, team: Coordinator, *, context: Wanted, before: Path | None
) -> tuple[dict[str, int], Interactions]:
    """Read the data on every rank, checking that all ranks read the same rows.

    If the file `before` exists, also check that the input files are those it lists: the files the run began with.

    Returns:
        The input files with their sizes, and the interactions.

    Raises:
        InputError: the files or rows differ from those of the first rank, or the files from those in `before`.
    """
    files = listing(source)
    refuse_other_files(json.loads(team.broadcast_text("files", json.dumps(files))), files, "the first rank has")
    if before is not None and before.is_file():
        refuse_other_files(json.loads(before.read_text(encoding="utf-8")), files, "the run began with")
    # Shards are read by all ranks together. A single file is read by the first rank; the others find it in the cache.
    share = team.all_at_once if len(files) > 1 else team.first_then_others
    data = share(lambda: read_data(source, settings, context=context), "data")
    if team.broadcast_text("fingerprint", data.fingerprint) != data.fingerprint:
        raise InputError(
            f"{source}: rank {team.ranks.rank} read different rows from the first rank; give all ranks the same files"
        )
    return files, data


def split_data(data: Interactions, settings: DataConfig, *, cold: Literal["drop", "keep"] | None = None) -> Split:
    """Split as section `data` says; `cold` overrides how the protocol handles cold targets."""
    options: dict[str, Any] = {} if cold is None else {"cold": cold}
    if settings.split == "leave-last-out":
        return leave_last_out(data, validation_queries=settings.validation_queries, **options)
    if settings.split == "held-out-queries":
        return held_out_queries(data, validation=settings.validation, test=settings.test, **options)
    return by_time(data, validation=settings.validation, test=settings.test, **options)


def with_catalog(settings: DataConfig) -> DataConfig:
    """Return settings that read the complete item table, if any: new data may also update features of old items."""
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
        Proposals by side: "item", "query", and "context" for the additional columns of the interactions, including
        their timestamp. A side without a table is absent.

    Raises:
        InputError: the data cannot be read, or has neither a feature table nor additional columns.
    """
    settings = settings.model_copy(update={"queries": queries or settings.queries})
    data = read_data(source, settings, items=items, context="all")
    tables = {"item": data.item_table, "query": data.query_table}
    found = {side: propose(table) for side, table in tables.items() if table is not None and table.width > 1}
    if data.context is not None:
        found["context"] = propose_context(data)
    if not found:
        raise InputError(f"{source}: no table of item or query features; pass one with --items or --queries")
    return found
