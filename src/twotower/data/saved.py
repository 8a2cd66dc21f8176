"""Reading and writing of a folder of saved interactions: rows, vocabularies, tables and account."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twotower.data.account import Account
from twotower.data.building import TABLE_FILES, VOCABULARY_FILES
from twotower.data.context import CONTEXT_FILE, read_context
from twotower.data.storing import (
    DTYPES,
    META,
    combined,
    digest,
    open_column,
    read_meta,
    read_table,
    vocabulary_digest,
    write_meta,
)
from twotower.errors import InputError
from twotower.ids import read_vocabulary

#: Fields of `Interactions` with one value per row, except the context.
ROW_FIELDS = ("item_codes", "timestamps", "weights", "labels", "groups")


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Compute the sha256 over the rows and vocabularies among the fields of `Interactions`."""
    rows = {name: digest(parts[name]) for name in ("offsets", *ROW_FIELDS) if parts[name] is not None}
    sides = {"queries": parts["queries"], "items": parts["items"], "groups_": parts["group_names"]}
    named = {side.rstrip("_"): vocabulary_digest(v) for side, v in sides.items() if v is not None}
    return combined({**rows, **named})


def write_saved(directory: Path, parts: Mapping[str, Any]) -> None:
    """Write the fields of `Interactions`, including `known_fingerprint`, to an existing empty folder."""
    _write_rows(directory, parts)
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
        },
    )


def open_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Open a folder: the fields of `Interactions`, memory-mapped, and the fields that differ in its negatives, if any.

    Raises:
        InputError: missing, truncated, or of another layout version.
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
        if not meta["negatives"]:
            return saved, None
        below = read_meta(folder / "negatives")
        return saved, {
            **dict.fromkeys((*ROW_FIELDS, "context")),
            **_columns(folder / "negatives", below, len(queries)),
            "known_fingerprint": below["fingerprint"],
            "account": Account(),
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / META}: damaged ({error}); prepare the data again.") from None


def _columns(folder: Path, meta: dict[str, Any], num_queries: int) -> dict[str, Any]:
    """Open the arrays of one folder and check them against its meta.json."""
    arrays = {name: open_column(folder, name, meta["rows"]) for name in meta["fields"]}
    # Offsets are small and used at every step, so they are read into memory.
    arrays["offsets"] = np.array(open_column(folder, "offsets", num_queries + 1))
    if int(arrays["offsets"][-1]) != meta["rows"]:
        raise InputError(f"{folder / 'offsets.npy'}: does not match the number of rows; prepare the data again.")
    return arrays
