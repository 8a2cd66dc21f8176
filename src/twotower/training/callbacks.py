"""Lightning callbacks around the training steps: row order, mining, validation, checkpoints, interruption, divergence.

At the end of an epoch they run in this order: divergence check, validation, checkpoints. So the checkpoint of an epoch
contains the metrics of that epoch, and its weights are finite.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from torch import nn

from twotower.data import Batch
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.towers import TwoTower
from twotower.training.checkpoint.paths import BEST, LAST
from twotower.training.module import LOG_EVERY, TrainingModule

#: Number of steps between checks for a stop request on any rank.
AGREE_EVERY = 10


class SizedBatches(Protocol):
    """The batches of an epoch, with a known length."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def __iter__(self) -> Iterable[Batch]:
        """Iterate over the batches of the current epoch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which determines the order."""
        ...


class StopBetweenSteps(Callback):
    """A callback that turns Ctrl-C into a checkpoint between two steps, from which a resumed run continues exactly.

    In a single process, a second Ctrl-C stops immediately. Several processes stop together, at a step that they agree
    on; they also stop on SIGTERM, which torchrun forwards and which processes receive when their machine is preempted.
    Use this callback as a context manager around the fit and as a callback of the trainer.

    Args:
        path: where the checkpoint is saved.
        ranks: the processes that stop together; None for a single process.
        settled: a function, called by all ranks, that waits until the checkpoint being written is in place on every
            rank; None if checkpoints are complete before training continues.
    """

    def __init__(
        self, path: Path, ranks: Communicator | None = None, settled: Callable[[], None] | None = None
    ) -> None:
        self.path = path
        self.ranks = ranks or Communicator()
        self.settled = settled or _nothing
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        # Only the main thread receives signals; elsewhere the caller handles interrupts.
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._request_stop)
            if self.ranks.size > 1:
                self._previous[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)
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
        if signal.SIGTERM in self._previous:
            signal.signal(signal.SIGTERM, self._request_stop)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step, unless it ends the epoch: then the validation runs first."""
        del pl_module, outputs, batch
        stops = self.requested
        if self.ranks.size > 1:  # agreeing in every step would cost more than waiting a few steps
            stops = (batch_idx + 1) % AGREE_EVERY == 0 and self.ranks.agree(self.requested)
        if stops and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)
            self.settled()  # on several ranks, further signals have no effect while waiting
            raise KeyboardInterrupt

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before this epoch if that was requested: the checkpoint of the previous epoch has just been written."""
        del trainer, pl_module
        if not self.ranks.agree(self.requested):
            return
        self.settled()
        if self.ranks.agree(self.path.exists()):  # only rank 0 may have written it
            raise KeyboardInterrupt

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested and self.ranks.size == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.requested = True


def _nothing() -> None:
    """Do nothing: checkpoints are written before training continues."""


class EpochOrder(Callback):
    """A callback that sets the epoch of the batches, so that their order depends on (seed, epoch)."""

    def __init__(self, batches: SizedBatches) -> None:
        self.batches = batches

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the epoch of the batches."""
        del pl_module
        self.batches.set_epoch(trainer.current_epoch)


class MineHardNegatives(Callback):
    """A callback that refreshes mined negatives before every epoch for which a source is due.

    Args:
        mine: a function that refreshes the sources that are due before an epoch, called as `mine(towers, epoch=0)`.
    """

    def __init__(self, mine: Callable[..., None]) -> None:
        self.mine = mine

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mine with the current towers."""
        if isinstance(pl_module, TrainingModule):
            self.mine(pl_module.towers, epoch=trainer.current_epoch)


class StopAtDivergence(Callback):
    """A callback that raises an error when the loss or a weight is no longer finite.

    Args:
        learning_rate: the peak learning rate, for the message.
        ranks: the processes of the run; None for a single process.
    """

    def __init__(self, learning_rate: float, ranks: Communicator | None = None) -> None:
        self.learning_rate, self.ranks = learning_rate, ranks or Communicator()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss in the steps that log it, when it is already summed over ranks and copied from the device."""
        del pl_module, outputs, batch
        if (batch_idx + 1) % LOG_EVERY == 0 and not bool(trainer.callback_metrics["loss"].isfinite()):
            self._refuse(trainer, f"the loss is {float(trainer.callback_metrics['loss'])}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the weights: a rarely drawn item may have NaN weights while the loss is finite."""
        if self.ranks.agree(not _is_finite(pl_module)):
            self._refuse(trainer, "a weight is not finite")

    def _refuse(self, trainer: pl.Trainer, reason: str) -> None:
        raise InputError(
            f"training: the model has diverged in epoch {trainer.current_epoch + 1} ({reason}); lower "
            f"training.learning_rate (now {self.learning_rate:g})"
        )


def _is_finite(module: nn.Module) -> bool:
    """Return whether the sum of every parameter is finite; an elementwise test would need a mask of every table."""
    sums = [parameter.detach().sum(dtype=torch.float32) for parameter in module.parameters()]
    return bool(torch.stack(sums).isfinite().all())


class Validation(Callback):
    """A callback that measures the towers at the end of epochs, and ends a run that no longer improves.

    The recorded metrics are the only state; the best epoch and the number of validations since then follow from them.
    A checkpoint contains them, so that a resumed run continues the list.

    Args:
        measure: a function that evaluates the towers and returns metrics by name.
        metric: the metric that determines the best epoch; larger is better.
        patience: stop after this many validations without an improvement.
        every: epochs between validations.
        on_epoch: a function that receives the metrics of each validation and returns whether to stop; None to stop only
            by `patience`.
    """

    def __init__(
        self,
        measure: Callable[[TwoTower], dict[str, float]],
        metric: str,
        *,
        patience: int,
        every: int = 1,
        on_epoch: Callable[[dict[str, float]], bool] | None = None,
    ) -> None:
        self.measure, self.metric, self.patience, self.every = measure, metric, patience, every
        self.on_epoch = on_epoch
        self.rows: list[dict[str, float]] = []

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints, the same as in older versions."""
        return "_History"

    @property
    def best(self) -> float | None:
        """The highest value of the metric so far; None before the first validation."""
        return max((row[self.metric] for row in self.rows), default=None)

    @property
    def best_epoch(self) -> int:
        """The first epoch with the highest value of the metric; -1 before the first validation."""
        return int(max(self.rows, key=lambda row: row[self.metric])["epoch"]) if self.rows else -1

    @property
    def since_best(self) -> int:
        """Number of validations after the best one; if several are equally good, the first counts as the best."""
        values = [row[self.metric] for row in self.rows]
        return len(values) - 1 - values.index(max(values)) if values else 0

    def has_improved(self, epoch: int) -> bool:
        """Return whether this epoch was validated and is the best so far."""
        return bool(self.rows) and self.rows[-1]["epoch"] == epoch and self.since_best == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop a resumed run that had already stopped early."""
        del pl_module
        trainer.should_stop = self.since_best >= self.patience

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, log and record the metrics of this epoch."""
        if (trainer.current_epoch + 1) % self.every or not isinstance(pl_module, TrainingModule):
            return
        if self.rows and self.rows[-1]["epoch"] == trainer.current_epoch:
            return  # already measured: an older version wrote this checkpoint between validation and end of epoch
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()  # ranking the catalog needs the memory
        with trainer.precision_plugin.val_step_context():
            # Rank 0 decides for all ranks, because the last bit of a sum may differ between machines.
            metrics: dict[str, float] = trainer.strategy.broadcast(self.measure(pl_module.evaluated))
        for name, value in metrics.items():
            pl_module.log(name, value, prog_bar=name == self.metric, batch_size=1)
        pl_module.log_frequency_drift()
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics})
        stops = self.on_epoch is not None and self.on_epoch(self.rows[-1])
        trainer.should_stop = trainer.should_stop or stops or self.since_best >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the recorded metrics, for the checkpoint."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics recorded by the interrupted run."""
        self.rows = list(state_dict["rows"])


class Checkpoints(Checkpoint):
    """A callback that writes `last.ckpt` after every epoch, and `best.ckpt` after each epoch that is the best so far.

    Args:
        directory: the run folder.
        validation: determines the best epoch; without it the latest epoch counts as the best.
        every: also write `last.ckpt` every `every` steps, to resume from after a failure; None: only after epochs.
    """

    def __init__(self, directory: Path, validation: Validation | None = None, *, every: int | None = None) -> None:
        self.last, self.best = directory / LAST, directory / BEST
        self.validation, self.every = validation, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write `last.ckpt` if it is due; the last step of an epoch is left to `on_train_epoch_end`."""
        del pl_module, outputs, batch
        is_due = self.every is not None and trainer.global_step % self.every == 0
        if is_due and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.last)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoints of this epoch."""
        del pl_module
        if self.validation is None or self.validation.has_improved(trainer.current_epoch):
            trainer.save_checkpoint(self.best)
        trainer.save_checkpoint(self.last)


class Clock(Callback):
    """A callback that measures the time of a run, including its earlier parts if it was interrupted and resumed."""

    def __init__(self) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._started

    @property
    def cpu_seconds(self) -> float:
        """CPU time so far, of all threads of this process."""
        return time.process_time() - self._cpu_started

    def state_dict(self) -> dict[str, Any]:
        """Return the times, for the checkpoint."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add the times of the interrupted run."""
        self._started -= state_dict["seconds"]
        self._cpu_started -= state_dict["cpu_seconds"]
