"""Work on tables in TorchRec: steps with lookups that each rank draws for itself, saved and read by other ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard, placed_tables
from twotower.distributed.torchrec_tables import TorchRecTables
from twotower.towers import EmbeddingTable
from twotower.training import TableOptimizer
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.checkpoint.parts import cut_optimizer_state, mark_parts
from twotower.training.gradient_sync import GradientExchange
from twotower.training.optimizer import parameter_groups

#: Rows of each table; not divisible by the number of ranks.
SIZES, WIDTH = {"item": 61, "query": 7}, 12
#: Steps before and after a checkpoint.
BEFORE, AFTER = 6, 3


def parts(ranks: Communicator) -> dict[str, RowShard]:
    """Return rows of one table, and the other one whole on the last rank."""
    return {"item": RowShard(ranks, SIZES["item"]), "query": RowShard(ranks, SIZES["query"], ranks.size - 1)}


def tables(ranks: Communicator, *, engine: bool) -> nn.ModuleDict:
    torch.manual_seed(11)
    placed = parts(ranks) if ranks.size > 1 else {}
    with placed_tables(placed, TorchRecTables(placed, WIDTH) if engine else None):
        return nn.ModuleDict({name: EmbeddingTable(rows, WIDTH, name=name) for name, rows in SIZES.items()})


def rate(step: int) -> float:
    return 0.3 / (1 + step)


def lookups(step: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw codes, with repeats, and the gradient of each lookup; sometimes a rank looks nothing up in a table."""
    random = np.random.default_rng([step, rank])
    found = {}
    for name, rows in SIZES.items():
        count = int(random.integers(0, 30)) * (0 if (step + rank) % 3 == 0 and name == "query" else 1)
        codes = torch.from_numpy(random.integers(0, rows, count))
        found[name] = codes, torch.from_numpy(random.normal(size=(count, WIDTH)).astype(np.float32))
    return found


def train(model: nn.ModuleDict, made: TableOptimizer, ranks: Communicator, steps: range) -> None:
    exchange = GradientExchange(model, ranks)
    engine = model["item"].engine
    for step in steps:
        for group in made.param_groups:
            group["lr"] = rate(step)
        drawn = lookups(step, ranks.rank)
        found = engine.fetch({name: codes for name, (codes, _) in drawn.items()})
        for name, (codes, gradient) in drawn.items():
            model[name].fetched = found[name]
            half = len(codes) // 2  # two lookups of one fetch
            for places in (slice(0, half), slice(half, None)):
                (model[name](codes[places]) * gradient[places]).sum().backward()
        exchange.sum_gradients()
        made.step()


def expected(sizes: dict[range, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute tables and sums of squares in float64, row by row, for steps over so many ranks."""
    whole = {name: table.weight.detach().double() for name, table in tables(Communicator(), engine=False).items()}
    sums = {name: torch.zeros(rows, dtype=torch.float64) for name, rows in SIZES.items()}
    for steps, size in sizes.items():
        for step in steps:
            drawn = [lookups(step, rank) for rank in range(size)]
            for name, rows in SIZES.items():
                for row in range(rows):
                    own = [g[codes == row].double().sum(0) for codes, g in (one[name] for one in drawn)]
                    gradient = torch.stack(own).sum(0)
                    if not bool((gradient != 0).any()):
                        continue
                    sums[name][row] += (gradient**2).mean()
                    whole[name][row] -= rate(step) * gradient / (sums[name][row].sqrt() + 1e-8)
    return {name: (whole[name], sums[name]) for name in SIZES}


def optimizer(model: nn.Module) -> TableOptimizer:
    return TableOptimizer(parameter_groups(model, 0.0, lr=1.0, table_rule="rowwise-adagrad"), lr=1.0)


def state(model: nn.Module, made: TableOptimizer) -> dict[str, object]:
    return {"state_dict": model.state_dict(), "optimizer_states": [made.state_dict()]}


def work(ranks: Communicator, out: Path) -> None:
    model = tables(ranks, engine=True)
    built_in = tables(ranks, engine=False)
    assert all(torch.equal(model[name].weight, built_in[name].weight) for name in SIZES), "initial values"
    made = optimizer(model)
    train(model, made, ranks, range(BEFORE))
    kept = state(model, made)
    mark_parts(kept, model, [made])
    SafeCheckpointIO(ranks, parts(ranks)).save_checkpoint(kept, out / f"torchrec.{ranks.size}.ckpt")
    alone(model, made, ranks)
    # Two ranks continue what two have saved; then three ranks continue it.
    read = SafeCheckpointIO(ranks, parts(ranks)).load_checkpoint(out / "torchrec.2.ckpt")
    again = tables(ranks, engine=True)
    other = optimizer(again)
    again.load_state_dict(read["state_dict"])
    cut_optimizer_state(read["optimizer_states"][0], other, again)
    other.load_state_dict(read["optimizer_states"][0])
    train(again, other, ranks, range(BEFORE, BEFORE + AFTER))
    sums = {name: other.state[again[name].weight]["sum"] for name in SIZES}
    assert all(sums[name] is again[name].engine.accumulator(name) for name in SIZES)
    assert all(float(other.state[again[name].weight]["step"]) == BEFORE + AFTER for name in SIZES)
    whole = {name: (ranks.gather(again[name].weight), ranks.gather(sums[name])) for name in SIZES}
    torch.save(whole, out / f"continued.{ranks.size}.{ranks.rank}.pt")


def alone(model: nn.ModuleDict, made: TableOptimizer, ranks: Communicator) -> None:
    """Check lookups without a gradient, a copy of the model, a wrong code, and weights that were replaced."""
    before = {name: ranks.gather(model[name].weight.detach()) for name in SIZES}
    copied = copy.deepcopy(model)
    assert copied["item"].engine is None and model["item"].engine is not None
    with torch.no_grad():
        for table in (model["item"], copied["item"]):
            table.fetch(torch.tensor([60, 3, 3]))
            assert torch.equal(table(torch.tensor([3, 60])), before["item"][[3, 60]])
            table.release()
        copied["item"].weight.zero_()
    assert torch.equal(ranks.gather(model["item"].weight.detach()), before["item"])
    held = model["query"].weight.data
    model["query"].weight.data = held.clone()
    message = None
    try:
        made.step()
    except RuntimeError as error:
        message = str(error)
    # A rank without rows has nothing to compare.
    assert (message is None) == (len(held) == 0) or (message or "").startswith("table query: TorchRec updates"), message
    model["query"].weight.data = held
