"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that is renamed to it when the block ends, and removed when it fails."""
    temporary = _beside(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, over an older one, and goes when it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, older = _beside(target), _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        # A folder cannot be renamed over one that has content: the older one steps aside for the moment in between.
        if target.exists():
            target.rename(older)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if older.exists() and not target.exists():
            older.rename(target)
        shutil.rmtree(older, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
