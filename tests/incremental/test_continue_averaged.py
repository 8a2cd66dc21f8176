"""Tests of a parent with averaged weights: optimizer and objective state is inherited, or its loss is reported."""

import shutil

import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.incremental import ParentModel
from twotower.incremental.warm_start import extend_features, load_parent_state
from twotower.objectives.build import build_objective
from twotower.towers import build_towers
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.module import TrainingModule

SETTINGS = [
    "training={max_epochs: 2, batch_size: 64, weight_average: 0.95, accelerator: cpu, logger: none}",
    "item_tower.dimension=8",
    "query_tower={hidden: [8], history: {length: 5}}",
    "objective.frequency=streaming",
]


def rows(start, seed):
    rng = np.random.default_rng(seed)
    times = start + np.sort(rng.integers(0, 86_400 * 30, 400))
    return Interactions.from_frame(
        pl.DataFrame({"user_id": rng.integers(0, 30, 400), "item_id": rng.integers(0, 40, 400), "timestamp": times})
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("averaged")
    split = tt.splits.by_time(rows(1_600_000_000, 0))
    tt.fit(split, Config.load(None, SETTINGS), directory=made, progress=False).save(made / "model")
    return made


@pytest.fixture(scope="module")
def days(folder):
    return tt.continue_with(folder, rows(1_700_000_000, 1))


def continued(folder, days, *changes):
    """Return the messages, the optimizer's callback, and the inherited objective and towers."""
    parent, config = ParentModel.load(folder), Config.load(None, [*SETTINGS, *changes]).resolved(len(days.train))
    messages = []
    growth = extend_features(parent, days)
    towers = build_towers(config, num_queries=days.train.num_queries, num_items=days.train.num_items)
    objective = build_objective(config, days.train)
    start = load_parent_state(parent, config, growth, towers=towers, objective=objective, on_message=messages.append)
    module = TrainingModule(towers, objective, config.training, total_steps=10)
    optimizer = module.configure_optimizers()["optimizer"]

    class Trainer:
        optimizers = (optimizer,)

    if start is not None:
        start.on_fit_start(Trainer(), module)
    return messages, optimizer, objective, towers


def test_the_states_are_inherited_with_the_averaged_weights(folder, days):
    messages, optimizer, objective, towers = continued(folder, days)
    assert messages == []
    saved = SafeCheckpointIO().load_checkpoint(folder / "checkpoints" / "best.ckpt")
    state = saved["state_dict"]
    names = dict(towers.named_parameters())
    assert torch.equal(names["query_tower.history.log_weight"], state["averaged.query_tower.history.log_weight"])
    assert not torch.equal(names["query_tower.history.log_weight"], state["towers.query_tower.history.log_weight"])
    numbers = [number for group in saved["optimizer_states"][0]["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        old = saved["optimizer_states"][0]["state"][number]
        assert float(optimizer.state[parameter]["step"]) == float(old["step"]) > 0
        if old["mean"].shape == parameter.shape:
            assert torch.equal(optimizer.state[parameter]["mean"], old["mean"])
    (frequency,) = {id(one): one for one in objective.pool.frequencies()}.values()
    (gap,) = {value.data_ptr(): value for name, value in state.items() if name.endswith(".gap")}.values()
    to = torch.from_numpy(days.item_map)
    assert torch.equal(frequency.gap[:, to], gap) and float(frequency.clock) > 0


def test_state_that_cannot_be_inherited_is_reported_in_one_line(folder, days, tmp_path):
    (line,), optimizer, *_ = continued(folder, days, "training.table_optimizer=rowwise-adagrad")
    assert "1 of" in line and "update rule changed" in line and optimizer.state
    other = shutil.copytree(folder, tmp_path / "other")
    best = other / "checkpoints" / "best.ckpt"
    kept = SafeCheckpointIO().load_checkpoint(best)
    kept["state_dict"]["averaged.query_tower.history.log_weight"].add_(1)
    SafeCheckpointIO().save_checkpoint(kept, best)
    (line,), optimizer, *_ = continued(other, days)
    assert "start from scratch" in line and "and the model have different weights" in line and not optimizer.state
    shutil.rmtree(other / "checkpoints")
    (line,), *_ = continued(other, days)
    assert "start from scratch" in line and "has no checkpoint" in line
