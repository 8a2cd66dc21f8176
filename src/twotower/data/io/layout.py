"""File layout of prepared interactions: one .npy file per column, vocabularies as Parquet, and meta.json."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.schema.vocabulary import CodedIds, Vocabulary
from twotower.errors import InputError
from twotower.system.checksums import read_json, verify_checksums, write_checksums
from twotower.system.filesystem import changed_places, full_disk_named, partial_folder, require_replaceable
from twotower.system.parquet import read_parquet

LAYOUT_VERSION = 1
#: Incremented when the way files are read changes, so that data prepared by an older version is prepared again.
READ_VERSION = 4
META = "meta.json"
DTYPES: dict[str, Any] = {
    "offsets": np.int64,
    "item_codes": np.int32,
    "timestamps": np.int64,
    "weights": np.float32,
    "labels": np.float32,
    "groups": np.int32,
}
HASH_ROWS = 4_000_000


class ColumnFile:
    """A .npy file of initially unknown length, written by appending; also computes the sha256 of the values."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name, self.rows = name, 0
        self._stream = (directory / f"{name}.npy").open("wb")
        self._hash = hashlib.sha256()
        self._header(0)

    def _header(self, rows: int) -> None:
        # numpy pads the header so that the first axis can grow: the final header overwrites the first one in place.
        dtype = np.dtype(DTYPES[self.name])
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
        self._stream.seek(0)
        np.lib.format.write_array_header_1_0(self._stream, description)

    def append(self, values: NDArray[Any]) -> None:
        """Append rows."""
        data = np.ascontiguousarray(values, dtype=DTYPES[self.name])
        self._stream.write(data.data)
        self._hash.update(data.data)
        self.rows += len(data)

    def close(self) -> str:
        """Write the final header; return the sha256 of the values."""
        self._header(self.rows)
        self._stream.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file after an error, without the final header."""
        self._stream.close()


def digest(values: NDArray[Any] | None) -> str:
    """Compute the sha256 of an array's values in pieces; an empty string for None."""
    if values is None:
        return ""
    total = hashlib.sha256()
    for start in range(0, len(values), HASH_ROWS):
        total.update(np.ascontiguousarray(values[start : start + HASH_ROWS]).data)
    return total.hexdigest()


def vocabulary_digest(vocabulary: Vocabulary | None) -> str:
    """Compute the sha256 of the ids in order; an empty string for None."""
    if vocabulary is None:
        return ""
    if isinstance(vocabulary, CodedIds):  # includes HashedIds
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
    ids = vocabulary.ids
    if ids.dtype == pl.Int64:
        return hashlib.sha256(b"int" + ids.to_numpy().tobytes()).hexdigest()
    total = hashlib.sha256(b"text" + ids.str.len_bytes().to_numpy().tobytes())
    total.update(("".join(ids.to_list())).encode())
    return total.hexdigest()


def combined(digests: dict[str, str]) -> str:
    """Combine the digests of the parts into one fingerprint."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@contextmanager
def appearing(target: Path, marker: str = META) -> Iterator[Path]:
    """Write a data folder atomically: yield a temporary folder, renamed to `target` on success and removed on failure.

    Args:
        target: the folder to write; an existing folder is replaced if it contains `marker`.
        marker: a file that identifies a complete folder.

    Raises:
        InputError: the folder cannot be written, or `target` exists and is not a saved data set.
    """
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            building = stack.enter_context(partial_folder(target, shared=True))
        except OSError as error:
            raise InputError(
                f"{target}: cannot be written ({error.strerror}); choose another folder (cache=..., or TWOTOWER_CACHE)."
            ) from None
        require_replaceable(target, marker, "saved data set")
        with full_disk_named(target, "free space, or choose another folder (cache=..., or TWOTOWER_CACHE)."):
            yield building
        if target.exists() and not changed_places(building, target):
            shutil.rmtree(target)
        if not target.exists():
            try:
                os.replace(building, target)  # noqa: PTH105
            except OSError:
                if not (target / marker).is_file():  # otherwise another process wrote the same data first
                    raise


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Write meta.json and then, as the last file, the checksums of all files in the folder."""
    (directory / META).write_text(json.dumps({"layout": LAYOUT_VERSION, **meta}, indent=1), encoding="utf-8")
    write_checksums(directory, sorted(path.name for path in directory.iterdir() if path.is_file()))


def read_meta(directory: Path) -> dict[str, Any]:
    """Read meta.json, after comparing all files in the folder with their checksums.

    Raises:
        InputError: a file is missing or damaged, or meta.json has a different layout version.
    """
    path = directory / META
    if not path.is_file():
        raise InputError(
            f"{directory}: contains no saved interactions ({META} is missing); pass a folder written by `save`."
        )
    verify_checksums(directory, "prepare the data again.")  # older versions wrote no checksums
    try:
        meta = read_json(path)
        layout = meta["layout"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{path}: damaged; prepare the data again.") from None
    if layout != LAYOUT_VERSION:
        raise InputError(
            f"{path}: layout version {layout}, expected {LAYOUT_VERSION}; prepare the data again with this version."
        )
    return dict(meta)


def open_column(directory: Path, name: str, rows: int) -> NDArray[Any]:
    """Memory-map a column, and check its size and type.

    Raises:
        InputError: the file is missing or truncated, or does not match meta.json.
    """
    path = directory / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: missing, truncated or damaged ({str(error).splitlines()[0]}); prepare the data again."
        ) from None
    if array.shape != (rows,) or array.dtype != DTYPES[name]:
        raise InputError(
            f"{path}: {array.dtype} {array.shape}, expected {np.dtype(DTYPES[name])} ({rows},); prepare the data again."
        )
    return array  # type: ignore[no-any-return]


def read_table(path: Path) -> pl.DataFrame:
    """Read a saved feature table.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{path}: missing or damaged ({str(error).splitlines()[0]}); prepare the data again."
        ) from None
