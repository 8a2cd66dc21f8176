"""Files and folders that appear whole or not at all, errors of a full disk that name them, and locks."""

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
except ImportError:  # pragma: no cover  # not on Windows, where processes do not see each other's locks here
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: What libraries say that raise errors of their own: polars and safetensors (Rust's words), numpy for a short write.
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
    """A temporary path beside `target` that is renamed to it when the block ends, and removed when it fails."""
    temporary = _beside(target)
    try:
        with full_disk_named(target):
            yield temporary
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def require_replaceable(target: Path, marker: str, what: str) -> None:
    """Refuse to put a folder in the place of something else, which would go with all that is in it.

    Args:
        target: where the folder is to be.
        marker: a file by which an older one of its kind is known.
        what: the kind, for the message.

    Raises:
        InputError: `target` is a file, or a folder with content and without `marker`.
    """
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not (is_free or (target / marker).is_file()):
        raise InputError(f"{target}: is there and is no {what}; give a new or empty folder.")


@contextmanager
def whole_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and goes when it fails.

    Args:
        target: where it appears.
        replace: it takes the place of an older one; otherwise that stays, and this one goes.
    """
    temporary, older = _beside(target), _beside(target)
    with full_disk_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with full_disk_named(target):
            yield temporary
        # A folder cannot be renamed over one that has content. The two change places at once where the system can do
        # so; elsewhere the older one steps aside for the moment in between.
        if replace and target.exists() and not changed_places(temporary, target):
            target.rename(older)
        if older.exists() or not target.exists():
            try:
                temporary.rename(target)
            except OSError:  # another process may have put its own there in between
                if replace or not target.is_dir():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if older.exists() and not target.exists():
            older.rename(target)
        shutil.rmtree(older, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def full_disk_named(target: Path, advice: str = "free space, or write elsewhere") -> Iterator[None]:
    """Around a block that writes `target`: a full disk is told as such, whichever library has met it.

    Raises:
        InputError: the disk or a quota is full, or a limit on the size of files (`ulimit -f`) is reached.
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
    """Whether an error says that there is no room for what was to be written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error).lower() for words in _FULL_WORDS)


@dataclass(frozen=True)
class Lock:
    """What `locked` gives; true where it is held.

    Attributes:
        is_held: whether it is held.
        keeps_out: whether others are kept out: not where the system or its file system says that it knows no locks.
    """

    is_held: bool
    keeps_out: bool

    def __bool__(self) -> bool:
        return self.is_held


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[Lock]:
    """Hold a lock that other processes and threads see, for as long as the block lasts.

    The lock goes with the process that holds it, however that ends. Where the system or its file system knows no
    locks, everybody holds it, and is told so. Some file systems give locks that only the processes of one machine see,
    and say nothing of it: what several machines do under a lock must do no harm without it.

    Args:
        path: a file that is made for it and removed afterwards.
        wait: until whoever holds it lets go.

    Yields:
        Whether it is held, which is not so only without `wait`; and whether it keeps others out.
    """
    keeps_out = fcntl is not None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:  # somebody has removed the empty folder in between
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
        os.close(handle)  # whoever held it has removed the file: this lock is one of nothing
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
    """Let two paths change names in one step (renameat2 of Linux); False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
