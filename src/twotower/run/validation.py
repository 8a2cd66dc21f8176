"""Evaluation of a model on the validation queries, for early stopping and other choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from twotower import evaluation
from twotower.config.run import Config
from twotower.data import Holdout, Interactions
from twotower.distributed.communicator import Communicator
from twotower.evaluation import Row
from twotower.ranking import Ranker
from twotower.ranking.distributed import ShardedRanker, item_embeddings, over_ranks
from twotower.ranking.tower_ranker import TowerRanker
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import shared_tables_of

Choice = TypeVar("Choice")


class Validator:
    """A callable that evaluates towers, or a ranker that is the same on every rank, on a holdout; collective.

    Args:
        holdout: the validation queries.
        config: the settings.
        train: the training interactions.

    Raises:
        InputError: no query has a target that can be ranked.
    """

    def __init__(self, holdout: Holdout, config: Config, train: Interactions) -> None:
        self.holdout, self.config, self.train = holdout, config, train
        self.metric = config.training.metric
        evaluation.check_targets(holdout, train.num_items, config.evaluation.exclude_seen)

    def __call__(self, model: TwoTower | Ranker) -> dict[str, float]:
        """Return the metrics by name, without those that are undefined (NaN)."""
        return defined(self.measured(model).values)

    def by_query(self, model: TwoTower | Ranker) -> NDArray[np.float64]:
        """Return the early-stopping metric of each query."""
        return self.measured(model).per_query[self.metric]

    def measured(self, model: TwoTower | Ranker) -> Row:
        """Return the means of the metrics, and the metrics of each query."""
        ranks, length = Communicator.current(), self.config.history_length
        ranker: Ranker
        if not isinstance(model, TwoTower):
            ranker = over_ranks(model, ranks)
        elif shared_tables_of(model):
            ranker = ShardedRanker(model, length, ranks)
        else:
            ranker = over_ranks(TowerRanker(model, length, item_embeddings(model, ranks)), ranks)
        measured = evaluation.evaluate(
            ranker,
            self.holdout,
            train=self.train,
            ks=(int(self.metric.split("@")[1]),),
            exclude_seen=self.config.evaluation.exclude_seen,
            baselines=False,
        )
        return measured["model"]


def defined(values: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are not NaN."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def simplest(measured: Mapping[Choice, NDArray[np.float64]]) -> Choice:
    """Return the first choice whose metric is within one standard error of the best one's, by paired differences.

    With few validation queries, the best of several choices is best by chance (the one-standard-error rule of Breiman
    et al. 1984, "Classification and Regression Trees", section 3.4.3).

    Args:
        measured: the metric of each query [E] by choice, simplest first.
    """
    best = max(measured, key=lambda choice: measured[choice].mean())
    for choice, values in measured.items():
        loss = measured[best] - values
        if loss.mean() <= loss.std(ddof=min(len(loss) - 1, 1)) / math.sqrt(len(loss)):
            return choice
    return best
