"""The settings of a run as pydantic models, which are pure data and build nothing."""

from twotower.config.run import (
    ColumnsConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    HashedConfig,
    ObjectiveConfig,
    TrainingConfig,
)
from twotower.config.towers import HistoryConfig, ItemTowerConfig, QueryTowerConfig, SequenceConfig

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "HashedConfig",
    "HistoryConfig",
    "ItemTowerConfig",
    "ObjectiveConfig",
    "QueryTowerConfig",
    "SequenceConfig",
    "TrainingConfig",
]
