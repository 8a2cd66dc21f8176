"""The training loop, with Lightning: progress bar, early stopping, best checkpoint, interruption and resumption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor

from twotower.config.run import TrainingConfig
from twotower.data import KnownPositives
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError, Interrupted
from twotower.objectives import Objective
from twotower.system.hardware import peak_memory
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.training.callbacks import (
    Checkpoints,
    Clock,
    EpochOrder,
    MineHardNegatives,
    SizedBatches,
    StopAtDivergence,
    StopBetweenSteps,
    Validation,
)
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.checkpoint.paths import LAST, require_checkpoint
from twotower.training.loggers import make_logger, quiet_lightning
from twotower.training.module import LOG_EVERY, TrainingModule
from twotower.training.strategy import trainer_options


@dataclass(frozen=True)
class FitResult:
    """Result of a training run.

    Attributes:
        towers: the model with its best weights.
        best: the validation metric of these weights; None if there is no validation.
        epochs: number of epochs started.
        seconds: wall time of the fit, including the interrupted part of a resumed run.
        cpu_seconds: CPU time of all threads of this process during the fit, including an interrupted part.
        peak_memory: peak memory of this process so far, in bytes; None if the system does not report it.
        history: metrics of every validation, with its epoch and step.
        kept: number of epochs after which these weights were saved; 0 if they are the initial weights.
        checkpoint: the best checkpoint, including the optimizer state; None if none was written.
    """

    towers: TwoTower
    best: float | None
    epochs: int
    seconds: float
    cpu_seconds: float
    peak_memory: int | None
    history: list[dict[str, float]]
    kept: int
    checkpoint: Path | None = None


def fit_towers(
    towers: TwoTower,
    objective: Objective,
    batches: SizedBatches,
    settings: TrainingConfig,
    directory: Path,
    *,
    known_positives: KnownPositives | None = None,
    counts: Tensor | None = None,
    mine: Callable[..., None] | None = None,
    validate: Callable[[TwoTower], dict[str, float]] | None = None,
    resume: bool = False,
    progress: bool = True,
    hyperparameters: Mapping[str, Any] | None = None,
    warm_start: Callback | None = None,
    in_background: bool = False,
    epochs: int | None = None,
    on_epoch: Callable[[dict[str, float]], bool] | None = None,
) -> FitResult:
    """Train until the validation metric stops improving, and return the best weights.

    Args:
        towers: the model; trained in place.
        objective: the objective to minimise.
        batches: the training rows, in batches.
        settings: section `training`, with every "auto" resolved (`Config.resolved`).
        directory: where checkpoints (`checkpoints/`) and logs (`logs/`) are written.
        known_positives: items that are never negatives of a row; None masks only the row's own positive.
        counts: training interactions of each item, [N] or by group [G, N], for diagnostics by popularity.
        mine: a function that refreshes mined negatives, called before every epoch as `mine(towers, epoch=...)`.
        validate: a function that evaluates the towers after an epoch, every `validate_every` epochs; without it, the
            last weights are used.
        resume: resume from `directory/checkpoints/last.ckpt`.
        progress: show a progress bar.
        hyperparameters: settings that the logger shows next to the curves, if it supports them.
        warm_start: a callback that loads the optimizer state of a parent (`ContinueOptimizer`); None if there is none.
        in_background: write checkpoints in the background, from a copy of the state.
        epochs: stop after this many epochs; `settings.max_epochs` still determines the schedule. None for all epochs.
        on_epoch: a function that receives the metrics of each validation and returns whether to stop; an exception in
            it ends the run.

    Raises:
        InputError: there is no checkpoint to resume from, a checkpoint cannot be written, or the logger's package is
            missing.
        Interrupted: the run was stopped by a signal; `directory/checkpoints/last.ckpt` has the state to resume from.
    """
    if resume:
        require_checkpoint(directory)
    clock, ranks = Clock(), Communicator.current()
    module = TrainingModule(
        towers,
        objective,
        settings,
        total_steps=settings.max_epochs * len(batches),
        known_positives=known_positives,
        counts=counts,
        ranks=ranks,
    )
    io = _checkpoint_io(towers, settings, ranks, in_background=in_background)
    stop = StopBetweenSteps(directory / LAST, ranks, io.settle)
    validation = None if validate is None else _validation(validate, settings, on_epoch)
    checkpoints = Checkpoints(directory, validation, every=settings.checkpoint_every)
    callbacks = [
        EpochOrder(batches),
        stop,
        clock,
        StopAtDivergence(settings.learning_rate, ranks),
        *([] if warm_start is None else [warm_start]),
        *([] if mine is None else [MineHardNegatives(mine)]),
        *([] if validation is None else [validation]),
        checkpoints,
    ]
    with quiet_lightning(), stop:
        logger = make_logger(settings.logger, directory, hyperparameters)
        trainer = _trainer(settings, callbacks, io, logger, epochs=epochs, progress=progress and ranks.is_first)
        with _named_endings(io, directory / LAST):
            trainer.fit(module, batches, ckpt_path=str(directory / LAST) if resume else None)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()  # the checkpoints contain it, and loading the best weights needs the memory
    for table in shared_tables_of(towers):
        table.engine = None  # this frees its accumulators too
    has_best = validation is None or validation.best is not None
    if has_best:
        _load_weights(towers, io, checkpoints.best)
    return FitResult(
        towers,
        None if validation is None else validation.best,
        trainer.current_epoch,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        peak_memory=peak_memory(),
        history=[] if validation is None else validation.rows,
        kept=trainer.current_epoch if validation is None or not has_best else validation.best_epoch + 1,
        checkpoint=checkpoints.best if has_best else None,
    )


def _validation(
    validate: Callable[[TwoTower], dict[str, float]],
    settings: TrainingConfig,
    on_epoch: Callable[[dict[str, float]], bool] | None,
) -> Validation:
    return Validation(
        validate, settings.metric, patience=settings.patience, every=settings.validate_every, on_epoch=on_epoch
    )


def _checkpoint_io(
    towers: TwoTower, settings: TrainingConfig, ranks: Communicator, *, in_background: bool
) -> SafeCheckpointIO:
    parts = {table.name: table.part for table in shared_tables_of(towers) if table.name and table.part}
    return SafeCheckpointIO(ranks, parts, in_background=in_background, timeout=settings.exchange_timeout)


def _trainer(
    settings: TrainingConfig,
    callbacks: list[Callback],
    io: SafeCheckpointIO,
    logger: Logger | Literal[False],
    *,
    epochs: int | None,
    progress: bool,
) -> pl.Trainer:
    # Progress goes to stderr, because standard output is for results.
    bar = [RichProgressBar(leave=False, console_kwargs={"stderr": True})] if progress else []
    return pl.Trainer(
        max_epochs=settings.max_epochs if epochs is None else epochs,
        accelerator=settings.accelerator,
        precision=settings.precision,
        max_time=settings.time_limit,
        log_every_n_steps=LOG_EVERY,
        callbacks=[*callbacks, *bar],
        logger=logger,
        plugins=[io],
        enable_progress_bar=progress,
        enable_model_summary=False,
        **trainer_options(settings.exchange_timeout),
    )


@contextmanager
def _named_endings(io: SafeCheckpointIO, last: Path) -> Iterator[None]:
    """Wait for the last checkpoint, and translate Lightning's errors for interruptions and unsuitable checkpoints."""
    try:
        yield
        io.settle()
    except MisconfigurationException as error:
        raise InputError(
            f"{last}: cannot resume from this checkpoint with these settings ({' '.join(str(error).split())}); use the "
            "config.yaml of the run, or train from scratch"
        ) from error
    except SystemExit as exit_:  # Lightning turns KeyboardInterrupt into SystemExit
        io.wait()
        raise Interrupted(f"interrupted; the state was saved to {last}") from exit_
    finally:
        io.close()


def _load_weights(towers: TwoTower, io: SafeCheckpointIO, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into the towers: the averaged weights, if there are any."""
    weights = io.load_weights(checkpoint)
    prefix = "averaged." if any(key.startswith("averaged.") for key in weights) else "towers."
    towers.load_state_dict({key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)})
    towers.eval()
