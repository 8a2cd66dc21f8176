"""Tests of the memory plan against the measured memory of a process."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from twotower import run
from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.losses.tiled.blocks import TILE_MEMORY
from twotower.objectives.build import build_objective
from twotower.system import hardware
from twotower.towers import build_towers
from twotower.training import TableOptimizer, memory_plan, plan_memory
from twotower.training.memory_plan import candidates_of, least_of_all
from twotower.training.optimizer import parameter_groups
from twotower.training.placement import place_tables

CODE = """
    import json, sys
    import numpy as np, polars as pl
    from twotower.system import tuning
    tuning.tune()
    from twotower.system import hardware; from twotower import run
    from twotower.config.run import Config
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
    run.fit(split, config, progress=False, on_message=plans.append)
    (plan,) = plans
    peak = hardware.peak_memory()
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
def test_the_plan_is_close_to_the_measured_memory(changes):
    found = measured(*changes)
    grown, planned = found["peak"] - found["process"], found["planned"] - found["process"]
    print(found["text"], f"measured {found['peak'] >> 20} MiB, planned {found['planned'] >> 20} MiB")
    # The same run grew by 906 MiB once and by 1,165 another time: the measurement itself varies as much.
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


def test_planned_candidates_match_a_draw(parts, planted_split):
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


def test_too_little_memory_is_reported_before_training(parts, planted_split, monkeypatch):
    config, towers, objective, train = parts
    plan = plan_memory(config, towers, objective, train)
    assert not plan.shortages and "WARNING" not in str(plan)
    small = replace(plan, available=plan.needed - 1)
    assert small.shortages and "WARNING" in str(small) and "rowwise-adagrad" in str(small)
    messages = []
    run.fit(planted_split, Config.load(None, ["training.max_epochs=1"]), progress=False, on_message=messages.append)
    assert [str(message).split(":")[0] for message in messages] == ["training question", "memory"]
    nothing = hardware.Memory(total=1 << 30, available=1 << 10, limit=None, resident=1 << 20, peak=1 << 20)
    monkeypatch.setattr(memory_plan.hardware, "memory", lambda processes=1: nothing)
    with pytest.raises(InputError, match="item_tower.dimension: tables of 160 rows .*rowwise-adagrad"):
        place_tables(config, train)


def test_free_memory_of_a_device(monkeypatch):
    assert hardware.device_memory("auto") is None or torch.cuda.is_available()
    for name, value in (("mem_get_info", (5000, 9000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.device_memory("auto") == hardware.device_memory("gpu") == 5400
    assert hardware.device_memory("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.device_memory("gpu") is None


def test_all_ranks_use_the_minimum(monkeypatch):
    others = [30, -1]
    monkeypatch.setattr(
        Communicator, "gather", lambda self, values, sizes: torch.cat([values, torch.tensor(others[:1])])
    )
    monkeypatch.setattr(Communicator, "device", "cpu")
    assert [least_of_all(here, Communicator(0, 2)) for here in (20, 40, None)] == [20, 30, None]
    others.pop(0)
    assert least_of_all(20, Communicator(0, 2)) is None


@pytest.fixture
def there(monkeypatch):
    """Set the free main memory, and the free memory of a CUDA device unless training runs on the CPU."""

    def there(main, device):
        found = hardware.Memory(total=None, available=main, limit=None, resident=1 << 28, peak=None)
        monkeypatch.setattr(hardware, "memory", lambda processes=1: found)
        monkeypatch.setattr(hardware, "device_memory", lambda accelerator: None if accelerator == "cpu" else device)
        monkeypatch.setattr("twotower.training.placement.least_of_all", lambda found, ranks: found)
        monkeypatch.setattr("twotower.training.placement.SHARED_ABOVE", 0)

    return there


def test_tables_are_placed_by_the_memory_in_which_training_runs(parts, there):
    config, towers, _, train = parts
    on_cpu = config.model_copy(update={"training": config.training.model_copy(update={"accelerator": "cpu"})})
    weights = sum(m.weight.nbytes for m in towers.modules() if isinstance(m, torch.nn.Embedding))
    everything, two = 3 * weights, Communicator(0, 2)  # Adam
    there(main=weights, device=2 * everything)
    assert place_tables(config, train, two).parts == {}, "the state is not in main memory"
    with pytest.raises(InputError, match="optimizer state need 0 MiB of main memory, but only 0 MiB are free"):
        place_tables(on_cpu, train)
    there(main=1 << 50, device=2 * everything - 1)
    assert place_tables(config, train, two).parts.keys() == {"item", "query"}, "more than half of the device"
    assert place_tables(on_cpu, train, two).parts == {}
    place_tables(config, train)
    there(main=1 << 50, device=everything - 1)
    with pytest.raises(InputError, match="state need 0 MiB of the CUDA device's memory, but only 0 MiB are free"):
        place_tables(config, train)
    place_tables(on_cpu, train)
    there(main=weights - 1, device=1 << 50)
    assert place_tables(config, train, two).parts.keys() == {"item", "query"}
    with pytest.raises(InputError, match="rows need 0 MiB of main memory, where they are created, but only 0 MiB"):
        place_tables(config, train)


def test_a_plan_uses_the_memory_in_which_training_runs(parts, planted_split, there):
    config, towers, objective, train = parts

    def planned(main, device):
        there(main, device)
        return plan_memory(config, towers, objective, train)

    here = planned(1 << 50, None)
    plan = planned(1 << 50, 1 << 50)
    assert not plan.shortages and str(plan).startswith("memory of the CUDA device: ")
    assert plan.held == here.held and plan.state == here.state
    throughout = sum(plan.held[name] for name in ("tables", "optimizer state"))
    assert plan.peak == plan.needed == throughout + max(sum(plan.step.values()), sum(plan.ranking.values()))
    # Without the parts that only a CPU has: bfloat16 estimates, tiles for its caches, memory kept for reuse.
    assert here.ranking["index"] - plan.ranking["index"] == train.num_items * config.item_tower.dimension * 2
    assert "kept for reuse" not in plan.ranking
    short = planned(1 << 50, plan.needed - 1)
    assert short.shortages and "more of the CUDA device's memory is needed" in str(short)
    assert not planned(1 << 50, plan.needed).shortages
    # Main memory: a copy of the state, larger than tables and best weights together, minus the existing tables.
    assert plan.main_memory == plan.state > 2 * plan.held["tables"]
    copied = plan.state - plan.held["tables"]
    assert not planned(copied, 1 << 50).shortages
    short = planned(copied - 1, 1 << 50)
    assert "more of main memory is needed" in str(short) and "CUDA device's memory is needed" not in str(short)
    assert "more of main memory is needed" in str(planned(0, None))
    assert planned(2 * plan.state, 1 << 50).in_background and not planned(2 * plan.state - 1, 1 << 50).in_background
    there(1 << 50, 1)
    with pytest.raises(InputError, match="CUDA device's memory"):
        run.fit(planted_split, Config.load(None, ["training.max_epochs=1"]), progress=False)


def test_a_tile_on_a_device_has_the_maximum_size():
    assert memory_plan._tile(1 << 20, 1 << 10, on_cpu=True) < 16 << 20
    assert 0.9 * TILE_MEMORY < memory_plan._tile(1 << 20, 1 << 10, on_cpu=False) <= TILE_MEMORY
