"""The initial weights of a run, saved next to the checkpoints; they become the model if no epoch is better."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.loading.questions import QuestionBatches
from twotower.distributed.communicator import Communicator
from twotower.run.linear_start import StartChoice, start_linear
from twotower.run.text_start import start_at_texts
from twotower.run.validation import Validator
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
        self.path, self.ranks, self.resume = directory / "checkpoints" / "start.safetensors", ranks, resume
        if not resume and ranks.is_first:
            self.path.unlink(missing_ok=True)

    def make(
        self,
        towers: TwoTower,
        config: Config,
        train: Interactions,
        questions: QuestionBatches | None,
        *,
        validate: Validator | None,
        choice: StartChoice | None = None,
        on_message: Callable[[object], None] | None = None,
    ) -> None:
        """Initialise new towers (`training.start`), and save the weights; see `start_linear` and `start_at_texts`.

        Random weights are not saved, nor are any weights without validation queries to compare them on.
        """
        measure = None if validate is None else validate.by_query
        found = None
        if not start_at_texts(towers, config, self.ranks, on_message=on_message):
            found = start_linear(
                towers, config, train, questions, self.ranks, measure=measure, choice=choice, on_message=on_message
            )
            if found is None:
                return
        if measure is None:
            return
        metric = float(measure(towers).mean())
        if not self.ranks.is_first:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary:
            save_file(
                _parameters(towers),
                temporary,
                metadata={
                    "metric": json.dumps(metric),
                    **({} if found is None else {"choice": json.dumps(asdict(found))}),
                },
            )

    def resize(self, towers: TwoTower, config: Config) -> Config:
        """Give the towers of a resumed run the chosen rank, and return settings with the dimension of the towers."""
        rank = (self.choice() or {}).get("rank") if self.resume else None
        if rank is not None:
            towers.resize(rank)
        dimension = towers.item_tower.dimension
        if dimension == config.item_tower.dimension:
            return config
        item = config.item_tower.model_copy(update={"dimension": dimension})
        training = config.training.model_copy(update={"start_ranks": [1]})
        return config.model_copy(update={"item_tower": item, "training": training})

    def choice(self) -> dict[str, Any] | None:
        """Return the choices of the linear start as JSON values; None if there is no linear start."""
        found = self._metadata().get("choice")
        return None if found is None else json.loads(found)

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
            on_message(f"no epoch improved on the initial weights (validation {metric:.4f}), so they are kept")
        return replace(result, best=metric, kept=0, checkpoint=None)

    def _metric(self) -> float | None:
        found = self._metadata().get("metric")
        return None if found is None else float(json.loads(found))

    def _metadata(self) -> dict[str, str]:
        if not self.path.is_file():
            return {}
        with safe_open(self.path, framework="pt") as stored:
            return dict(stored.metadata())


def _parameters(towers: TwoTower) -> dict[str, Tensor]:
    return {name: one.detach().cpu().contiguous() for name, one in towers.named_parameters()}
