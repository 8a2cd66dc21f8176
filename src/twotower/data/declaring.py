"""The features that a configuration declares, on its training data."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config import Config
from twotower.data.encoding import EncodedTable, FeatureSet
from twotower.data.interactions import Interactions
from twotower.data.proposing import features_of, propose
from twotower.feature_config import Features
from twotower.schema import Vocabulary


def with_features(config: Config, train: Interactions) -> Config:
    """The same settings with the features that `auto` means written out."""
    changed = {}
    for side, features, table in _declared(config, train):
        if features == "auto":
            section = f"{side}_tower"
            found = [] if table is None else features_of(propose(table))
            update: dict[str, Any] = {"features": found or "none"}
            if side == "item" and not found:
                update["id_dropout"] = 0.0  # nothing could take the id's place
            changed[section] = getattr(config, section).model_copy(update=update)
    return config.model_copy(update=changed)


def fit_features(config: Config, train: Interactions) -> dict[str, FeatureSet]:
    """The declared features by side, fitted on the rows of the tables that occur in training; sides without are absent.

    Raises:
        InputError: there is no such table or column, or a value is of another kind.
    """
    return {
        side: FeatureSet.fit(side, features, table, ids=_ids(train, side).ids, known=in_training(train, side))
        for side, features, table in _declared(config, train)
        if not isinstance(features, str) and features
    }


def encode_features(config: Config, train: Interactions) -> dict[str, EncodedTable]:
    """As `fit_features`, with the whole tables encoded."""
    tables = {"item": train.item_table, "query": train.query_table}
    return {
        side: EncodedTable(fitted, fitted.encode_table(tables[side], _ids(train, side).ids))
        for side, fitted in fit_features(config, train).items()
    }


def unused_tables(config: Config, train: Interactions) -> list[str]:
    """One line for each table that could give features and is not asked to."""
    lines = []
    for side, features, table in _declared(config, train):
        columns = ", ".join(one.column for one in features_of(propose(table))) if table is not None else ""
        if features == "none" and columns:
            lines.append(
                f"{side} table: not used as features: {columns}; {side}_tower.features=auto uses them, "
                "`twotower features` tells how"
            )
    return lines


def in_training(train: Interactions, side: str) -> NDArray[np.bool_]:
    """Which ids of a side have a training row, bool [ids]."""
    return train.item_counts() > 0 if side == "item" else np.diff(train.offsets) > 0


def _ids(train: Interactions, side: str) -> Vocabulary:
    return train.items if side == "item" else train.queries


def _declared(config: Config, train: Interactions) -> list[tuple[str, Features, pl.DataFrame | None]]:
    return [
        ("item", config.item_tower.features, train.item_table),
        ("query", config.query_tower.features, train.query_table),
    ]
