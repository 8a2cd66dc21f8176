"""Settings to try on the data of a run if its model does not beat the baselines."""

from __future__ import annotations

from dataclasses import replace

from twotower.config.run import Config
from twotower.evaluation import Evaluation


def settings_to_try(config: Config) -> tuple[str, ...]:
    """List overrides for `--set` that this configuration does not have yet, the most promising first.

    Each raised NDCG on most of the data sets on which the defaults lost to a baseline (docs/choosing.md).
    """
    query, training = config.query_tower, config.training
    factor = training.table_learning_rate_factor
    sequence = query.history is not None and query.history.sequence is not None
    tried = {
        "training.table_learning_rate_factor=5": training.table_optimizer == "adam"
        and (factor == "auto" or factor < 5),
        "objective.temperature=0.1": config.objective.temperature == "learned",
        "item_tower.dimension=256": config.item_tower.dimension < 256,
        "query_tower.id_embedding=true": not (
            query.id_embedding or sequence or config.data.split == "held-out-queries"
        ),
    }
    return tuple(setting for setting, applies in tried.items() if applies)


def with_advice(measured: Evaluation, config: Config) -> Evaluation:
    """Add the settings to try to an evaluation, which prints them if a baseline is not beaten."""
    return replace(measured, advice=settings_to_try(config))
