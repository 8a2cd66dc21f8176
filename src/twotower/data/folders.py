"""Which files of a folder are the interactions, and which the feature tables."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.data.reading import SUFFIXES, suffix_of
from twotower.data.storing import META
from twotower.errors import InputError
from twotower.schema import listed

INTERACTION_NAMES = ("interactions", "ratings", "transactions", "sequences")
ITEM_NAMES = ("items", "products", "movies", "articles")
QUERY_NAMES = ("users", "queries", "customers", "households", "demographics")
_OF = re.compile(r"(.*?)(\d+)(-of-)(\d+)(\D.*)?")
SPLIT_NAMES = {"train", "valid", "validation", "test"}


@dataclass
class Files:
    """Files of a data set: `interactions` in the order in which they are read."""

    interactions: list[Path]
    items: Path | None = None
    queries: Path | None = None
    ignored: list[str] = field(default_factory=list)


def find_files(path: Path) -> Files:
    """The files of `path`, a file or a folder.

    A folder holds either one file named ``*.inter``, ``interactions.*``, ``ratings.*``, ``transactions.*`` or
    ``sequences.*``, or shards of one format, read in the order of their names; besides, at most one item table
    (``*.item``, ``items.*``, ``products.*``, ``movies.*``) and one query table (``*.user``, ``users.*``, ...).

    Raises:
        InputError: nothing to read, or more than one reading.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a Parquet, CSV or TSV file, or a folder of them.")
    if not path.is_dir():
        return Files([path])
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] not in "._" and suffix_of(p) in SUFFIXES)
    if not files:
        raise InputError(f"{path}: no data files in this folder; expected some of *{', *'.join(SUFFIXES)}.")
    items = _table(path, files, ".item", ITEM_NAMES)
    queries = _table(path, files, ".user", QUERY_NAMES)
    rest = [p for p in files if p not in (items, queries)]
    named = [p for p in rest if suffix_of(p) == ".inter" or _stem(p) in INTERACTION_NAMES]
    if len(named) > 1:
        raise InputError(
            f"{path}: {listed([p.name for p in named])} could each be the interactions; "
            "name the file instead of the folder."
        )
    if named:
        return Files(named, items, queries, [p.name for p in rest if p not in named])
    if not rest:
        raise InputError(
            f"{path}: feature tables but no interactions in this folder; add interactions.parquet or .csv."
        )
    if len(rest) > 1 and {_stem(p) for p in rest} & SPLIT_NAMES:
        raise InputError(
            f"{path}: {listed([p.name for p in rest])} look like a ready-made split; read it with from_parts."
        )
    kinds = sorted({suffix_of(p) for p in rest})
    if len(kinds) > 1 or (kinds == [".txt"] and len(rest) > 1):
        raise InputError(
            f"{path}: cannot tell the interactions among {listed([p.name for p in rest])}; "
            "name the file, or keep shards of one format in a folder of their own."
        )
    _refuse_gaps(rest)
    return Files(rest, items, queries)


def several(paths: Sequence[str | Path]) -> Files:
    """A list of files, each of which must be there.

    Raises:
        InputError: one is not, or the list is empty.
    """
    if not paths:
        raise InputError("an empty list of files; give at least one.")
    return Files([file for path in paths for file in find_files(Path(path)).interactions])


def listing(source: str | Path) -> dict[str, int]:
    """The files of interactions and their sizes in bytes; nothing for what is read in another way or not at all."""
    path = Path(source)
    if (path / META).is_file():  # prepared data
        return {}
    try:
        return {str(p): p.stat().st_size for p in find_files(path).interactions}
    except (InputError, OSError):  # reading says what is wrong
        return {}


def refuse_other_files(before: Mapping[str, int], now: Mapping[str, int], whose: str) -> None:
    """Refuse files that are not those of somebody else, or of an earlier moment.

    Args:
        before: what is expected, as `listing` gives it.
        now: what is there.
        whose: "the first rank has", and so on.

    Raises:
        InputError: a shard is gone, is of another size, or is new; the message names it.
    """
    for file, size in before.items():
        if file not in now:
            raise InputError(
                f"{file}: is not there, {whose} it ({size:,} bytes); put it back, or start anew without it"
            )
        if now[file] != size:
            raise InputError(
                f"{file}: has {now[file]:,} bytes, {whose} it with {size:,}; bring that one back, or start anew"
            )
    for file in now:
        if file not in before:
            raise InputError(f"{file}: is there, and not among the files that {whose}; take it away, or start anew")


def _refuse_gaps(files: Sequence[Path]) -> None:
    """Refuse shards that say how many they are, as ``part-00003-of-00010.parquet`` does, where one is missing."""
    numbered: dict[tuple[str, ...], dict[int, Path]] = {}
    for file in files:
        if found := _OF.fullmatch(file.name):
            before, number, of, total, after = (part or "" for part in found.groups())
            numbered.setdefault((before, of, total, after), {})[int(number)] = file
    for (before, of, total, after), there in numbered.items():
        first = 1 if int(total) in there else 0
        for number in range(first, first + int(total)):
            if number not in there:
                name = f"{before}{number:0{len(total)}}{of}{total}{after}"
                example = next(iter(there.values()))
                raise InputError(
                    f"{example.with_name(name)}: the shard is missing; {example.name} says how many there are."
                )


def _stem(path: Path) -> str:
    return path.name.split(".", maxsplit=1)[0].lower()


def _table(folder: Path, files: Sequence[Path], suffix: str, names: Sequence[str]) -> Path | None:
    found = [p for p in files if suffix_of(p) == suffix or _stem(p) in names]
    if len(found) > 1:
        raise InputError(f"{folder}: {listed([p.name for p in found])} could each be the table; keep one, or pass it.")
    return found[0] if found else None


def cache_root() -> Path:
    """Where prepared data and downloads go: TWOTOWER_CACHE, or ~/.cache/twotower."""
    told = os.environ.get("TWOTOWER_CACHE")
    return Path(told).expanduser() if told else Path.home() / ".cache" / "twotower"


def cache_key(files: Sequence[Path], options: dict[str, Any]) -> str:
    """A name for what these files, as they are now, become under these options."""
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([stamps, options], sort_keys=True).encode()).hexdigest()[:32]
