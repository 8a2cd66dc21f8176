"""Paths of the checkpoints in a run folder."""

from __future__ import annotations

from pathlib import Path

from twotower.errors import InputError

#: Paths in a run folder: the checkpoint that `resume` starts from, and the checkpoint with the best weights.
LAST = Path("checkpoints") / "last.ckpt"
BEST = Path("checkpoints") / "best.ckpt"


def require_checkpoint(directory: Path) -> None:
    """Check that a run folder has a checkpoint to resume from.

    Raises:
        InputError: there is no checkpoint.
    """
    if not (directory / LAST).exists():
        raise InputError(f"{directory / LAST}: no checkpoint to resume from; train without --resume first")
