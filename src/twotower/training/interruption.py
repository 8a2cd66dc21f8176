"""Ctrl-C while training: finish the step, leave a checkpoint, stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class StopBetweenSteps(Callback):
    """Turns an interrupt into a checkpoint of the moment between two steps, where a resumed run goes on exactly.

    Use as a context manager around the fit, and as a callback in it.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> StopBetweenSteps:
        # Only the main thread receives signals; elsewhere an interrupt is the caller's to handle.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step, unless it ends the epoch: its validation belongs to it."""
        del pl_module, outputs, batch
        if self.asked and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the next epoch: the checkpoint of the last one has just been written."""
        del trainer, pl_module
        if self.asked and self.path.exists():
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.asked = True
