"""Data as the settings say: read, the same on every rank, and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from twotower.config import DataConfig, HashedConfig
from twotower.data import Interactions, Split, by_time, datasets, held_out_queries, leave_last_out
from twotower.data.context import Wanted
from twotower.data.folders import listing, refuse_other_files
from twotower.data.proposing import Proposed, propose
from twotower.data.proposing_context import propose_context
from twotower.errors import InputError
from twotower.ids import Hashed
from twotower.launch import Launch
from twotower.machine import cores
from twotower.team import Team


def read_data(
    source: str | Path, settings: DataConfig, *, items: str | None = None, context: Wanted = None
) -> Interactions:
    """Read a file, a folder or a named data set with the settings of section `data`.

    `context`: further columns of the interactions to read; those that a configuration needs are `wanted_context`.
    """
    told = settings.query_ids
    return datasets.load(
        source,
        items=items or settings.items,
        queries=settings.queries,
        columns=settings.columns.model_dump(),
        positive_label=settings.positive_label,
        catalog=settings.catalog,
        context=context,
        query_ids=Hashed(told.hashed) if isinstance(told, HashedConfig) else told,
        item_ids=settings.item_ids,
        workers=settings.workers or max(cores() // Launch.of_environment().local_size, 1),
    )


def read_by_all(
    source: str | Path, settings: DataConfig, team: Team, *, context: Wanted, before: Path | None
) -> tuple[dict[str, int], Interactions]:
    """The data, the same on every rank and, where `before` lists them, from the same files as when the run began."""
    files = listing(source)
    refuse_other_files(json.loads(team.said_by_first("files", json.dumps(files))), files, "the first rank has")
    if before is not None and before.is_file():
        refuse_other_files(json.loads(before.read_text(encoding="utf-8")), files, "the run began with")
    # Shards are read by all ranks together; anything else by the first, and the others find it in the cache.
    share = team.all_at_once if len(files) > 1 else team.first_then_others
    data = share(lambda: read_data(source, settings, context=context), "data")
    if team.said_by_first("fingerprint", data.fingerprint) != data.fingerprint:
        raise InputError(f"{source}: rank {team.ranks.rank} reads other rows than the first; give all the same files")
    return files, data


def split_data(data: Interactions, settings: DataConfig, *, cold: Literal["drop", "keep"] | None = None) -> Split:
    """Split as section `data` says; `cold` in place of the protocol's own way with cold targets."""
    told: dict[str, Any] = {} if cold is None else {"cold": cold}
    if settings.split == "leave-last-out":
        return leave_last_out(data, validation_queries=settings.validation_queries, **told)
    if settings.split == "held-out-queries":
        return held_out_queries(data, validation=settings.validation, test=settings.test, **told)
    return by_time(data, validation=settings.validation, test=settings.test, **told)


def with_catalog(settings: DataConfig) -> DataConfig:
    """New days are read with the whole item table, where there is one: it describes old items anew as well."""
    return settings if settings.items is None else settings.model_copy(update={"catalog": "table"})


def absolute(source: str | Path) -> str:
    """The full path of a file or folder; the name of a data set as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else str(source)


def propose_features(
    source: str | Path, settings: DataConfig, *, items: str | None = None, queries: str | None = None
) -> dict[str, list[Proposed]]:
    """The whole of `twotower features`: what the columns of each table could be, by side where there is a table.

    Side "context" are the further columns of the interactions, their time among them.

    Raises:
        InputError: the data cannot be read, or has neither a feature table nor further columns.
    """
    told = settings.model_copy(update={"queries": queries or settings.queries})
    data = read_data(source, told, items=items, context="all")
    tables = {"item": data.item_table, "query": data.query_table}
    found = {side: propose(table) for side, table in tables.items() if table is not None and table.width > 1}
    if data.context is not None:
        found["context"] = propose_context(data)
    if not found:
        raise InputError(f"{source}: no table of item or query features; give one with --items or --queries")
    return found
