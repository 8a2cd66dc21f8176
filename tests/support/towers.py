"""Towers as a run builds them from its settings and data, for tests of their parts."""

from typing import Any

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.features.from_config import encode_features
from twotower.towers import TwoTower, build_towers


def towers_of(config: Config, data: Interactions, **options: Any) -> TwoTower:
    """Build towers with the declared features encoded; `options` are arguments of `build_towers`."""
    encoded = encode_features(config, data)
    return build_towers(
        config,
        num_queries=data.num_queries,
        num_items=data.num_items,
        item_features=encoded.get("item"),
        query_features=encoded.get("query"),
        context=encoded.get("context"),
        **options,
    )
