"""Ctrl-C during training: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

Several processes stop together, at a step that they agree on. They also stop on SIGTERM, which torchrun forwards and
which a preempted machine receives.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from twotower.ranks import Ranks

#: Steps between checks whether any rank was asked to stop.
AGREE_EVERY = 10


class StopBetweenSteps(Callback):
    """Turns an interrupt into a checkpoint between two steps, from which a resumed run continues exactly.

    Use as a context manager around the fit, and as a callback in it.

    Args:
        path: where the checkpoint is saved.
        ranks: the processes that stop together; None for a single process.
        settled: waits on every rank until the checkpoint being written is in place; called by all ranks.
    """

    def __init__(self, path: Path, ranks: Ranks | None = None, settled: Callable[[], None] | None = None) -> None:
        self.path = path
        self.ranks = ranks or Ranks()
        self.settled = settled or _nothing
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        # Only the main thread receives signals; elsewhere the caller handles interrupts.
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._request_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over SIGTERM from Lightning, whose handler communicates with the other ranks in the middle of a step."""
        del trainer, pl_module
        if self.ranks.size > 1 and signal.SIGINT in self._previous:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request_stop)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step, unless it ends the epoch: the validation comes first then."""
        del pl_module, outputs, batch
        stops = self.asked
        if self.ranks.size > 1:  # asking in every step would cost more than waiting a few
            stops = (batch_idx + 1) % AGREE_EVERY == 0 and self.ranks.agree(self.asked)
        if stops and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)
            self.settled()  # here, where another signal has no effect
            raise KeyboardInterrupt

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the next epoch: the checkpoint of the previous one has just been written."""
        del trainer, pl_module
        if not self.ranks.agree(self.asked):
            return
        self.settled()
        if self.ranks.agree(self.path.exists()):  # possibly only rank 0 wrote it
            raise KeyboardInterrupt

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked and self.ranks.size == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.asked = True


def _nothing() -> None:
    """Do nothing: checkpoints are written before training continues."""
