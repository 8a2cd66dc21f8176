"""The initial weights of a run, saved next to the checkpoints; they become the model if no epoch is better."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.loading.questions import QuestionBatches
from twotower.distributed.communicator import Communicator
from twotower.run.linear_start import start_linear
from twotower.system.filesystem import whole_file
from twotower.towers import TwoTower

if TYPE_CHECKING:
    from twotower.training import FitResult


class StartWeights:
    """The initial weights of a run, in `checkpoints/start.safetensors`, so that a resumed run has them too.

    Args:
        directory: the folder of the run, shared by all ranks.
        ranks: the processes; rank 0 writes.
        resume: keep the initial weights of an earlier run in the folder; otherwise remove them.
    """

    def __init__(self, directory: Path, ranks: Communicator, *, resume: bool = False) -> None:
        self.path, self.ranks = directory / "checkpoints" / "start.safetensors", ranks
        if not resume and ranks.is_first:
            self.path.unlink(missing_ok=True)

    def make(
        self,
        towers: TwoTower,
        config: Config,
        train: Interactions,
        questions: QuestionBatches | None,
        *,
        validate: Callable[[TwoTower], dict[str, float]] | None,
        bias_share: float | None = None,
        on_message: Callable[[object], None] | None = None,
    ) -> None:
        """Initialise new towers as `training.start` specifies, and save the weights; see `start_linear`.

        Without validation, the item bias starts at `bias_share` times log p; with None, `start_linear` sets it.
        """
        name = config.training.metric

        def measure(towers: TwoTower) -> float:
            assert validate is not None
            return validate(towers)[name]

        measured = None if validate is None else measure
        if not start_linear(towers, config, train, questions, self.ranks, measure=measured, on_message=on_message):
            return
        if measured is None and bias_share is not None and towers.bias is not None:
            with torch.no_grad():
                bias = towers.bias.weight
                bias.copy_((bias_share * _log_p(train))[:, None].to(bias.dtype))
        metric = None if measured is None else measured(towers)
        if metric is None or not self.ranks.is_first:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary:
            save_file(_parameters(towers), temporary, metadata={"metric": json.dumps(metric)})

    def bias_share(self, train: Interactions) -> float | None:
        """Return the share of log p that the item bias started at; None without a linear start or an item bias."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as stored:
            if "bias.weight" not in stored.keys():  # noqa: SIM118  # not a mapping
                return None
            bias, log_p = stored.get_tensor("bias.weight").double()[:, 0], _log_p(train).double()
        return float(bias @ log_p / (log_p @ log_p))

    @torch.no_grad()
    def or_better(self, result: FitResult, on_message: Callable[[object], None] | None = None) -> FitResult:
        """Return the result of training, or the initial weights if no epoch has a better validation metric."""
        metric = self._metric()
        if metric is None or result.best is None or metric <= result.best:
            return result
        with safe_open(self.path, framework="pt") as stored:
            for name, parameter in result.towers.named_parameters():
                parameter.copy_(stored.get_tensor(name))
        if on_message is not None:
            on_message(f"no epoch improved on the start, validation {metric:.4f}: the model is the start")
        return replace(result, best=metric, kept=0, checkpoint=None)

    def _metric(self) -> float | None:
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as stored:
            return float(json.loads(stored.metadata()["metric"]))


def _log_p(train: Interactions) -> Tensor:
    """Return the log frequency of the items, [N], smoothed as in the linear start."""
    counts = torch.from_numpy(train.item_counts()).double()
    return ((counts + 1.0) / (counts.sum() + len(counts))).log().float()


def _parameters(towers: TwoTower) -> dict[str, Tensor]:
    return {name: one.detach().cpu().contiguous() for name, one in towers.named_parameters()}
