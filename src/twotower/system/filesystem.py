"""Atomic writes of files and folders, clear errors for a full disk, and locks."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import InputError

try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows has no fcntl, so there are no locks between processes
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Messages of libraries with their own errors: polars and safetensors (from Rust), numpy (for a short write).
_FULL_WORDS = (
    "no space left",
    "file too large",
    "disk quota exceeded",
    "(os error 28)",
    "(os error 27)",
    "requested and",
)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, renamed to `target` on success and removed on failure."""
    temporary = _temporary(target)
    try:
        with full_disk_named(target):
            yield temporary
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def require_replaceable(target: Path, marker: str, what: str) -> None:
    """Check that a folder may be replaced, which deletes all of its contents.

    Args:
        target: the folder to be written.
        marker: a file that identifies a folder of the same kind.
        what: the kind of folder, for the message.

    Raises:
        InputError: `target` is a file, or a nonempty folder without `marker`.
    """
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not (is_free or (target / marker).is_file()):
        raise InputError(f"{target}: exists and contains no {what}; choose a new or empty folder.")


@contextmanager
def whole_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, renamed to `target` on success and removed on failure.

    Args:
        target: the folder to be written.
        replace: whether to replace an existing folder. If false, an existing folder stays and the new one is discarded.
    """
    temporary, older = _temporary(target), _temporary(target)
    with full_disk_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with full_disk_named(target):
            yield temporary
        # A folder cannot be renamed over a nonempty folder. Where the system supports it, the two are exchanged in one
        # step; otherwise the older folder is renamed first, and for a short time there is no `target`.
        if replace and target.exists() and not changed_places(temporary, target):
            target.rename(older)
        if older.exists() or not target.exists():
            try:
                temporary.rename(target)
            except OSError:  # another process may have created the folder in the meantime
                if replace or not target.is_dir():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if older.exists() and not target.exists():
            older.rename(target)
        shutil.rmtree(older, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def full_disk_named(target: Path, advice: str = "free space, or write elsewhere") -> Iterator[None]:
    """Convert a full-disk error of any library inside the block to an `InputError` that names `target`.

    Raises:
        InputError: the disk or a quota is full, or the file size limit (`ulimit -f`) is reached.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise InputError(f"{target}: cannot be written, the disk is full ({_first_line(error)}); {advice}") from error


def is_full_disk(error: BaseException) -> bool:
    """Return whether an error is caused by a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error).lower() for words in _FULL_WORDS)


@dataclass(frozen=True)
class Lock:
    """The state of a lock taken with `locked`; true if the lock is held.

    Attributes:
        is_held: whether the lock is held.
        keeps_out: whether the lock excludes other processes. False if the system or the file system has no locks.
    """

    is_held: bool
    keeps_out: bool

    def __bool__(self) -> bool:
        return self.is_held


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[Lock]:
    """Hold a lock between processes and threads for the duration of the block.

    The system releases the lock when the process ends, even if it is killed. If the system or the file system has no
    locks, every process holds the lock, and `keeps_out` is false. On some file systems a lock works only between
    processes of one machine, without any error, so work of several machines must be safe without the lock.

    Args:
        path: the lock file, created here and removed afterwards.
        wait: wait until the lock is free.

    Yields:
        The state of the lock; with `wait`, the lock is always held.
    """
    keeps_out = fcntl is not None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:  # another process removed the empty folder after the mkdir
            continue
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            yield Lock(is_held=False, keeps_out=True)
            return
        except BaseException as error:
            if not (isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)):
                os.close(handle)
                raise
            keeps_out = False
        if _is_open_file(handle, path):
            break
        os.close(handle)  # the previous holder deleted the locked file: try again
    try:
        yield Lock(is_held=True, keeps_out=keeps_out)
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _is_open_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def changed_places(one: Path, other: Path) -> bool:
    """Exchange two paths in one step (Linux renameat2); return False if the system does not support it."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
