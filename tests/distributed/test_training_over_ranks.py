"""Tests that two ranks with B rows equal one with 2 B rows: losses, gradients, parameters, state after 20 steps."""

import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import cases

from distributed.starting import start
from twotower.distributed.communicator import Communicator, comes_from_exchange
from twotower.errors import RankLost

pytestmark = pytest.mark.timeout(1000)  # a busy machine


@pytest.fixture(scope="module")
def of_ranks(done_by_ranks):
    """Return the results of each rank by case: three processes run all cases, most of them as a group of two."""
    return {name: loaded(done_by_ranks, name, case) for name, case in cases.IN_GATE.items()}


def loaded(folder, name, case):
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(case.size)]


@cache
def trained_alone(case):
    return cases.train(case, Communicator())


def assert_same(found, expected, what):
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{what} {n}: {text}"
        )


@pytest.mark.parametrize("name", list(cases.IN_GATE))
def test_ranks_equal_one_process_with_all_their_rows(of_ranks, name):
    assert_equals_one_process(of_ranks[name], cases.IN_GATE[name])


@pytest.mark.slow
def test_ranks_with_torchrec_equal_one_process_in_all_cases(tmp_path):
    start("worker.py", str(tmp_path), "TorchRec")
    for name, case in cases.WITH_TORCHREC.items():
        found = loaded(tmp_path, name, case)
        assert_equals_one_process(found, case)
        assert [one["held"] for one in found] == [bytes_held(case, rank) for rank in range(case.size)], name


def assert_equals_one_process(of_each, case):
    alone = trained_alone(case)
    assert len(set(alone.losses)) == cases.STEPS
    assert min(float(g.abs().max()) for g in alone.last.values()) > 0  # no comparison of zeros
    for rank, found in enumerate(of_each):
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone.losses), rtol=0, atol=1e-5)
        for which in ("first", "last"):
            expected = getattr(alone, which)
            if case.engine == "torchrec":  # it sends the gradients of tables back without showing them
                expected = {name: value for name, value in expected.items() if name in found[which]}
                assert expected
            assert_same(found[which], expected, f"rank {rank}: {which} gradient of")
        assert_same(found["state"], alone.state, f"rank {rank}:")


def test_every_rank_has_the_same_model(of_ranks):
    for name, found in of_ranks.items():
        for other in found[1:]:
            for key, value in found[0]["state"].items():
                assert torch.equal(other["state"][key], value), f"{name}: {key}"


def test_each_rank_holds_its_part_of_a_sharded_table(of_ranks):
    for name, case in cases.IN_GATE.items():
        for rank, found in enumerate(of_ranks[name]):
            assert found["held"] == bytes_held(case, rank), (name, rank)


def bytes_held(case, rank):
    """Count the float32 values of tables and optimizer state on a rank."""
    words = dict.fromkeys(("item", "history", "query"), case.placement)
    if case.placement.startswith("{"):
        words = yaml.safe_load(case.placement)
    tables = {"item": cases.NUM_ITEMS, "query": cases.NUM_QUERIES}
    if any("share_table: false" in change for change in case.changes):
        tables["history"] = cases.NUM_ITEMS
    # TorchRec's planner puts the larger one first, and each on the rank with the least.
    holders = [name for name in ("history", "item", "query") if name in tables and words[name] == "table-wise"]
    numbers = 0
    for name, rows in tables.items():
        count = rows
        if words[name] == "row-wise":
            count = share(rows, case.size, rank)
        if words[name] == "table-wise":
            count = rows * (holders.index(name) == rank)
        numbers += count * 8 + (count if cases.ROWWISE[0] in case.changes else 2 * count * 8)
    return 4 * numbers


def share(count, size, rank):
    """Return a rank's share if every rank takes as many as the first, as long as any are left."""
    return len(range(count)[rank * math.ceil(count / size) :][: math.ceil(count / size)])


def test_shares_cover_everything_once():
    for size in (1, 2, 3, 7):
        for total in (0, 1, 5, 14, 100):
            parts = [Communicator(rank, size).part(total) for rank in range(size)]
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
            assert max(Communicator(0, size).shares(total)) - min(Communicator(0, size).shares(total)) <= 1


def test_a_single_process_exchanges_nothing():
    alone, rows = Communicator(), torch.arange(6.0).reshape(3, 2).requires_grad_()
    assert alone.gather_with_gradient(rows) is rows
    assert alone.gather(rows) is rows
    assert alone.sizes(4) == [4]
    assert torch.equal(alone.sum(rows), rows)
    assert not alone.agree(False)
    assert Communicator.current() == alone


def test_a_failed_exchange_is_a_lost_rank():
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]\n Connection closed by peer")
    message = r"rank 1 of 3: another rank is gone.*--max-restarts.*Connection closed"
    with pytest.raises(RankLost, match=message), Communicator(1, 3).exchange():
        raise closed
    assert comes_from_exchange(closed)
    assert comes_from_exchange(RuntimeError("NCCL communicator was aborted on rank 1"))
    assert not comes_from_exchange(RuntimeError("shapes do not fit"))
