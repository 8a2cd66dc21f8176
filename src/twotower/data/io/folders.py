"""Discovery of interaction files and feature tables in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from twotower.data.io.layout import META
from twotower.data.io.readers import SUFFIXES, suffix_of
from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError
from twotower.system.filesystem import require_file

INTERACTION_NAMES = ("interactions", "ratings", "transactions", "sequences")
ITEM_NAMES = ("items", "products", "movies", "articles")
QUERY_NAMES = ("users", "queries", "customers", "households", "demographics")
DELTA_LOG = "_delta_log"
_OF = re.compile(r"(.*?)(\d+)(-of-)(\d+)(\D.*)?")
SPLIT_NAMES = {"train": "train", "valid": "validation", "val": "validation", "validation": "validation", "test": "test"}


@dataclass
class Files:
    """The files of a data set.

    Attributes:
        interactions: the interaction files, in reading order.
        items: the item table, if any.
        queries: the query table, if any.
        ignored: names of data files that are not read.
        nested: paths, relative to the folder, of files in subfolders that are read.
        parts: the files of a ready-made split by part ("train", "test" and perhaps "validation"); `interactions` is
            then empty.
        skipped: names of subfolders with data files that are not read.
    """

    interactions: list[Path]
    items: Path | None = None
    queries: Path | None = None
    ignored: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    parts: dict[str, Path] = field(default_factory=dict)

    def reports(self) -> dict[str, list[str]]:
        """Return file names for the account, by label."""
        found = {
            "files ignored": self.ignored,
            "files in subfolders": self.nested,
            "subfolders not read": self.skipped,
        }
        return {label: names for label, names in found.items() if names}


def find_files(path: Path, *, parts: bool = False) -> Files:
    """Find the data files at a path, which may be a file or a folder.

    A folder contains either one file named ``*.inter``, ``interactions.*``, ``ratings.*``, ``transactions.*`` or
    ``sequences.*``, or shards of a single format, which are read in order of name. It may also contain one item table
    (``*.item``, ``items.*``, ``products.*``, ...) and one query table (``*.user``, ``users.*``, ``customers.*``, ...).

    Shards may be in subfolders named ``column=value``, as written by Hive and Spark, or with numeric names, such as
    2024/01. Names that begin with ``.`` or ``_`` are not data. Files in all other subfolders are not read; the account
    reports these subfolders.

    From a Delta table (a folder that contains ``_delta_log``), the files listed in its log are read.

    Args:
        path: a file or a folder.
        parts: whether to accept a folder with a ready-made split: files named ``train.*`` and ``test.*``, optionally
            ``validation.*``, ``valid.*`` or ``val.*``.

    Raises:
        InputError: there is nothing to read, the choice is ambiguous, or a shard is missing.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a Parquet, CSV or TSV file, or a folder of them.")
    require_file(path)
    if not path.is_dir():
        return Files([path])
    if (path / DELTA_LOG).is_dir():
        live = delta_files(path)
        return Files(live, nested=[str(file.relative_to(path)) for file in live if file.parent != path])
    files, nested, skipped = _data_files(path)
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
        ignored = [str(p.relative_to(path)) for p in rest if p not in named]
        return Files(named, items, queries, ignored, skipped=skipped)
    if not rest:
        raise InputError(
            f"{path}: this folder has feature tables but no interactions; add interactions.parquet or .csv."
        )
    if len(rest) > 1 and {_stem(p) for p in rest} & SPLIT_NAMES.keys():
        if parts:
            return _ready_made(path, rest, Files([], items, queries))
        raise InputError(
            f"{path}: {listed([p.name for p in rest])} look like a ready-made split; in Python read it with from_parts."
        )
    kinds = sorted({suffix_of(p) for p in rest})
    if len(kinds) > 1 or (kinds == [".txt"] and len(rest) > 1):
        raise InputError(
            f"{path}: unclear which of {listed([p.name for p in rest])} has the interactions; "
            "name the file, or put shards of one format into a separate folder."
        )
    _refuse_gaps(rest)
    return Files(rest, items, queries, nested=[str(p.relative_to(path)) for p in rest if p in nested], skipped=skipped)


def delta_files(table: Path) -> list[Path]:
    """Return the live files of a Delta table by replaying its log.

    Raises:
        InputError: the log is damaged or names a missing file, or the table has features that are not supported:
            checkpoints, deleted rows, renamed columns, or files in other folders.
    """

    def refusal(found: str) -> InputError:
        return InputError(
            f"{table}: a Delta table with {found}, which this reader does not support; export it as Parquet, e.g. "
            "DeltaTable(path).to_pyarrow_dataset() written with pyarrow.dataset.write_dataset."
        )

    log = table / DELTA_LOG
    if any(log.glob("*.checkpoint*.parquet")):
        raise refusal("checkpoints in its log")
    live: dict[str, None] = {}
    for entry in sorted(log.glob("*.json")):
        try:
            actions = [json.loads(line) for line in entry.read_text(encoding="utf-8").splitlines() if line.strip()]
            for action in actions:
                if (
                    action.get("metaData", {}).get("configuration", {}).get("delta.columnMapping.mode", "none")
                    != "none"
                ):
                    raise refusal("renamed columns")
                if action.get("add", {}).get("deletionVector"):
                    raise refusal("deleted rows in files that are still read")
                if "add" in action:
                    live[unquote(action["add"]["path"])] = None
                elif "remove" in action:
                    live.pop(unquote(action["remove"]["path"]), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{entry}: not a readable Delta log ({error}).") from None
    files = [table / name for name in live]
    outside = next((file for file in files if table not in file.parents or ".." in file.parts), None)
    if outside is not None:
        raise refusal("files in other folders")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing}: missing, but the log of the Delta table names it; restore it.")
    if not files:
        raise InputError(f"{table}: a Delta table without files; write rows to it first.")
    return sorted(files)


def _ready_made(path: Path, files: Sequence[Path], found: Files) -> Files:
    """Add the parts of a ready-made split.

    Raises:
        InputError: a part is missing or has two candidates.
    """
    for file in files:
        part = SPLIT_NAMES.get(_stem(file))
        if part is None:
            found.ignored.append(file.name)
        elif part in found.parts:
            raise InputError(f"{path}: {found.parts[part].name} and {file.name} could each be the {part}; remove one.")
        else:
            found.parts[part] = file
    for part in ("train", "test"):
        if part not in found.parts:
            raise InputError(
                f"{path}: {listed([p.name for p in found.parts.values()])} look like a ready-made split without a "
                f"{part} file; add {part}.csv or .parquet, or name the training file and pass --test FILE."
            )
    return found


def several(paths: Sequence[str | Path]) -> Files:
    """Find the data files of several paths.

    Raises:
        InputError: a path does not exist, or the list is empty.
    """
    if not paths:
        raise InputError("the list of files is empty; give at least one.")
    found = [find_files(Path(path)) for path in paths]
    return Files(
        [file for one in found for file in one.interactions],
        ignored=[name for one in found for name in one.ignored],
        nested=[name for one in found for name in one.nested],
        skipped=[name for one in found for name in one.skipped],
    )


_PARTITIONED = re.compile(r"[A-Za-z_]\w*=.+|\d+")


def _data_files(folder: Path) -> tuple[list[Path], set[Path], list[str]]:
    """Find the data files of a folder and its subfolders.

    Returns:
        The files to read, in order of path; the subset of these files in subfolders; and the names of subfolders with
        data files that are not read.

    Raises:
        InputError: there are no data files, or only data files in subfolders that may be different tables.
    """

    def is_data(path: Path) -> bool:
        return path.is_file() and path.name[0] not in "._" and suffix_of(path) in SUFFIXES

    def below(subfolder: Path, above: frozenset[Path]) -> list[Path]:
        found: list[Path] = []
        if (target := subfolder.resolve()) in above:  # a link to an enclosing folder, which is being read already
            return found
        for path in sorted(subfolder.iterdir()):
            if path.is_dir() and path.name[0] not in "._":
                found += below(path, above | {target})
            elif is_data(path):
                found.append(path)
        return found

    files = sorted(path for path in folder.iterdir() if is_data(path))
    found = {
        path: inside
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name[0] not in "._" and (inside := below(path, frozenset({folder.resolve()})))
    }
    partitions = {path: inside for path, inside in found.items() if _PARTITIONED.fullmatch(path.name)}
    others = {path: inside for path, inside in found.items() if path not in partitions}
    if not files and not partitions:
        if others:
            names = listed([f"{path.name} ({len(inside)})" for path, inside in others.items()])
            raise InputError(
                f"{folder}: the data files are in subfolders: {names}; give one of them, or a list of files."
            )
        raise InputError(f"{folder}: no data files in this folder; expected files named *{', *'.join(SUFFIXES)}.")
    nested = [path for inside in partitions.values() for path in inside]
    return [*files, *nested], set(nested), [f"{path.name} ({len(inside)} files)" for path, inside in others.items()]


def listing(source: str | Path) -> dict[str, int]:
    """Map the interaction files to their sizes in bytes; an empty dict for prepared data and unreadable paths."""
    path = Path(source)
    if (path / META).is_file():  # prepared data
        return {}
    try:
        return {str(p): p.stat().st_size for p in find_files(path).interactions}
    except (InputError, OSError):  # reading the data reports the error
        return {}


def refuse_other_files(before: Mapping[str, int], now: Mapping[str, int], whose: str) -> None:
    """Check that the files are the same as on rank 0 or in the interrupted run.

    Args:
        before: the expected files, from `listing`.
        now: the files found.
        whose: subject and verb for the messages, such as "the first rank has".

    Raises:
        InputError: a shard is missing, has a different size or is new; the message names the shard.
    """
    for file, size in before.items():
        if file not in now:
            raise InputError(
                f"{file}: missing, but {whose} it ({size:,} bytes); restore it, or start a new run without it"
            )
        if now[file] != size:
            raise InputError(
                f"{file}: has {now[file]:,} bytes, expected {size:,} ({whose} that version); restore it, or start a "
                "new run"
            )
    for file in now:
        if file not in before:
            raise InputError(f"{file}: exists, but is not among the files that {whose}; remove it, or start a new run")


def _refuse_gaps(files: Sequence[Path]) -> None:
    """Check that no shard is missing, if the file names contain the total, as in ``part-00003-of-00010.parquet``."""
    numbered: dict[tuple[str, ...], dict[int, Path]] = {}
    for file in files:
        if found := _OF.fullmatch(file.name):
            before, number, of, total, after = (part or "" for part in found.groups())
            numbered.setdefault((before, of, total, after), {})[int(number)] = file
    for (before, of, total, after), found_shards in numbered.items():
        first = 1 if int(total) in found_shards else 0
        for number in range(first, first + int(total)):
            if number not in found_shards:
                name = f"{before}{number:0{len(total)}}{of}{total}{after}"
                example = next(iter(found_shards.values()))
                raise InputError(
                    f"{example.with_name(name)}: the shard is missing; the name of {example.name} says that there "
                    f"are {int(total)}."
                )


def _stem(path: Path) -> str:
    return path.name.split(".", maxsplit=1)[0].lower()


def _table(folder: Path, files: Sequence[Path], suffix: str, names: Sequence[str]) -> Path | None:
    found = [p for p in files if suffix_of(p) == suffix or _stem(p) in names]
    if len(found) > 1:
        raise InputError(
            f"{folder}: {listed([p.name for p in found])} could each be the feature table; keep one, or pass its path."
        )
    return found[0] if found else None


def cache_root() -> Path:
    """Return the folder for prepared data and downloads: TWOTOWER_CACHE or ~/.cache/twotower."""
    root = os.environ.get("TWOTOWER_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "twotower"


#: Approximate maximum number of bytes that a cache key reads from all files together, and bytes per sample.
SAMPLED_BYTES, SAMPLE_BYTES = 64 << 20, 4 << 10


def cache_key(files: Sequence[Path], options: dict[str, Any]) -> str:
    """Return a cache key for the current state of these files and these options.

    The state is the path, size, modification time and samples of the content; samples are needed because a file may be
    rewritten with the same size and time. Small files are read completely, large files in evenly spaced blocks.
    """
    each = SAMPLED_BYTES // max(len(files), 1)
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns, _sampled(p, each)) for p in files]
    return hashlib.sha256(json.dumps([stamps, options], sort_keys=True).encode()).hexdigest()[:32]


def _sampled(path: Path, most: int) -> str:
    """Compute the checksum of a file; if it has more than `most` bytes, only of its ends and blocks between them."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= most:
            digest.update(file.read())
        else:
            count = max(min(most, 1 << 20) // SAMPLE_BYTES, 3)
            for block in range(count):
                file.seek(block * (size - SAMPLE_BYTES) // (count - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
