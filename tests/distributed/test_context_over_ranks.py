"""Tests that two ranks with request context train and rank like one process. The file starts itself as the ranks."""

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # once, before the ranks are forked
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from cases import IN_BATCH, UNIFORM, objective, sequences, whole
from starting import run_ranks, start

from twotower.config.run import Config
from twotower.data import Interactions, SequenceBatches, TrainingBatches, leave_last_out
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import placed_tables
from twotower.features.from_config import encode_context, encode_features
from twotower.objectives.build import build_objective
from twotower.ranking.distributed import ShardedRanker, over_ranks
from twotower.ranking.tower_ranker import TowerRanker
from twotower.towers import build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.gradient_sync import GradientExchange
from twotower.training.optimizer import parameter_groups
from twotower.training.placement import place_tables
from twotower.training.seeds import draws_of

pytestmark = pytest.mark.timeout(1000)  # a busy machine

RANKS, LENGTH = 2, 4
COLUMNS = ("device", "tags", "price", "at")
SETTINGS = [
    "query_tower.context=[{column: device, kind: categorical}, {column: tags, kind: multi}, "
    "{column: price, kind: numeric}, {column: at, kind: timestamp, parts: [hour]}]",
    f"query_tower.history={{length: {LENGTH}, heads: 2, dropout: 0}}",
    "query_tower.hidden=[12]",
    "query_tower.dropout=0",
    "query_tower.context_dropout=0",
    "item_tower.dimension=8",
    "training.batch_size=12",
    "training.warmup_steps=2",
    *objective("expected-count", IN_BATCH, UNIFORM, unique=True),
]


@dataclass(frozen=True)
class Case:
    """Variant of a training run: sparse gradients, rows per tower pass, sharded tables, settings."""

    sparse: bool = False
    micro_batch: int | None = None
    shared: bool = False
    changes: tuple[str, ...] = ()


CASES = {
    "plain": Case(),
    "sparse, micro-batch": Case(sparse=True, micro_batch=4),
    "by rows": Case(True, shared=True),
    "beside sequences, by rows": Case(
        True,
        shared=True,
        changes=(
            *sequences("kind: gru"),
            "objective.rows_per_draw=5",
            *objective("expected-count", UNIFORM, unique=True),
        ),
    ),
}


@cache
def split():
    random, rows = np.random.default_rng(0), 400
    frame = pl.DataFrame({
        "user_id": random.integers(0, 30, rows),
        "item_id": np.r_[np.arange(50), random.integers(0, 50, rows - 50)],
        "timestamp": np.arange(rows),
        "device": [("phone", "desk", None)[n] for n in random.integers(0, 3, rows)],
        "tags": [["a", "b", "c"][: int(n)] for n in random.integers(0, 4, rows)],
        "price": random.random(rows),
        "at": random.integers(1_600_000_000, 1_700_000_000, rows),
    })  # fmt: skip
    return leave_last_out(Interactions.from_frame(frame, context=list(COLUMNS)))


def work(case, ranks):
    """Return a rank's ranking of the test queries with initial weights, and a run's losses, gradients and state."""
    data = split().train
    placement = f"training.table_placement={'row-wise' if case.shared else 'replicated'}"
    config = Config.load(None, [*SETTINGS, *case.changes, placement]).resolved(len(data))
    context = encode_features(config, data)["context"]
    torch.manual_seed(3)
    with placed_tables(place_tables(config, data, ranks).parts):
        towers = build_towers(config, num_queries=data.num_queries, num_items=data.num_items, context=context)
    for module in towers.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = case.sparse
    by_rows = case.shared and ranks.size > 1
    ranker = ShardedRanker(towers, LENGTH, ranks) if by_rows else over_ranks(TowerRanker(towers, LENGTH), ranks)
    test = split().test
    found = {
        "ranked": torch.from_numpy(ranker.rank(test, 10, True)),
        "without": torch.from_numpy(ranker.rank(replace(test, context=None), 10, True)),
    }
    goal = build_objective(config, data).train()
    model = nn.ModuleDict({"towers": towers.train(), "objective": goal})
    optimizer = TableOptimizer(parameter_groups(model, 0.01, lr=2e-3), lr=2e-3)
    exchange, losses = GradientExchange(model, ranks), []
    made = batches(config, data, ranks, encode_context(context.features, data))
    for step, batch in enumerate(made):
        options = {"micro_batch": case.micro_batch, "generator": draws_of(0, step, "cpu")}
        loss, _, _ = compute_loss(towers, goal, batch, ranks, **options)
        optimizer.zero_grad()
        loss.backward()
        exchange.sum_gradients()
        losses.append(float(ranks.sum(loss)))
        gradients = {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}
        found[f"gradients of step {step}"] = whole(gradients, towers, ranks)
        optimizer.step()
    found["state"] = whole({name: value.clone() for name, value in model.state_dict().items()}, towers, ranks)
    return found | {"losses": torch.tensor(losses)}


def batches(config, data, ranks, context):
    """Yield ten batches, an odd one, and one of a single row or sequence, which leaves one rank without rows."""
    if config.reads_sequences:
        windows = SequenceBatches(data, 24, history_length=LENGTH, ranks=ranks, context=context)
        order = np.random.default_rng(1).permutation(windows.num_windows)
        return [windows.batch(numbers) for numbers in (*np.split(order[:50], 10), order[50:57], order[57:58])]
    source = TrainingBatches(data, 12, history_length=LENGTH, ranks=ranks, context=context)
    order = np.random.default_rng(1).permutation(len(data))
    return [source.part(rows) for rows in (*np.split(order[:120], 10), order[120:127], order[127:128])]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("context")
    start("test_context_over_ranks.py", str(out))
    return {name: [torch.load(out / f"{name}.{rank}.pt", weights_only=True) for rank in range(RANKS)] for name in CASES}


@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_equal_one_process(of_ranks, name):
    alone = work(CASES[name], Communicator())
    gradients = alone["gradients of step 9"]
    of_context = [key for key in gradients if ".context." in key]
    assert len(of_context) == 2, "device and tags each have a table"
    assert all(float(gradients[key].abs().max()) > 1e-4 for key in of_context)
    for rank, found in enumerate(of_ranks[name]):
        assert found.keys() == alone.keys()
        for what, expected in alone.items():
            torch.testing.assert_close(
                found[what], expected, rtol=0, atol=1e-5, msg=lambda text, w=what, r=rank: f"rank {r}, {w}: {text}"
            )


def test_every_query_is_ranked_in_its_own_context(of_ranks):
    for found in (one for case in of_ranks.values() for one in case):
        assert found["ranked"].shape == (len(split().test), 10)
        assert float((found["ranked"] != found["without"]).float().mean()) > 0.4


def work_on_all(out):
    for name, case in CASES.items():
        torch.save(work(case, Communicator.current()), out / f"{name}.{dist.get_rank()}.pt")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    sys.exit(run_ranks(RANKS, out, lambda: work_on_all(out)) != 0)
