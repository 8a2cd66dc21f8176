"""The training loop, with Lightning: progress bar, early stopping, best checkpoint, interruption and resumption."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader

from twotower.config.run import TrainingConfig
from twotower.data import KnownPositives
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError, Interrupted
from twotower.objectives import Objective
from twotower.system.hardware import peak_memory
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.training.callbacks import (
    LAST,
    BestAndLast,
    EpochOrder,
    MetricHistory,
    MineHardNegatives,
    SaveEvery,
    SizedBatches,
    StopBetweenSteps,
)
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.loggers import make_logger
from twotower.training.module import LOG_EVERY, TrainingModule
from twotower.training.strategy import trainer_options

#: Lightning warnings that a user of this library can do nothing about.
LIGHTNING_NOISE = (
    ".*isinstance\\(treespec, LeafSpec\\).* is deprecated.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*Trying to infer the `batch_size`.*",
    ".*GPU available but not used.*",
    ".*recommended to use `self.log.*sync_dist=True.*",  # every rank already has the global values
    ".*MLFlow only allows.*special characters in metric name.*",  # NDCG@10 becomes NDCG10
)


@dataclass(frozen=True)
class FitResult:
    """Result of a training run.

    Attributes:
        towers: the model with its best weights.
        best: the validation metric of these weights; None without validation.
        epochs: epochs started.
        seconds: wall time of the fit.
        cpu_seconds: CPU time of all threads of this process during the fit.
        peak_memory: peak memory of this process so far, in bytes; None if the system does not report it.
        history: validation metrics of every epoch.
        checkpoint: the best checkpoint, including the optimizer state; None if none was written.
    """

    towers: TwoTower
    best: float | None
    epochs: int
    seconds: float
    cpu_seconds: float
    peak_memory: int | None
    history: list[dict[str, float]]
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
    mine: Callable[[TwoTower], None] | None = None,
    validate: Callable[[TwoTower], dict[str, float]] | None = None,
    resume: bool = False,
    progress: bool = True,
    hyperparameters: Mapping[str, Any] | None = None,
    warm_start: Callback | None = None,
    in_background: bool = False,
) -> FitResult:
    """Train until the validation metric stops improving, and return the best weights.

    Args:
        towers: the model; trained in place.
        objective: what is minimised.
        batches: the training rows.
        settings: section `training`, without "auto" (`Config.resolved`).
        directory: where checkpoints (`checkpoints/`) and logs (`logs/`) are written.
        known_positives: items that are never negatives of a row; None masks only the row's own positive.
        counts: training interactions of each item, [N] or by group [G, N], for diagnostics by popularity.
        mine: refreshes mined negatives from the current towers; called before every epoch except the first.
        validate: measures the towers after each epoch; without it the last weights are used.
        resume: resume from `directory/checkpoints/last.ckpt`.
        progress: show a progress bar.
        hyperparameters: shown by the logger next to the curves, if it supports them.
        warm_start: warm-starts the optimizer from a parent's state (training/continuing.py); None starts fresh.
        in_background: write checkpoints in the background, from a copy of the state.

    Raises:
        InputError: there is no checkpoint to resume from, a checkpoint cannot be written, or the logger's package is
            missing.
        Interrupted: Ctrl-C; `directory/checkpoints/last.ckpt` holds the state to resume from.
    """
    ranks = Communicator.current()
    parts = {table.name: table.part for table in shared_tables_of(towers) if table.name and table.part}
    last = directory / LAST
    if resume and not last.exists():
        raise InputError(f"{last}: no checkpoint to resume from; train without --resume first")
    module = TrainingModule(
        towers,
        objective,
        settings,
        total_steps=settings.max_epochs * len(batches),
        known_positives=known_positives,
        counts=counts,
        validate=validate,
        ranks=ranks,
    )
    history = MetricHistory()
    keep_best = BestAndLast(
        last.parent,
        filename="best",
        monitor=settings.metric if validate else None,
        mode="max",
        save_last=True,
        enable_version_counter=False,
    )
    io = SafeCheckpointIO(ranks, parts, in_background=in_background, timeout=settings.exchange_timeout)
    stop = StopBetweenSteps(last, ranks, io.settle)
    callbacks: list[Callback] = [keep_best, history, EpochOrder(batches), stop]
    if warm_start is not None:
        callbacks.append(warm_start)
    if mine is not None:
        callbacks.append(MineHardNegatives(mine))
    if validate:
        callbacks.append(EarlyStopping(settings.metric, patience=settings.patience, mode="max"))
    if settings.checkpoint_every is not None:
        callbacks.append(SaveEvery(last, settings.checkpoint_every))
    if progress and ranks.is_first:
        # Standard output is for results.
        callbacks.append(RichProgressBar(leave=False, console_kwargs={"stderr": True}))
    _quiet_lightning()
    trainer = pl.Trainer(
        max_epochs=settings.max_epochs,
        accelerator=settings.accelerator,
        precision=settings.precision,
        max_time=settings.time_limit,
        check_val_every_n_epoch=settings.validate_every,
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_EVERY,
        callbacks=callbacks,
        logger=make_logger(settings.logger, directory, hyperparameters),
        plugins=[io],
        enable_progress_bar=progress and ranks.is_first,
        enable_model_summary=False,
        gradient_clip_val=None,
        **trainer_options(settings.exchange_timeout),
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    # One placeholder batch: validation ranks the whole catalog itself.
    placeholder = DataLoader([0], batch_size=1) if validate else None  # type: ignore[arg-type,var-annotated]
    try:
        with warnings.catch_warnings(), stop:
            for message in LIGHTNING_NOISE:
                warnings.filterwarnings("ignore", message)
            trainer.fit(module, batches, placeholder, ckpt_path=str(last) if resume else None)
        io.settle()
    except MisconfigurationException as error:
        raise InputError(
            f"{last}: cannot resume from this checkpoint with these settings ({' '.join(str(error).split())}); use the "
            "run's own config.yaml, or train from scratch"
        ) from error
    except SystemExit as exit_:  # Lightning turns KeyboardInterrupt into SystemExit
        io.wait()
        raise Interrupted(f"interrupted; the state was saved to {last}") from exit_
    finally:
        io.close()
    for optimizer in trainer.optimizers:
        optimizer.state.clear()  # the checkpoints contain it, and loading the best weights needs the memory
    best = _load_best(towers, keep_best, io, has_metric=validate is not None)
    return FitResult(
        towers,
        best,
        trainer.current_epoch,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        peak_memory=peak_memory(),
        history=history.rows,
        checkpoint=Path(keep_best.best_model_path) if keep_best.best_model_path else None,
    )


def _load_best(towers: TwoTower, keep_best: ModelCheckpoint, io: SafeCheckpointIO, *, has_metric: bool) -> float | None:
    if not keep_best.best_model_path:
        return None
    weights = io.load_weights(keep_best.best_model_path)
    prefix = "averaged." if any(key.startswith("averaged.") for key in weights) else "towers."
    towers.load_state_dict({key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)})
    towers.eval()
    return float(keep_best.best_model_score) if has_metric and keep_best.best_model_score is not None else None


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
