"""Tests of tables in TorchRec: updates against float64 loops, checkpoints, the choice of the engine, the planner."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

import cases
import engine_rows
from engine_rows import AFTER, BEFORE, SIZES

from twotower.cli.main import app
from twotower.distributed import torchrec_tables
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.torchrec_tables import plan_tables
from twotower.errors import InputError
from twotower.system import hardware
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.placement import place_tables

pytestmark = pytest.mark.timeout(1000)  # a busy machine


@pytest.mark.parametrize("size", [2, 3])
def test_updates_equal_loops_in_float64(done_by_ranks, size):
    """A checkpoint of two or three ranks is read by one process; steps differ in their learning rates."""
    read = SafeCheckpointIO().load_checkpoint(done_by_ranks / f"torchrec.{size}.ckpt")
    expected = engine_rows.expected({range(BEFORE): size})
    states = read["optimizer_states"][0]["state"]
    for number, (name, (weight, sums)) in enumerate(expected.items()):
        found = read["state_dict"][f"{name}.weight"].double()
        torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(states[number]["sum"].double(), sums, rtol=1e-6, atol=1e-6)
        assert float(states[number]["step"]) == BEFORE
        assert bool((weight != engine_rows.expected({})[name][0]).any(1).sum() > len(weight) // 2)


@pytest.mark.parametrize("size", [2, 3])
def test_another_number_of_ranks_continues_with_the_state(done_by_ranks, size):
    expected = engine_rows.expected({range(BEFORE): 2, range(BEFORE, BEFORE + AFTER): size})
    for rank in range(size):
        found = torch.load(done_by_ranks / f"continued.{size}.{rank}.pt", weights_only=True)
        for name in SIZES:
            for value, other in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(value.detach().double(), other, rtol=1e-6, atol=1e-6)


@pytest.fixture
def choose(monkeypatch):
    """Return a function that places the tables of the second of two ranks."""
    data = cases.interactions()
    monkeypatch.setattr("twotower.training.placement.least_of_all", lambda found, ranks: found)

    def place(*changes, on_cuda=False, available=None, size=2):
        free = hardware.Memory(None, available, None, None, None)
        monkeypatch.setattr(hardware, "memory", lambda processes=1: free)
        monkeypatch.setattr(hardware, "device_memory", lambda accelerator: 1 << 30 if on_cuda else None)
        config = cases.Config.load(None, ["item_tower.dimension=8", "query_tower.id_embedding=true", *changes])
        return place_tables(config.resolved(len(data)), data, Communicator(1, size))

    return place


ROWWISE = cases.ROWWISE[0]
ROWS, BY_TABLE = (f"training.table_placement={how}" for how in ("row-wise", "table-wise"))
TORCHREC, BUILTIN = (f"training.table_engine={which}" for which in ("torchrec", "builtin"))


def test_auto_is_the_faster_engine_that_supports_the_settings(choose, monkeypatch):
    assert choose(ROWS, ROWWISE).engine == "builtin"
    assert "faster" in str(choose(ROWS, ROWWISE))
    assert choose(ROWS, ROWWISE, TORCHREC).engine == choose(BY_TABLE, ROWWISE).engine == "torchrec"
    assert choose(BY_TABLE, ROWWISE).parts["query"] == RowShard(Communicator(1, 2), cases.NUM_QUERIES, 1)
    monkeypatch.setattr(torchrec_tables, "cuda_fault", lambda: None)
    found = choose(ROWS, ROWWISE, on_cuda=True)
    assert found.engine == "torchrec" and "(on CUDA)" in str(found)
    found = choose(ROWS, on_cuda=True)
    assert found.engine == "builtin" and "not TorchRec: FBGEMM has no Adam on a CPU" in str(found)
    assert choose(ROWS, ROWWISE, BUILTIN, on_cuda=True).engine == "builtin"
    monkeypatch.undo()


def test_the_build_for_cpus_is_not_used_on_cuda(choose):
    found = choose(ROWS, ROWWISE, on_cuda=True)
    assert found.engine == "builtin" and "build for CPUs" in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            (ROWS, TORCHREC),
            r"FBGEMM has no Adam .*training.table_optimizer=rowwise-adagrad, or training.table_engine",
        ),
        ((BY_TABLE,), r"table-wise needs TorchRec: FBGEMM has no Adam .*rowwise-adagrad, or row-wise$"),
        ((BY_TABLE, ROWWISE, BUILTIN), r"table-wise needs TorchRec; use row-wise, or training.table_engine=torchrec$"),
        ((ROWS, ROWWISE, TORCHREC, "item_tower.table_precision=bfloat16"), r"use item_tower.table_precision=float32"),
        ((ROWS, ROWWISE, TORCHREC, "item_tower.dimension=10"), r"multiple of 4; use item_tower.dimension=12"),
    ],
)
def test_what_torchrec_does_not_support_is_rejected(choose, changes, message):
    with pytest.raises(InputError, match=message) as found:
        choose(*changes)
    assert "\n" not in str(found.value)
    assert choose(*changes, size=1).parts == {}  # a single process has whole tables


def test_without_torchrec(choose, monkeypatch):
    monkeypatch.setattr(torchrec_tables, "is_installed", lambda: False)
    with pytest.raises(InputError, match=r"training.table_engine=torchrec: it is not installed; use pip install"):
        choose(ROWS, ROWWISE, TORCHREC)
    with pytest.raises(InputError, match=r"table-wise needs TorchRec: it is not installed.*, or row-wise$"):
        choose(BY_TABLE, ROWWISE)
    assert "not TorchRec: it is not installed" in str(choose(ROWS, ROWWISE, on_cuda=True))
    torchrec_tables.library.cache_clear()
    with pytest.raises(InputError, match="not installed.*training.table_engine=builtin"):
        torchrec_tables.library()
    torchrec_tables.library.cache_clear()


def test_the_planner_decides_where_tables_go_that_do_not_fit(choose, monkeypatch):
    monkeypatch.setattr("twotower.training.placement.SHARED_ABOVE", 0)
    each = (cases.NUM_ITEMS + cases.NUM_QUERIES) * 9 * 4
    assert choose(ROWWISE, TORCHREC, available=1 << 40).parts == {}
    parts = choose(ROWWISE, TORCHREC, available=2 * each - 1).parts
    assert parts.keys() == {"item", "query"}
    with pytest.raises(InputError, match=r"a rank's part of tables"):
        choose(ROWWISE, TORCHREC, available=each // 3)


def plan(tables, ways, memory=None, size=64, **more):
    return plan_tables(
        tables, 64, dict.fromkeys(tables, ways), size=size, lookups=50_000, device="cuda", memory=memory, **more
    )


def test_the_planner_shards_what_no_device_holds():
    tables, limit = {"item": 10**9, "query": 1000}, 80 << 30
    found = plan(tables, ("replicated", "table-wise", "row-wise"), limit, local_size=8)
    assert found["item"].way == "row-wise"
    assert found["item"].bytes_per_rank == pytest.approx(10**9 * 65 * 4 / 64, rel=0.05)
    assert plan(tables, ("replicated", "table-wise"), limit) is None
    by_table = plan({"a": 10**6, "b": 10**6, "c": 10}, ("table-wise",), size=2)
    assert {by_table["a"].holder, by_table["b"].holder} == {0, 1}
    part = by_table["a"].part(Communicator(0, 2), 10**6)
    assert part == RowShard(Communicator(0, 2), 10**6, by_table["a"].holder)
    assert plan({"a": 5}, ("replicated",), size=2)["a"].part(Communicator(0, 2), 5) is None


def test_the_plan_of_a_billion_items_is_the_planners(tmp_path):
    rates = {"products": 1e13, "layers": 1e13, "updates": 1e10, "lookups": 5e10, "link": 25e9, "latency": 3e-5}
    (tmp_path / "rates.json").write_text(json.dumps({**rates, "process": 1e9}))
    words = ["plan", "--items", "1e9", "--batch", "65536", "--ranks", "64", "--device", "cuda", "--device-memory", "80"]
    words += ["--layout", "auto", "--rates", str(tmp_path / "rates.json")]
    rowwise = ["--optimizer", "rowwise-adagrad"]
    found = json.loads(CliRunner().invoke(app, [*words, *rowwise, "--json"]).output)
    assert found["workload"]["layout"] == found["planned"]["item"]["way"] == "row-wise"
    assert found["fits"] and found["planned"]["item"]["bytes_per_rank"] == pytest.approx(
        found["memory"]["tables"] + found["memory"]["optimizer state"], rel=0.05
    )
    shown = CliRunner().invoke(app, [*words, *rowwise])
    assert shown.exit_code == 0 and "TorchRec's plan" in shown.output and "row-wise" in shown.output
    for more, message in (
        ([], "--optimizer rowwise-adagrad"),
        ([*rowwise, "--device-memory", "2"], "no placement fits"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)


def test_the_import_leaves_the_loggers_as_they_are():
    handlers = list(logging.getLogger().handlers)
    torchrec_tables.library()
    plan({"a": 100}, ("row-wise",), size=2)
    assert logging.getLogger().handlers == handlers and logging.getLogger().manager.disable == 0
