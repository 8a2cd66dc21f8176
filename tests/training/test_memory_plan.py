"""The memory plan beside what a process really held."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from twotower import machine, run
from twotower.build import build_objective
from twotower.config import Config
from twotower.errors import InputError
from twotower.towers import build_towers
from twotower.training import TableOptimizer, memory_plan, plan_memory
from twotower.training.memory_plan import candidates_of
from twotower.training.optimizers import parameter_groups
from twotower.training.placement import place_tables

CODE = """
    import json, sys
    import numpy as np, polars as pl
    from twotower import process
    process.tune()
    from twotower import machine, run
    from twotower.config import Config
    from twotower.data import Interactions
    rng = np.random.default_rng(0)
    rows, items = 120_000, 110_000
    frame = pl.DataFrame({
        "user_id": rng.integers(0, 6000, rows),
        "item_id": np.concatenate([np.arange(items), rng.integers(0, items, rows - items)]),
        "timestamp": rng.permutation(rows),
    })
    split = run.split_data(Interactions.from_frame(frame), Config.load(None, ["data.validation=0.01"]).data)
    config = Config.load(None, [
        "item_tower.dimension=256", "training.max_epochs=1", "training.batch_size=8192",
        "query_tower.history.length=10", "training.accelerator=cpu", *sys.argv[1:],
    ])
    plans = []
    run.fit(split, config, progress=False, say=plans.append)
    (plan,) = plans
    peak = machine.peak_memory()
    print(json.dumps({"planned": plan.peak, "process": plan.held["process"], "peak": peak, "text": str(plan)}))
"""


def measured(*changes):
    code = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CODE), *changes]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.table_optimizer=rowwise-adagrad"],
        ["training.table_optimizer=rowwise-adagrad", "item_tower.table_precision=bfloat16"],
    ],
    ids=["adam", "adagrad", "bfloat16"],
)
def test_the_plan_is_near_what_a_process_holds(changes):
    found = measured(*changes)
    grown, planned = found["peak"] - found["process"], found["planned"] - found["process"]
    print(found["text"], f"measured {found['peak'] >> 20} MiB, planned {found['planned'] >> 20} MiB")
    # The same run grew by 906 MiB once and by 1,165 another time: the measured number itself is no nearer.
    assert 0.8 < planned / grown < 1.5, found


@pytest.fixture
def parts(planted_split):
    config = Config.load(
        None, ["training.batch_size=64", "query_tower.history.length=5", "query_tower.id_embedding=true"]
    )
    config = config.resolved(len(planted_split.train))
    train = planted_split.train
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items)
    return config, towers, build_objective(config, train), train


def test_tables_and_state_are_exact(parts):
    for name in ("adam", "rowwise-adagrad"):
        config, towers, objective, train = parts
        config = config.model_copy(update={"training": config.training.model_copy(update={"table_optimizer": name})})
        plan = plan_memory(config, towers, objective, train)
        tables = [towers.item_tower.ids.weight, towers.query_tower.ids.weight]
        assert plan.held["tables"] == sum(table.nbytes for table in tables)
        model = torch.nn.ModuleList([towers, objective])
        optimizer = TableOptimizer(parameter_groups(model, 0.0, lr=0.1, table_rule=name), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for s in optimizer.state.values() for key, value in s.items() if key != "step"]
        assert plan.held["optimizer state"] == sum(value.nbytes for value in state)


def test_candidates_are_as_many_as_a_draw_brings(parts, planted_split):
    config, _, objective, train = parts
    shared, own = candidates_of(objective, 64, train.num_items)
    drawn = objective.draw(torch.from_numpy(train.item_codes[:64].astype("int64")))
    assert own == 0 and 0.3 * shared <= len(drawn.items) <= shared
    changed = Config.load(None, ["objective=negative-sampling", "objective.negatives=7"]).objective
    binary = build_objective(config.model_copy(update={"objective": changed}), train)
    drawn = binary.draw(torch.from_numpy(train.item_codes[:64].astype("int64")))
    assert candidates_of(binary, 64, train.num_items) == (
        len(drawn.items),
        0 if drawn.row_items is None else drawn.row_items.shape[1],
    )


def test_what_does_not_fit_is_told_before_training(parts, planted_split, monkeypatch):
    config, towers, objective, train = parts
    plan = plan_memory(config, towers, objective, train)
    assert not plan.is_too_large and "WARNING" not in str(plan)
    small = replace(plan, available=plan.needed - 1)
    assert small.is_too_large and "WARNING" in str(small) and "rowwise-adagrad" in str(small)
    told = []
    run.fit(planted_split, Config.load(None, ["training.max_epochs=1"]), progress=False, say=told.append)
    assert len(told) == 1 and str(told[0]).startswith("memory: ")
    nothing = machine.Memory(total=1 << 30, available=1 << 10, limit=None, resident=1 << 20, peak=1 << 20)
    monkeypatch.setattr(memory_plan.machine, "memory", lambda processes=1: nothing)
    with pytest.raises(InputError, match="item_tower.dimension: tables of 160 rows .*rowwise-adagrad"):
        place_tables(config, train)
