"""Checks of a model folder before its content is read: file names, kinds of files, and consistent sizes.

The sizes come from the metadata and from the headers of the files. If the files disagree, or the settings describe a
larger model than the files contain, the folder is rejected before the claimed amount is read or allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import torch

from twotower.config.run import Config
from twotower.distributed.row_files import StoredShape, stored_shapes
from twotower.errors import InputError
from twotower.hashing import file_sha256
from twotower.system.checksums import is_plain, read_json, require_file, verify_checksums, write_checksums
from twotower.system.parquet import scan_parquet
from twotower.towers import build_towers
from twotower.towers.tables import tables_without_memory

#: Files of every model folder.
NEEDED = ("towers.safetensors", "items.safetensors", "histories.safetensors", "queries.parquet", "items.parquet")
#: Files that a model folder may also have.
OPTIONAL = (
    *("item_table.parquet", "rows.safetensors", "context.parquet", "test_context.parquet"),
    *(f"{side}_features.{kind}" for side in ("item", "query", "context") for kind in ("json", "safetensors")),
)
#: Largest number of rows of a table or vocabulary; codes are int32.
MOST_ROWS = 2**31 - 1
#: Largest mean size of a row of a table.
MOST_ROW_BYTES = 1 << 20
ADVICE = "copy the folder again or train again"


def require_names(folder: Path, checksums: Mapping[str, object], needed: tuple[str, ...], advice: str) -> None:
    """Check that checksums are given for plain names of regular files, and for every needed file.

    Raises:
        InputError: a name leads out of the folder, or a file is missing, is not a regular file or has no checksum.
    """
    for name, digest in checksums.items():
        if not is_plain(name) or not isinstance(digest, str):
            raise InputError(f"{folder}: {name!r:.80} is not the name of a file in this folder; {advice}")
        require_file(folder / name, advice)
    for name in needed:
        if name not in checksums:
            raise InputError(f"{folder / name}: has no checksum; {advice}")


def read_description(path: Path, version: int, advice: str) -> dict[str, Any]:
    """Read the JSON file that describes a folder, with its schema version and the checksums of the other files.

    Raises:
        InputError: the file is missing, damaged, or has a different schema version.
    """
    require_file(path, advice)
    try:
        described = read_json(path)
        verify_checksums(path.parent, advice, only=path.name)  # older versions wrote no SHA256SUMS
        found, _ = described["schema_version"], dict(described["checksums"])
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error}); {advice}") from error
    if found != version:
        raise InputError(f"{path}: schema version {found!r:.40}, but this twotower reads {version}; {advice}")
    return described


def write_description(path: Path, values: Mapping[str, Any]) -> None:
    """Write the JSON file that describes a folder, with the checksums of the other files, which exist already."""
    checksums = {one.name: file_sha256(one) for one in sorted(path.parent.iterdir())}
    text = json.dumps({**values, "checksums": checksums}, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    write_checksums(path.parent, [path.name])


def require_model_names(folder: Path, checksums: Mapping[str, object]) -> None:
    """Check the names in the metadata of a model folder; see `require_names`."""
    present = tuple(name for name in OPTIONAL if (folder / name).exists() or (folder / name).is_symlink())
    require_names(folder, checksums, (*NEEDED, *present), ADVICE)


def parquet_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, from its footer.

    Raises:
        ValueError: the footer is damaged.
    """
    try:
        return int(scan_parquet(path).select(pl.len()).collect().item())
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{path.name}: not readable ({str(error).splitlines()[0]})") from None


def require_sizes(folder: Path, metadata: Mapping[str, Any], config: Config) -> None:
    """Check that the headers of the files agree with the metadata and with each other.

    Raises:
        OSError, ValueError: they disagree; the message names the file.
    """
    items, queries = (_count(metadata, name) for name in ("num_items", "num_queries"))
    item = config.item_tower
    events = config.data.events
    width = item.dimension + (item.bias or item.popularity > 0 or bool(metadata.get("recent_prior")))
    width += len(events.weights or ()) if events is not None and item.event_share else 0
    _expect(folder / "items.safetensors", {"embeddings": ("F32", (items, width)), "counts": ("I64", (items,))})
    rows = _shapes(folder / "histories.safetensors").get("items", StoredShape("", (0,), 0)).shape
    histories = {"offsets": ("I64", (queries + 1,)), "items": ("I32", (*rows,)[:1])}
    _expect(folder / "histories.safetensors", histories, {"gaps": ("I8", rows), "events": ("I8", rows)})
    kept = {name: (kind, rows) for name, kind in (("timestamps", "I64"), ("weights", "F32"), ("groups", "I32"))}
    if (folder / "rows.safetensors").is_file():
        _expect(folder / "rows.safetensors", {"learnt": ("I64", (queries,))}, kept, others=queries + rows[0] + 1)
    tables = {"item_table.parquet": items, "context.parquet": rows[0]}
    for name, count in {"items.parquet": items, "queries.parquet": queries, **tables}.items():
        path = folder / name
        if not path.is_file():
            continue
        found = parquet_rows(path)
        columns = scan_parquet(path).collect_schema().names()
        is_coded = name in NEEDED and columns != ["id"]  # one row with the number of ids
        if path.stat().st_size > MOST_ROW_BYTES * (found + 64):
            raise ValueError(f"{name}: {path.stat().st_size:,} bytes for {found:,} rows")
        if found != (1 if is_coded else count):
            raise ValueError(f"{name}: {found:,} rows, expected {count:,}")
    for side, count in (("item", items), ("query", queries), ("context", 0)):
        if (folder / f"{side}_features.json").is_file():
            for name, one in _shapes(folder / f"{side}_features.safetensors").items():
                if one.shape[:1] != (count,):
                    raise ValueError(
                        f"{side}_features.safetensors: {name} has shape {list(one.shape)}, not {count:,} rows"
                    )


def require_weights(folder: Path, metadata: Mapping[str, Any], config: Config, tables: Mapping[str, Any]) -> None:
    """Check that the stored weights have the names and shapes of the towers that the settings describe.

    Args:
        folder: the model folder.
        metadata: its metadata.
        config: its settings.
        tables: encoded features, by the name of their argument to `build_towers`.

    Raises:
        OSError, ValueError: a name or a shape differs.
    """
    stored, others = stored_shapes(folder / "towers.safetensors")
    _require_layers(config, sum(math.prod(one.shape) for one in stored.values()))
    with tables_without_memory():
        towers = build_towers(
            config, num_queries=metadata["num_queries"], num_items=metadata["num_items"], **dict(tables)
        )
        if metadata.get("recent_prior"):
            towers.set_recent(torch.zeros(metadata["num_items"]))
    expected = {name: tuple(value.shape) for name, value in towers.state_dict().items()}
    for name, one in stored.items():
        if expected.get(name) != one.shape:
            raise ValueError(
                f"towers.safetensors: {name} has shape {list(one.shape)}, the settings {expected.get(name)}"
            )
    # Older versions did not store some buffers; these are filled in when the model is loaded.
    needed = [name for name, _ in towers.named_parameters(remove_duplicate=False) if name in expected]
    missing = next((name for name in needed if name not in stored and others.get(name) not in stored), None)
    if missing is not None:
        raise ValueError(f"towers.safetensors: {missing} is missing")


def _require_layers(config: Config, numbers: int) -> None:
    """Check, before memory is allocated, that the layers of the settings have no more weights than are stored.

    Raises:
        ValueError: the layers have more weights.
    """
    width, history = config.item_tower.dimension, config.query_tower.history
    needed, hidden = 0, [config.item_tower.hidden]
    if history is not None and history.sequence is not None:
        needed = 4 * history.sequence.blocks * width**2
    else:  # a sequence tower has no MLP
        hidden.append(config.query_tower.hidden or [])
    needed += sum(one * next_one for sizes in hidden for one, next_one in pairwise([*sizes, width]))
    if needed > numbers:
        raise ValueError(f"the settings need {needed:,} weights, towers.safetensors has {numbers:,}")


def _count(metadata: Mapping[str, Any], name: str) -> int:
    found = metadata[name]
    if type(found) is not int or not 0 <= found <= MOST_ROWS:
        raise ValueError(f"metadata.json: {name} is {found!r:.40}, expected an integer in 0 .. {MOST_ROWS:,}")
    return found


def _shapes(path: Path) -> dict[str, StoredShape]:
    return stored_shapes(path)[0]


Described = Mapping[str, tuple[str, tuple[int, ...]]]


def _expect(path: Path, needed: Described, optional: Described | None = None, *, others: int | None = None) -> None:
    """Check the tensors of a file.

    The file may have additional vectors of at most `others` values; with None it may have no additional tensors.
    """
    found, known = _shapes(path), {**(optional or {}), **needed}
    for name, one in found.items():
        if others is not None and len(one.shape) == 1 and one.shape[0] <= others:
            known.setdefault(name, (one.dtype, one.shape))
    for name in needed:
        if name not in found:
            raise ValueError(f"{path.name}: {name} is missing")
    for name, one in found.items():
        if (one.dtype, one.shape) != known.get(name):
            raise ValueError(f"{path.name}: {name} is {one.dtype} {list(one.shape)}, expected {known.get(name)}")
