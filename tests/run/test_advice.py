"""The settings that a run proposes if its model does not beat a baseline."""

from itertools import pairwise

import numpy as np
import pytest

from twotower.config.run import Config
from twotower.run import evaluate, settings_to_try, with_advice

RATE = "training.learning_rate=1e-4"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ["training.question=auto"]),
        (["training.question=next", "data.split=random"], ["training.question=auto"]),
        (["training.question=next", "data.split=leave-last-out"], ["training.table_learning_rate_factor=5"]),
        (["data.events={column: event, weights: {click: 1}}"], ["training.table_learning_rate_factor=5"]),
        (["query_tower.history.sequence={}", "training.table_learning_rate_factor=5"], []),
        (["data.split=leave-last-out", "training.table_optimizer=rowwise-adagrad"], []),
        (["training.question=horizon"], [RATE, "item_tower.dimension=128"]),
        (
            ["training.question=horizon", "training.recent_prior=false", "training.start=random"],
            ["training.recent_prior=true", "training.start=linear", RATE, "item_tower.dimension=128"],
        ),
        (["training.question=set", "training.recent_prior=false", "item_tower.dimension=512"], [RATE]),
        (
            ["training.question=set", "training.learning_rate=1e-4", "item_tower.dimension=256"],
            ["item_tower.dimension=512"],
        ),
    ],
)
def test_settings_to_try_are_valid_and_not_set_yet(settings, expected):
    config = Config.load(None, settings)
    assert list(settings_to_try(config)) == expected
    improved = Config.load(None, [*settings, *expected])
    assert not set(settings_to_try(improved)) & set(expected) or "training.question=auto" in expected


def test_no_more_dimensions_than_items():
    config = Config.load(None, ["training.question=horizon", "item_tower.dimension=64"])
    assert settings_to_try(config, 128) == settings_to_try(config) == (RATE, "item_tower.dimension=128")
    assert settings_to_try(config, 127) == (RATE,)


@pytest.mark.parametrize(("settings", "split"), [([], ""), (["data.split=random"], " --set data.split=random")])
def test_a_verdict_against_the_model_names_the_search(planted_time_split, settings, split):
    class Backwards:
        """Ranks the least popular items first."""

        def rank(self, holdout, k, exclude_seen):
            counts = planted_time_split.train.item_counts()
            rows = []
            for start, stop in pairwise(holdout.history_offsets):
                scores = -counts.astype(float)
                scores[holdout.history_items[start:stop]] = -np.inf
                rows.append(np.argsort(-scores, kind="stable")[:k])
            return np.stack(rows).astype(np.int64)

    measured = evaluate(Backwards(), planted_time_split.test, train=planted_time_split.train)
    said = str(with_advice(measured, Config.load(None, settings)))
    command = f"twotower tune DATA --out NEW_DIR --budget 30m{split}"
    assert "model is below the best baseline" in said and f"to search over these and other settings: {command}" in said
    assert with_advice(measured, Config.load(None, settings)).to_dict()["command"] == command
