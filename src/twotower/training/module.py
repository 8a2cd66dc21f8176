"""The LightningModule of a training run: training step, optimizer with its schedule, and checkpoint state."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from twotower.config.run import TrainingConfig
from twotower.data import Batch, KnownPositives
from twotower.distributed.communicator import Communicator
from twotower.evaluation import popularity_thirds
from twotower.objectives import Objective
from twotower.towers import TwoTower
from twotower.training.checkpoint.io import random_state, restore_random_state
from twotower.training.diagnostics import DiagnosticsMonitor, diagnose, frequency_drift, objective_device, source_state
from twotower.training.gradient_sync import GradientExchange
from twotower.training.optimizer import TableOptimizer, parameter_groups
from twotower.training.seeds import DROPOUT, ROUNDING, draws_of, step_seed
from twotower.training.step import compute_loss

#: Number of steps between log entries, and between diagnostics of the objective in the log.
LOG_EVERY = 10
DIAGNOSE_EVERY = 50


class TrainingModule(pl.LightningModule):
    """Towers and objective as a LightningModule.

    Args:
        towers: the model.
        objective: the objective to minimise.
        settings: learning rate, warm-up, seed and so on, without "auto" (`Config.resolved`).
        total_steps: steps of the whole schedule.
        known_positives: items that are never negatives of a row; None masks only the row's own positive.
        counts: training interactions of each item, [N], for diagnostics by popularity; if batches are built within
            groups, by group, [G, N]; None for no such diagnostics.
        ranks: the processes that train together; None for a single process.
    """

    def __init__(
        self,
        towers: TwoTower,
        objective: Objective,
        settings: TrainingConfig,
        *,
        total_steps: int,
        known_positives: KnownPositives | None = None,
        counts: Tensor | None = None,
        ranks: Communicator | None = None,
    ) -> None:
        super().__init__()
        self.towers = towers
        # A moving average of the weights (Polyak & Juditsky 1992), evaluated and saved in place of the weights.
        self.averaged = copy.deepcopy(towers).requires_grad_(False) if settings.weight_average else None
        self.objective = objective
        self.settings = settings
        self.total_steps = total_steps
        self.known_positives = known_positives
        self.counts = counts
        total = None if counts is None else counts if counts.ndim == 1 else counts.sum(0)
        self.thirds = None if total is None else torch.from_numpy(popularity_thirds(total.numpy()))
        self._watch = DiagnosticsMonitor()
        self.ranks = ranks or Communicator()
        self._exchange = GradientExchange(torch.nn.ModuleList([towers, objective]), self.ranks)
        self._rows = 0
        self._since = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, weighted if its rows have weights; on several ranks, this rank's share."""
        seed, step = self.settings.seed, self.global_step
        if self.ranks.size > 1:
            torch.manual_seed(step_seed(seed, step, DROPOUT, self.ranks.rank))
        mean, embedded, drawn = compute_loss(
            self.towers,
            self.objective,
            batch,
            self.ranks,
            known_positives=self.known_positives,
            micro_batch=self.settings.micro_batch,
            generator=draws_of(seed, step, objective_device(self.objective)),
        )
        self._rows += len(batch.items) if batch.total is None else batch.total
        if (batch_idx + 1) % LOG_EVERY == 0:
            self.log("loss", self.ranks.sum(mean), prog_bar=True)
            now = time.perf_counter()
            self.log("rows/s", self._rows / max(now - self._since, 1e-9), prog_bar=True)
            self.log("temperature", self.towers.temperature.detach())
            thirds = self.thirds if self.objective.sums_exponentials and len(batch) else None
            if thirds is not None and (batch_idx + 1) % DIAGNOSE_EVERY == 0:
                numbers = diagnose(embedded, drawn, self.towers.temperature, thirds.to(self.device))
                numbers |= source_state(self.objective)
                self._watch.look(numbers)
                self.log_dict(numbers)
            self._rows, self._since = 0, now
        return mean

    def on_after_backward(self) -> None:
        """Sum the gradients over ranks."""
        self._exchange.sum_gradients()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Seed stochastic rounding, so that tables are rounded identically on every rank."""
        del optimizer
        if self.ranks.size > 1:
            torch.manual_seed(step_seed(self.settings.seed, self.global_step, ROUNDING))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and update the weight average, faster in the first steps so that initial weights soon vanish.

        The average is not updated after the batch, because callbacks run before that point, and a checkpoint that a
        callback saves would miss the update.
        """
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            step = self.global_step + 1  # Lightning counts the step after this method returns
            keep = min(self.settings.weight_average, step / (step + 9))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.parameters()), list(self.towers.parameters()), 1.0 - keep)

    def on_train_epoch_start(self) -> None:
        """Restart the clock of rows/s, so that validation time does not count."""
        self._rows, self._since = 0, time.perf_counter()

    @property
    def evaluated(self) -> TwoTower:
        """The towers that are evaluated and saved: those with averaged weights, if there are any."""
        return self.averaged or self.towers

    def log_frequency_drift(self) -> None:
        """Log the difference between an estimated frequency and the counts, and warn if it is large."""
        if self.counts is not None and (drift := frequency_drift(self.objective, self.counts)) is not None:
            self.log("frequency_drift", drift, batch_size=1)
            self._watch.look({"frequency_drift": drift})

    def configure_optimizers(self) -> Any:
        """Build one optimizer for layers and tables, with linear warm-up and cosine decay to a tenth of the rate."""
        settings = self.settings
        groups = parameter_groups(
            torch.nn.ModuleList([self.towers, self.objective]),
            settings.weight_decay,
            lr=settings.learning_rate,
            table_rule=settings.table_optimizer,
            table_lr=settings.learning_rate * float(settings.table_learning_rate_factor),
            encoder_lr=None if settings.encoder_learning_rate == "auto" else settings.encoder_learning_rate,
        )
        optimizer = TableOptimizer(groups, lr=settings.learning_rate)
        warmup, total = int(self.settings.warmup_steps), self.total_steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min((step - warmup) / max(total - warmup, 1), 1.0)
            return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the random generators, so that a resumed run draws the same random numbers."""
        checkpoint["random_state"] = random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state until training starts, because building the model also uses random numbers."""
        self._random_state = checkpoint["random_state"]

    def on_train_start(self) -> None:
        """Restore the random state; see `on_load_checkpoint`."""
        if hasattr(self, "_random_state"):
            restore_random_state(self._random_state)
            del self._random_state
