"""Tests of the plan against the bytes and rows of a real step, counted call by call, and against closed forms."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from twotower.cli.main import app
from twotower.config.towers import ItemTowerConfig
from twotower.data import Batch, Interactions
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import placed_tables
from twotower.errors import InputError
from twotower.objectives.build import build_objective
from twotower.towers import build_towers
from twotower.training import TableOptimizer
from twotower.training.gradient_sync import GradientExchange
from twotower.training.machine_rates import _loopback
from twotower.training.optimizer import fresh_state, parameter_groups
from twotower.training.placement import place_tables
from twotower.training.scale_plan import Rates, Workload, plan_scale, read_rates
from twotower.training.seeds import draws_of
from twotower.training.step import compute_loss

sys.path.insert(0, str(Path(__file__).parent))

import cases

RATES = Rates(products=1e11, layers=5e10, updates=1e9, lookups=2e9, link=1e9, latency=1e-4, process=500 << 20)


def test_tables_and_state_match_a_training_run():
    work = Workload(items=5000, dimension=16, batch=64, queries=300, history=5, hidden=(12,))
    for rule, precision in (("adam", "float32"), ("rowwise-adagrad", "bfloat16")):
        config = cases.Config.load(
            None,
            [
                "item_tower.dimension=16",
                f"item_tower.table_precision={precision}",
                "query_tower={id_embedding: true, hidden: [12], history: {length: 5, heads: 1}}",
            ],
        )
        towers = build_towers(config, num_queries=300, num_items=5000)
        optimizer = TableOptimizer(parameter_groups(towers, 0.0, lr=0.1, table_rule=rule), lr=0.1)
        for parameter in towers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tables = [m.weight for m in towers.modules() if isinstance(m, torch.nn.Embedding)]
        state = [v for table in tables for key, v in optimizer.state[table].items() if key != "step"]
        plan = plan_scale(replace(work, optimizer=rule, precision=precision), RATES)
        assert plan.memory["tables"] == sum(table.nbytes for table in tables)
        assert plan.memory["optimizer state"] == sum(value.nbytes for value in state)
        layers = [p for p in towers.parameters() if all(p is not table for table in tables)]
        held = [value for p in towers.parameters() for key, value in optimizer.state[p].items() if key != "step"]
        everything = sum(value.nbytes for value in (*tables, *layers, *held))
        assert plan.checkpoint == pytest.approx(everything, rel=0.001)  # without the weights over history positions


def test_nested_widths_cost_as_the_runs_plan_says():
    """The loss at widths 4, 8 and 16 computes as much as three losses of these widths, and holds their coordinates."""
    work = Workload(items=5000, dimension=16, batch=64, history=5, hidden=(12,))
    found = plan_scale(replace(work, nested=(4, 8)), RATES)
    alone = [plan_scale(replace(work, dimension=width), RATES) for width in (4, 8, 16)]
    assert found.seconds["loss"] == pytest.approx(sum(one.seconds["loss"] for one in alone))
    assert found.memory["candidates"] == sum(one.memory["candidates"] for one in alone)
    assert replace(work, nested=(4, 8)).all_widths == sum(ItemTowerConfig(dimension=16, nested=[4, 8]).widths)
    same = plan_scale(work, RATES)
    assert {name for name in same.memory if found.memory[name] != same.memory[name]} == {
        "candidates",
        "rows and histories",
    }
    for wrong in ((8, 4), (4, 4), (17,), (0,)):
        with pytest.raises(InputError, match="--nested: expected ascending widths from 1 to --dimension 16"):
            replace(work, nested=wrong)


def test_layers_match_the_tower():
    config = cases.Config.load(
        None, ["item_tower.dimension=16", "query_tower={hidden: [12, 7], history: {length: 5, heads: 1}}"]
    )
    towers = build_towers(config, num_queries=3, num_items=50)
    linear = [m for m in towers.query_tower.modules() if isinstance(m, torch.nn.Linear)]
    work = Workload(items=50, dimension=16, batch=8, history=5, hidden=(12, 7))
    assert work.layers == sum(p.numel() for m in linear for p in m.parameters())


@pytest.mark.parametrize("size", [2, 3])
def test_exchanges_match_the_code(monkeypatch, size):
    """Count what rank 0 sends in a step with gathers and sums replaced; no item occurs twice."""
    work = Workload(items=20_000, dimension=16, batch=24, ranks=size, queries=24, history=5, sampled=36, hidden=(64,))
    given = pl.DataFrame({"user_id": np.arange(20_000) % 24, "item_id": np.arange(20_000)})
    data = Interactions.from_frame(given)
    changes = [
        "item_tower.dimension=16",
        "query_tower={id_embedding: true, hidden: [64], dropout: 0, history: {length: 5, heads: 1, dropout: 0}}",
        *cases.objective("expected-count", cases.IN_BATCH, "{uniform: {size: 36}}", unique=True),
    ]
    config = cases.Config.load(None, changes).resolved(len(data))
    towers = build_towers(config, num_queries=data.num_queries, num_items=data.num_items).train()
    for module in towers.modules():
        if isinstance(module, torch.nn.Embedding):
            module.sparse = True
    goal, ranks = build_objective(config, data).train(), Communicator(0, size)
    positives, histories = torch.arange(24), torch.arange(24, 24 + 24 * 5).view(24, 5)
    own = slice(0, 24 // size)
    numbers = torch.arange(24)[own]
    batch = Batch(numbers, numbers, positives[own], histories[own], total=24)
    sent, now = Counter(), ""

    def gather(out, values, group=None):
        # If each rank contributes n bytes, each sends n (W - 1) bytes in total.
        sent[now or ("candidates" if values.is_floating_point() else "codes")] += values.nbytes * (size - 1)
        alike = torch.cat([values] * size) if out.ndim == values.ndim else values.expand(size)
        out.copy_(alike if now or values.is_floating_point() else positives)

    def scatter(out, every, group=None):
        sent["gradients of candidates"] += out.nbytes * (size - 1)
        out.copy_(every[: len(out)])

    def reduce(values, group=None):
        sent["gradients of layers"] += 2 * values.nbytes * (size - 1) / size

    monkeypatch.setattr("twotower.distributed.communicator._all_gather", gather)
    monkeypatch.setattr("twotower.distributed.communicator._reduce_scatter", scatter)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    exchange = GradientExchange(torch.nn.ModuleList([towers, goal]), ranks)
    for step in range(2):  # in the first step the ranks agree on which parameters have gradients
        sent.clear()
        towers.zero_grad()
        now = ""
        loss, _, drawn = compute_loss(towers, goal, batch, ranks, generator=draws_of(0, step, "cpu"))
        loss.backward()
        now = "gradients of tables"
        exchange.sum_gradients()
    assert len(drawn.items) == work.candidates == 60, "another seed: items were drawn twice"
    assert dict(sent) == pytest.approx(plan_scale(work, RATES).exchanged, rel=0.02)


@pytest.mark.parametrize(("layout", "placement"), [("row-wise",) * 2, ("table-wise", "by table")])
def test_rows_of_tables_are_moved_as_planned(done_by_ranks, layout, placement):
    """Each of two ranks looks up all items and returns their gradients; bytes per touched row."""
    found = [torch.load(done_by_ranks / f"moved.{placement}.2.{rank}.pt") for rank in range(2)]
    work = Workload(items=60, dimension=8, batch=12, ranks=2, history=5, sampled=15, hidden=(12,), layout=layout)
    planned = plan_scale(work, RATES).exchanged
    for name, what in (("rows of tables", "rows"), ("gradients of rows", "gradients")):
        most = max(one[what] for one in found)
        assert most / cases.NUM_ITEMS == pytest.approx(planned[name] / work.touched), name


@pytest.mark.parametrize(
    ("layout", "rule"),
    [("replicated", "adam"), ("row-wise", "adam"), ("row-wise", "rowwise-adagrad"), ("table-wise", "rowwise-adagrad")],
)
def test_tables_of_a_rank_match_the_plan(monkeypatch, layout, rule):
    monkeypatch.setattr("twotower.training.placement.least_of_all", lambda found, ranks: found)
    data, held = cases.interactions(), []
    changes = [f"training.table_placement={layout}", f"training.table_optimizer={rule}", "item_tower.dimension=8"]
    config = cases.Config.load(None, [*changes, "query_tower.id_embedding=true"]).resolved(len(data))
    for rank in range(4):
        with placed_tables(place_tables(config, data, Communicator(rank, 4)).parts):
            towers = build_towers(config, num_queries=data.num_queries, num_items=data.num_items)
        tables = [m.weight for m in towers.modules() if isinstance(m, torch.nn.Embedding)]
        state = [fresh_state(table, rule) for table in tables]
        numbers = sum(value.nbytes for one in state for key, value in one.items() if key != "step")
        held.append((sum(table.nbytes for table in tables), numbers))
    work = Workload(items=60, queries=40, dimension=8, batch=12, ranks=4, layout=layout, optimizer=rule)
    memory = plan_scale(work, RATES).memory
    assert (memory["tables"], memory["optimizer state"]) == max(held)


def test_growing_and_sharding():
    work = Workload(items=10**9, batch=65_536, ranks=64, optimizer="rowwise-adagrad", device="cuda")
    whole = plan_scale(work, RATES, 80 * 2**30)
    parted = plan_scale(replace(work, layout="row-wise"), RATES, 80 * 2**30)
    assert whole.fits is False and whole.bottleneck == "memory (ranking)"  # the tables three times, and their index
    assert parted.fits is True
    assert parted.memory["tables"] * 64 == whole.memory["tables"] == 10**9 * 64 * 4
    assert parted.seconds["optimizer"] < whole.seconds["optimizer"]
    assert not plan_scale(replace(work, ranks=1), RATES).exchanged
    slow = plan_scale(replace(work, layout="row-wise"), replace(RATES, link=1e6))
    assert slow.bottleneck.startswith("exchange of")
    # With narrow rows a ranking needs less than a step.
    narrow = plan_scale(Workload(items=10**5, dimension=2, batch=65_536, history=200), RATES, 2**20)
    assert narrow.peak == sum(narrow.memory.values()) and narrow.bottleneck == "memory (process)"


def test_a_plan_that_fits_only_without_the_ranking_does_not_fit(tmp_path):
    """A hundred million items on ranks of 80 GiB: the gathered embeddings twice, and their index."""
    work = Workload(items=10**8, ranks=8, optimizer="rowwise-adagrad")
    plan = plan_scale(work, RATES, 80 * 2**30)
    throughout = sum(plan.memory[name] for name in ("process", "tables", "optimizer state", "layers and their state"))
    gathered = 3.75 * 10**8 * 64 * 4  # two copies; the index's copy, half of one in bfloat16, and a byte per value
    gradients = plan.ranking["gradients of the last step"]
    assert plan.peak == pytest.approx(throughout + gathered + gradients)
    assert 0 < gradients < plan.memory["gradients of tables"]
    assert plan.moments["step"] < 80 * 2**30 < plan.peak
    assert plan.fits is False and plan.bottleneck == "memory (ranking)"
    by_rows = plan_scale(replace(work, layout="row-wise"), RATES, 80 * 2**30)
    assert by_rows.fits and by_rows.moments["ranking"] == by_rows.peak
    on_cuda = plan_scale(replace(work, device="cuda"), RATES)
    assert plan.ranking["index"] - on_cuda.ranking["index"] == 0.5 * 10**8 * 64 * 4  # no bfloat16 estimates there
    written = tmp_path / "rates.json"
    written.write_text(json.dumps(vars(RATES)))
    words = ["plan", "--items", "1e8", "--ranks", "8", "--optimizer", "rowwise-adagrad", "--device-memory", "80"]
    result = CliRunner().invoke(app, [*words, "--rates", str(written)])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "bottleneck: memory (ranking)" in output and "available: 80.0 GiB: does NOT fit" in output
    found = json.loads(CliRunner().invoke(app, [*words, "--rates", str(written), "--json"]).output)
    assert found["fits"] is False and found["peak"] == found["moments"]["ranking"] == plan.peak


def test_settings_out_of_range():
    for changed in ({"items": 0}, {"batch": 1, "ranks": 2}):
        with pytest.raises(InputError, match="expected at least"):
            Workload(**{"items": 10, **changed})


def test_the_command(tmp_path):
    words = ["plan", "--items", "1e5", "--dimension", "8", "--batch", "64", "--ranks", "4", "--history", "5"]
    result = CliRunner().invoke(app, [*words, "--device-memory", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["moments"]["step"] == sum(found["memory"].values()) and found["step"] == sum(found["seconds"].values())
    assert found["peak"] == max(found["moments"].values())
    assert all(found["rates"][name] > 0 for name in ("products", "layers", "updates", "lookups", "link", "process"))
    assert "bottleneck" in found and found["fits"] in (True, False)
    table = CliRunner().invoke(app, [*words, "--layout", "row-wise", "--link", "10"])
    assert table.exit_code == 0 and "rows of tables" in table.output


def test_rates_of_another_machine(tmp_path):
    written = tmp_path / "rates.json"
    written.write_text(json.dumps({"rates": vars(RATES)}))
    words = ["plan", "--items", "1e9", "--ranks", "64", "--device", "cuda", "--link", "50", "--json"]
    result = CliRunner().invoke(app, [*words, "--rates", str(written)])
    assert json.loads(result.output)["rates"] == {**vars(RATES), "link": 50e9}
    written.write_text("{}")
    with pytest.raises(InputError, match="products"):
        read_rates(written)


def test_the_loopback_carries_bytes():
    rate, latency = _loopback()
    assert rate > 1e6 and 0 < latency < 1
