"""Fixtures of the serving tests: one small trained model, and the same model with an item table to filter by."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import twotower as tt
from twotower.config.run import Config
from twotower.serving import Retriever

SETTINGS = [
    "training.max_epochs=6",
    "training.batch_size=64",
    "training.learning_rate=0.01",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "item_tower.dimension=16",
    "query_tower.history.length=10",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
    # With masks, scores on so little data are too far apart for the popularity dial to change much.
    "objective.mask_known_positives=false",
]


@pytest.fixture(scope="session")
def model(planted_split):
    return tt.fit(planted_split, Config.load(None, SETTINGS), progress=False)


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="session")
def priced(model):
    """The model with columns price, country (with nulls) and tags in its item table."""
    count = len(model.artifact.items)
    table = model.artifact.item_table.with_columns(
        pl.Series("price", np.arange(count) * 0.5),
        pl.Series("country", [("FR", "DE", None)[j % 3] for j in range(count)]),
        pl.Series("tags", [["new"] if j % 10 == 0 else [] for j in range(count)]),
    )
    return Retriever(replace(model.artifact, item_table=table))
