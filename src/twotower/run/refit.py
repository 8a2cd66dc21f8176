"""The refit: a second run on all rows after the validated run, with nothing held out.

The refit has no validation, so it reuses what the validated run chose on its validation queries: the number of epochs,
the linear start and the recent prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twotower.config.run import Config
from twotower.data import Holdout, Interactions, Split
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError, counted
from twotower.evaluation import Evaluation
from twotower.run.linear_start import StartChoice
from twotower.run.recent_prior import RecentPrior, prior_of
from twotower.towers import TwoTower


@dataclass(frozen=True)
class Refit:
    """The choices of the validated run that the refit reuses.

    Attributes:
        epochs: number of epochs after which the validated weights were saved; 0 if they are the initial weights.
        start: the choices of the linear start, or None.
        prior: the recent prior that was chosen, or None.
    """

    epochs: int
    start: StartChoice | None = None
    prior: RecentPrior | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Refit:
        """Read the choices from the metadata of the validated model."""
        training, prior = metadata["training"], metadata.get("recent_prior")
        start = training["start"]
        return cls(
            training["kept_epochs"],
            None if start is None else StartChoice.of(start),
            None if prior is None else RecentPrior(**prior),
        )

    def set_prior(self, towers: TwoTower, data: Interactions) -> None:
        """Set the recent prior of the towers, computed for the time after the last row."""
        if self.prior is None:
            return
        assert data.timestamps is not None
        now = int(np.max(data.timestamps)) + 1
        towers.set_recent(prior_of(data, data.item_counts(), now=now, **self.prior.settings()))


def refuse_refit(config: Config, split: Split | None = None, *, continues: bool) -> None:
    """Reject runs that cannot be refitted, before training or, if no split is given, before the data is read.

    Raises:
        InputError: the run continues a model, has no validation, has a time limit, or runs in several processes.
    """
    if continues:
        raise InputError(
            "--refit: a continued model cannot be refitted; continue without --refit, or train from scratch with it"
        )
    if split is not None and not len(split.validation):
        raise InputError(
            "--refit: the split has no validation, so the number of epochs to train for is unknown; use a split with "
            "validation, or train without --refit"
        )
    if Communicator.current().size > 1:
        raise InputError("--refit: a refit runs in one process; start the command without torchrun")
    if config.training.time_limit is not None:
        raise InputError(
            "--refit: training.time_limit may end the validated run within an epoch, but a refit runs whole epochs; "
            "use training.max_epochs"
        )


def without_holdouts(split: Split) -> Split:
    """Return a split whose training rows are all rows."""
    return replace(split, train=split.data, validation=Holdout.empty("validation"), test=Holdout.empty("test"))


def with_refit_note(measured: Evaluation, metadata: Mapping[str, Any] | None) -> Evaluation:
    """Add a note that the metrics belong to the validated model. `metadata` is the model's `refit` section."""
    if not metadata:
        return measured
    note = (
        f"metrics of the validated model, trained on {metadata['validated_rows']:,} rows; the saved model was refitted "
        f"on all {metadata['rows']:,} rows with the same settings and "
        f"{counted(metadata['epochs'], 'epoch')}, and was not evaluated"
    )
    return replace(measured, notes=(note, *measured.notes))
