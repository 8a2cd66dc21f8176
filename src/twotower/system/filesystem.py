"""Atomic and durable writes of files and folders, clear errors for a full disk, and locks."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import sys
import time
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

#: Name endings of the temporary folders next to a target: the new folder while it is written, and the old one while it
#: is replaced.
PARTIAL, PREVIOUS = "partial", "previous"
#: Identifies this machine in the names of temporary folders, in which 12 random characters follow.
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:4]
TOKEN_LENGTH = len(_MACHINE) + 12
#: A temporary folder of another machine counts as abandoned once it has been unchanged for this many seconds.
STALE_SECONDS = 3600
#: Errors of fsync where the file system does not support it, for example for folders on a network drive.
_NOT_SYNCHRONIZED = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Parts of full-disk messages from libraries whose errors have no errno: polars and safetensors (written in Rust), and
#: numpy (for a short write).
_FULL_WORDS = (
    "no space left",
    "file too large",
    "disk quota exceeded",
    "(os error 28)",
    "(os error 27)",
    "requested and",
)


def require_unicode(path: str | Path) -> None:
    """Check that a path is valid Unicode, because polars cannot open any other path.

    Raises:
        InputError: `path` contains bytes that are not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: the name is not valid UTF-8; rename the file or folder.") from None


def require_file(path: Path) -> None:
    """Check that an existing path is a file or a folder: reading a pipe may block forever, a device may have no end.

    Raises:
        InputError: the path is a pipe, a socket or a device, or not valid Unicode.
    """
    if path.exists():
        require_unicode(path.absolute())
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a pipe or a device, not a file; write the data to a file first.")


def named_path(path: str | Path, name: str) -> Path:
    """Convert an argument to a path; reject blank text, and empty text, which pathlib reads as the current folder.

    Args:
        path: the path.
        name: name of the argument or option with the path, for the message.

    Raises:
        InputError: `path` is blank.
    """
    if isinstance(path, str) and not path.strip():
        raise InputError(f"{name}: expected a path, found only blanks; write . for the current folder")
    return Path(path)


def output_path(out: str | Path) -> Path:
    """Check the path of an output folder before any work begins, and return the path.

    Raises:
        InputError: `out` is blank, or not valid Unicode.
    """
    path = named_path(out, "out")
    require_unicode(path.absolute())
    return path


def require_file_name(target: Path) -> None:
    """Check that a path can be written as a file.

    Raises:
        InputError: `target` is a folder, or its name is not valid Unicode.
    """
    require_unicode(target)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; expected the name of a file to write")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, renamed to `target` on success and removed on failure.

    The content is on the disk before the rename, and the rename before the block ends, so neither a killed process nor
    a power failure leaves a partial `target`.

    Raises:
        InputError: `target` is a folder, or the disk is full.
    """
    require_file_name(target)
    temporary = _temporary(target)
    try:
        with full_disk_named(target):
            yield temporary
            synchronize(temporary)
            temporary.replace(target)
            synchronize(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_replaceable(target: Path, marker: str, what: str) -> None:
    """Check that a folder may be replaced, which deletes all of its contents.

    Args:
        target: the folder to be written.
        marker: a file that identifies a folder of the same kind.
        what: the kind of folder, for the message.

    Raises:
        InputError: `target` is a file, the current folder or one above it, or a nonempty folder without `marker`.
    """
    if not target.name or target.name == "..":  # the old folder is replaced by a rename, which needs a name
        raise InputError(f"{target}: is the current folder or one above it; choose the name of a new folder.")
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not (is_free or (target / marker).is_file()):
        raise InputError(f"{target}: exists and contains no {what}; choose a new or empty folder.")


@contextmanager
def whole_folder(target: Path, *, replace: bool = True, durable: bool = True) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, renamed to `target` on success and removed on failure.

    Args:
        target: the folder to be written.
        replace: whether to replace an existing folder. If false, an existing folder stays and the new one is discarded.
        durable: whether to put the files on the disk before the rename, so that a power failure leaves the old folder
            or the new one. False for a cache, which can be rebuilt.
    """
    with full_disk_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(target, shared=not durable) as temporary:
        older = _temporary(target, PREVIOUS)
        try:
            with full_disk_named(target):
                yield temporary
                if durable:
                    synchronize_tree(temporary)
                # A folder cannot be renamed over a nonempty folder. Where the system supports it, the two are exchanged
                # in one step; otherwise the older folder is renamed first, and for a short time there is no `target`.
                if replace and target.exists() and not changed_places(temporary, target):
                    target.rename(older)
                if older.exists() or not target.exists():
                    try:
                        temporary.rename(target)
                    except OSError:  # another process may have created the folder in the meantime
                        if replace or not target.is_dir():
                            raise
                if durable:
                    synchronize(target.parent)
        finally:
            if older.exists() and not target.exists():
                older.rename(target)
            shutil.rmtree(older, ignore_errors=True)


@contextmanager
def partial_folder(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """Create a temporary folder next to `target` and remove it at the end, if it still exists.

    The folder is locked during the block, so a folder with a free lock was left by a killed process; such folders for
    the same `target` are removed here.

    Args:
        target: the folder to be written.
        shared: whether processes without working locks between them may write `target` at the same time, as in a cache;
            a folder then counts as left by a killed process only if it has been unchanged for an hour.
    """
    require_unicode(target)
    remove_abandoned(target, STALE_SECONDS if shared else 0)
    temporary, handle = _locked_folder(target)
    try:
        yield temporary
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        finally:
            if handle is not None:
                os.close(handle)


def remove_abandoned(target: Path, seconds: float = 0) -> None:
    """Remove the temporary folders for `target` whose process has ended; if the system has no locks, remove none.

    Some locks do not exclude other machines, so a folder of another machine must also have been unchanged for an hour.
    If a process was killed between the two renames of `whole_folder`, the older folder is renamed back to `target`.

    Args:
        target: the folder that the temporary folders were meant to become.
        seconds: time for which a folder of this machine must have been unchanged.
    """
    left = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]+)\.({PARTIAL}|{PREVIOUS})")
    for path in sorted(target.parent.iterdir()):
        found = left.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        age = seconds if found[1].startswith(_MACHINE) else STALE_SECONDS
        if age and time.time() - _last_change(path) < age:
            continue
        handle = _lock_folder(path)
        if handle is None:
            continue
        if found[2] == PREVIOUS and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _last_change(folder: Path) -> float:
    with suppress(OSError):  # its process has just removed or renamed it
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return time.time()


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Create a temporary folder and lock it; the handle is None if the system has no locks."""
    while True:
        temporary = _temporary(target)
        with full_disk_named(target):
            temporary.mkdir()
        handle = _lock_folder(temporary)
        if temporary.is_dir():
            return temporary, handle
        if handle is not None:  # before it was locked, `remove_abandoned` in another process removed the folder
            os.close(handle)


def _lock_folder(path: Path) -> int | None:
    """Lock a folder and return its handle, or None if it is gone or locked, or the system has no locks."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    os.close(handle)
    return None


def synchronize(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk; a no-op for folders on Windows."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SYNCHRONIZED:
            raise
    finally:
        os.close(handle)


def synchronize_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            synchronize(path)
    synchronize(folder)


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def full_disk_named(target: Path, advice: str = "free space, or write elsewhere") -> Iterator[None]:
    """Convert a full-disk error raised by any library inside the block to an `InputError` that names `target`.

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
    """Return whether an error is caused by a full disk, a full quota or the file size limit."""
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
    """Hold a lock against other processes and threads for the duration of the block.

    The system releases the lock when the process ends, even if it is killed. If the system or the file system has no
    locks, every process holds the lock, and `keeps_out` is false. On some file systems a lock works only between
    processes of one machine, without any error, so work shared by several machines must be safe without the lock.

    Args:
        path: the lock file, created here and removed afterwards.
        wait: whether to wait for a lock that another process or thread holds, instead of continuing without it.

    Yields:
        The state of the lock; with `wait`, it is always held.
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


def _temporary(target: Path, ending: str = PARTIAL) -> Path:
    return target.with_name(f".{target.name}.{_MACHINE}{uuid.uuid4().hex[:12]}.{ending}")
