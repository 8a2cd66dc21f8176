"""The settings that a run proposes if its model does not beat a baseline."""

import pytest

from twotower.config.run import Config
from twotower.run import settings_to_try

RATE = "training.learning_rate=1e-4"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ["training.question=auto"]),
        (["training.question=next", "data.split=random"], ["training.question=auto"]),
        (["training.question=next", "data.split=leave-last-out"], ["training.table_learning_rate_factor=5"]),
        (["query_tower.history.sequence={}", "training.table_learning_rate_factor=5"], []),
        (["data.split=leave-last-out", "training.table_optimizer=rowwise-adagrad"], []),
        (["training.question=horizon"], [RATE, "item_tower.dimension=256"]),
        (
            ["training.question=horizon", "training.recent_prior=false", "training.start=random"],
            ["training.recent_prior=true", "training.start=linear", RATE, "item_tower.dimension=256"],
        ),
        (["training.question=set", "training.recent_prior=false", "item_tower.dimension=512"], [RATE]),
        (["training.question=set", "training.learning_rate=1e-4", "item_tower.dimension=256"], []),
    ],
)
def test_settings_to_try_are_valid_and_not_set_yet(settings, expected):
    config = Config.load(None, settings)
    assert list(settings_to_try(config)) == expected
    improved = Config.load(None, [*settings, *expected])
    assert not set(settings_to_try(improved)) & set(expected) or "training.question=auto" in expected
