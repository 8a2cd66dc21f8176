"""Checksums of the files in a folder, in the format of `sha256sum`, and checks of files before they are read."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from twotower.errors import InputError
from twotower.hashing import file_sha256
from twotower.system.hardware import cores

#: Name of the file with the checksums of the other files in its folder; `sha256sum -c SHA256SUMS` checks them too.
CHECKSUMS = "SHA256SUMS"
#: Maximum size of a JSON file, in bytes; limited because the whole file is parsed in memory.
MOST_JSON = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")


def write_checksums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Write the checksums of files in a folder to its file `SHA256SUMS`.

    Args:
        folder: the folder.
        names: paths of the files, relative to the folder; None for all files in the folder and its subfolders.
    """
    if names is None:
        found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
        names = [path.relative_to(folder).as_posix() for path in found]
    lines = zip(_digests([folder / name for name in names]), names, strict=True)
    (folder / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for digest, name in lines), encoding="utf-8")


def verify_checksums(folder: Path, advice: str, *, only: str | None = None) -> bool:
    """Compare the files of a folder with its `SHA256SUMS`.

    Args:
        folder: the folder.
        advice: what to do about a damaged file, appended to the message.
        only: the only file that `SHA256SUMS` may list; None to allow any file of the folder.

    Returns:
        Whether the folder has checksums; folders written by older versions have none.

    Raises:
        InputError: a file is missing or its content differs, or the checksums themselves are damaged.
    """
    file = folder / CHECKSUMS
    if not file.exists():
        return False
    require_file(file, advice)
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= MOST_JSON else ""
    except (OSError, ValueError):
        text = ""
    lines = [(found[1], found[2]) for found in _LINE.finditer(text)]
    if not lines or sum(len(digest) + len(name) + 3 for digest, name in lines) != len(text):
        raise InputError(f"{file}: damaged; {advice}")
    for _, name in lines:
        if only not in (None, name) or not all(is_plain(part) for part in PurePosixPath(name).parts):
            raise InputError(f"{file}: {name!r} is not the name of a file in this folder; {advice}")
        require_file(folder / name, advice)
    for (expected, name), found in zip(lines, _digests([folder / name for _, name in lines]), strict=True):
        if found != expected:
            raise InputError(f"{folder / name}: its checksum differs from {CHECKSUMS}; {advice}")
    return True


def _digests(paths: Sequence[Path]) -> list[str]:
    """Compute the checksums of files in several threads; hashing releases the GIL."""
    with ThreadPoolExecutor(max_workers=max(min(cores(), len(paths)), 1)) as threads:
        return list(threads.map(file_sha256, paths))


def is_plain(name: object) -> bool:
    """Return whether a name is a plain file name, without separators, `..` or control characters."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not any(c in "/\\:" or not c.isprintable() for c in name)
    )


def require_file(path: Path, advice: str) -> None:
    """Check that a path is a regular file and not a link, which could point outside the folder or to a device.

    Raises:
        InputError: the path does not exist, or is a link, a folder or a device.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        raise InputError(f"{path}: missing; {advice}") from None
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "not a regular file"
        raise InputError(f"{path}: {what}; expected a file; {advice}")


def read_json(path: Path, *, most: int = MOST_JSON) -> dict[str, Any]:
    """Read a JSON object of bounded size and depth.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger than `most` bytes, nested too deeply, or not a JSON object.
    """
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{size:,} bytes, expected at most {most:,}")
    try:
        found = json.loads(path.read_bytes().decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")  # noqa: TRY004  # of the content, not of an argument
    return found
