"""Callbacks of the training loop: stopping between steps, checkpoints, order of rows, hard negatives, history."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from twotower.data import Batch
from twotower.distributed.communicator import Communicator
from twotower.towers import TwoTower
from twotower.training.module import TrainingModule

#: Steps between checks whether any rank was asked to stop.
AGREE_EVERY = 10


class StopBetweenSteps(Callback):
    """Turns an interrupt into a checkpoint between two steps, from which a resumed run continues exactly.

    Ctrl-C finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once. Several processes stop
    together, at a step that they agree on. They also stop on SIGTERM, which torchrun forwards and which a preempted
    machine receives.

    Use as a context manager around the fit, and as a callback in it.

    Args:
        path: where the checkpoint is saved.
        ranks: the processes that stop together; None for a single process.
        settled: waits on every rank until the checkpoint being written is in place; called by all ranks.
    """

    def __init__(
        self, path: Path, ranks: Communicator | None = None, settled: Callable[[], None] | None = None
    ) -> None:
        self.path = path
        self.ranks = ranks or Communicator()
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


#: In a run folder: the checkpoint that `resume` starts from.
LAST = Path("checkpoints") / "last.ckpt"


class SizedBatches(Protocol):
    """Batches of an epoch, of known number."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def __iter__(self) -> Iterable[Batch]:
        """Iterate over the batches of the current epoch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which determines the order."""
        ...


class BestAndLast(ModelCheckpoint):
    """Saves the last state of every epoch too: Lightning saves it only after it has written a new best checkpoint."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last state if Lightning has not."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class EpochOrder(Callback):
    """Sets the epoch of the batches, so that their order depends on (seed, epoch)."""

    def __init__(self, batches: SizedBatches) -> None:
        self.batches = batches

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the epoch of the batches."""
        del pl_module
        self.batches.set_epoch(trainer.current_epoch)


class SaveEvery(Callback):
    """Saves a checkpoint every `steps` steps, from which a run can be resumed after a failure."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due."""
        del pl_module, outputs, batch
        # The end of an epoch has its own checkpoint, after the validation of that epoch.
        if trainer.global_step % self.steps == 0 and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)


class MineHardNegatives(Callback):
    """Refreshes mined negatives before every epoch except the first, when the towers are still untrained."""

    def __init__(self, mine: Callable[[TwoTower], None]) -> None:
        self.mine = mine

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mine with the current towers."""
        if trainer.current_epoch > 0 and isinstance(pl_module, TrainingModule):
            self.mine(pl_module.towers)


class MetricHistory(Callback):
    """Validation metrics of every epoch; saved in checkpoints, so a resumed run continues the list."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the metrics of this epoch."""
        del pl_module
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "@" in name}
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, for the checkpoint."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of the interrupted run."""
        self.rows = list(state_dict["rows"])
