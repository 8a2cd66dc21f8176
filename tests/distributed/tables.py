"""Work on sharded tables: saved, read by another number of ranks, searched, written as a model."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # once, before the ranks are forked
from torch import Tensor

from twotower import evaluation
from twotower.config.run import Config
from twotower.data import Split, leave_last_out
from twotower.distributed import communicator
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard, placed_tables
from twotower.distributed.row_exchange import scatter_gradients
from twotower.distributed.row_files import write_folder
from twotower.errors import InputError
from twotower.negatives import HardNegatives
from twotower.objectives.build import build_objective
from twotower.ranking.distributed import ShardedRanker, own_item_embeddings
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run.mining import refresh_hard_negatives
from twotower.serving import SavedModel
from twotower.towers import TwoTower, build_towers
from twotower.training import TableOptimizer
from twotower.training.checkpoint import io as checkpoint_io
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.checkpoint.parts import cut_optimizer_state, mark_parts
from twotower.training.optimizer import parameter_groups

PLACEMENTS = ("row-wise", "by table")
ELSEWHERE = "another rank could not write its part; nothing was replaced"
CONFIG = Config.load(
    None,
    [
        "item_tower.dimension=8",
        "query_tower.id_embedding=true",
        "query_tower.hidden=[12]",
        f"query_tower.history={{length: {cases.LENGTH}, heads: 2}}",
        "evaluation.baselines=false",
    ],
)

MINED = Config.load(None, ["objective.sources=[{mined: {size: 5}}, {uniform: {size: 4}}]"])


def split() -> Split:
    return leave_last_out(cases.interactions())


def parts(ranks: Communicator, placement: str) -> dict[str, RowShard]:
    """Return a rank's parts of the tables; a single process has whole tables."""
    items, queries = cases.NUM_ITEMS, cases.NUM_QUERIES
    made: dict[str, dict[str, RowShard]] = {
        "row-wise": {"item": RowShard(ranks, items), "query": RowShard(ranks, queries)},
        "by table": {"item": RowShard(ranks, items, ranks.size - 1), "query": RowShard(ranks, queries)},
    }
    return made[placement] if ranks.size > 1 else {}


def model(ranks: Communicator, placement: str = "row-wise", seed: int = 5) -> TwoTower:
    """Build towers with the same weights for every placement of tables."""
    torch.manual_seed(seed)
    with placed_tables(parts(ranks, placement)):
        return build_towers(
            CONFIG,
            num_queries=cases.NUM_QUERIES,
            num_items=cases.NUM_ITEMS,
            trained_queries=torch.arange(cases.NUM_QUERIES) % 3 != 1,
        ).eval()


def optimizer(towers: TwoTower, rule: str) -> TableOptimizer:
    """Build an optimizer whose state depends on the parameters, after a step on all rows; collective."""
    made = TableOptimizer(parameter_groups(towers, 0.0, lr=0.01, table_rule=rule), lr=0.01)
    for parameter in towers.parameters():
        parameter.grad = parameter.detach().clone()
    made.step()
    return made


def checkpoint(towers: TwoTower, made: TableOptimizer) -> dict[str, Any]:
    return {"state_dict": towers.state_dict(), "optimizer_states": [made.state_dict()], "epoch": 3}


def tensors(kept: dict[str, Any]) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, by name."""
    states = kept["optimizer_states"][0]["state"]
    named = {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}
    return {**kept["state_dict"], **named}


def searched(ranker: Any) -> dict[str, Any]:
    """Rank and evaluate with ties: three items have exactly the same embedding."""
    held = split()
    measured = evaluation.evaluate(ranker, held.test, train=held.train, ks=(3, 70), baselines=False)
    more = {"few": ranker.rank(held.test, 2, False), "all": ranker.rank(held.test, 70, True)}
    return {"measured": measured["model"].values, **{name: torch.as_tensor(value) for name, value in more.items()}}


def with_ties(towers: TwoTower) -> TwoTower:
    """Give distant items the same embedding, each on the rank that holds it."""
    table = towers.item_tower.ids
    rows = slice(0, cases.NUM_ITEMS) if table.part is None else table.part.own
    with torch.no_grad():
        for code in (4, 31, 59):
            if rows.start <= code < rows.stop:
                table.weight[code - rows.start] = torch.linspace(-1, 1, 8)
    return towers


def artifact(towers: TwoTower, item_embeddings: Tensor) -> SavedModel:
    data = cases.interactions()
    return SavedModel(
        config=CONFIG,
        towers=towers,
        item_embeddings=item_embeddings,
        item_counts=torch.from_numpy(data.item_counts()),
        queries=data.queries,
        items=data.items,
        history_offsets=data.offsets,
        history_items=np.asarray(data.item_codes),
        metadata={"data": {"fingerprint": "x"}},
    )


def work(ranks: Communicator, out: Path) -> None:
    """Run one rank of two or three; three ranks read what two have written, and the other way round."""
    for rule in ("adam", "rowwise-adagrad"):
        for placement in PLACEMENTS:
            save(ranks, rule, placement, out)
        for number, placement in enumerate(PLACEMENTS):
            # Files of two ranks are read by two, by three and by the test; files of three by the test.
            for written in (placement, PLACEMENTS[number - 1]):
                read(ranks, rule, placement, out / f"{rule}.{written}.2.ckpt")
    for placement in PLACEMENTS:
        torch.save(moved(model(ranks, placement), ranks), out / f"moved.{placement}.{ranks.size}.{ranks.rank}.pt")
        towers, end = with_ties(model(ranks, placement)), f"{placement}.{ranks.size}"
        torch.save(searched(ShardedRanker(towers, cases.LENGTH, ranks)), out / f"searched.{end}.{ranks.rank}.pt")
        torch.save(mined(towers), out / f"mined.{end}.{ranks.rank}.pt")
        own = own_item_embeddings(towers, RowShard(ranks, cases.NUM_ITEMS))
        artifact(towers, own).save(out / f"model.{end}", ranks)
    fail_together(ranks, out / f"folder-{ranks.size}")


def save(ranks: Communicator, rule: str, placement: str, out: Path) -> None:
    towers = model(ranks, placement)
    made = optimizer(towers, rule)
    kept = checkpoint(towers, made)
    mark_parts(kept, towers, [made])
    io = SafeCheckpointIO(ranks, parts(ranks, placement))
    io.save_checkpoint(kept, out / f"{rule}.{placement}.{ranks.size}.ckpt")
    assert all(isinstance(value, Tensor) for state in made.state.values() for value in state.values())
    if placement == PLACEMENTS[0]:
        saved_beside(ranks, towers, made, out / f"beside.{rule}.{ranks.size}.ckpt")


def read(ranks: Communicator, rule: str, placement: str, path: Path) -> None:
    """Load a rank's parts from a checkpoint of two ranks, and from a state that was saved whole."""
    towers = model(ranks, placement)
    made = optimizer(towers, rule)
    expected = {name: value.clone() for name, value in tensors(checkpoint(towers, made)).items()}
    io = SafeCheckpointIO(ranks, parts(ranks, placement))
    found = tensors(io.load_checkpoint(path))
    assert found.keys() == expected.keys()
    assert all(is_same(found[name], value) for name, value in expected.items()), (path, placement)
    assert io.load_weights(path).keys() == towers.state_dict().keys()
    alone = model(Communicator())
    whole = optimizer(alone, rule).state_dict()
    cut_optimizer_state(whole, made, towers)
    made.load_state_dict(whole)
    towers.load_state_dict(alone.state_dict())
    again = tensors(checkpoint(towers, made))
    assert all(is_same(again[name], value) for name, value in expected.items()), (rule, placement)


def moved(towers: TwoTower, ranks: Communicator) -> dict[str, int]:
    """Return the larger of bytes sent and received by this rank, when each rank looks up every item."""
    table, numbers = towers.item_tower.ids, {"rows": 0, "gradients": 0}
    swap, gather = dist.all_to_all_single, communicator._all_gather

    def counted_swap(found: Tensor, given: Tensor, received: Any = None, sent: Any = None, **options: Any) -> None:
        if sent is not None:
            each = given.element_size() * (given[0].numel() if len(given) else found[0].numel() if len(found) else 0)
            numbers[what] += each * max(sum(sent) - sent[ranks.rank], sum(received) - received[ranks.rank])
        swap(found, given, received, sent, **options)

    def counted_gather(found: Tensor, given: Tensor, **options: Any) -> None:
        numbers[what] += given.nbytes * (ranks.size - 1) * (len(given) > 1)
        gather(found, given, **options)

    dist.all_to_all_single, communicator._all_gather = counted_swap, counted_gather
    what = "rows"
    table.fetch(torch.arange(cases.NUM_ITEMS))
    assert table.fetched is not None and table.part is not None
    what = "gradients"
    scatter_gradients(table.fetched, table.part)
    table.release()
    dist.all_to_all_single, communicator._all_gather = swap, gather
    return numbers


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Compare bit by bit, except for sums over ranks, whose order differs."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-7)


def saved_beside(ranks: Communicator, towers: TwoTower, made: TableOptimizer, path: Path) -> None:
    """Write in the background while weights and state change and ranks exchange; then one rank fails to write."""
    io = SafeCheckpointIO(ranks, parts(ranks, PLACEMENTS[0]), in_background=True, timeout=60)
    before = {name: value.clone() for name, value in tensors(checkpoint(towers, made)).items()}
    release, write = threading.Event(), checkpoint_io.save_parts

    def held(*given: Any) -> None:
        assert release.wait(60)
        write(*given)

    def fails(*given: Any) -> None:
        if ranks.rank == ranks.size - 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint_io.save_parts = held
    kept = checkpoint(towers, made)
    mark_parts(kept, towers, [made])
    io.save_checkpoint(kept, path)
    with torch.no_grad():  # a step
        for value in tensors(checkpoint(towers, made)).values():
            value.add_(ranks.sum(torch.ones(3))[0] == ranks.size)
    assert not path.exists()
    release.set()
    io.settle()
    assert path.exists(), "every rank sees the checkpoint"
    found = tensors(io.load_checkpoint(path))
    assert all(torch.equal(found[name], value) for name, value in before.items()), "the state of the requested step"
    checkpoint_io.save_parts = fails
    io.save_checkpoint(kept, path)
    message = None
    try:
        io.save_checkpoint(kept, path)
    except InputError as error:
        message = str(error)
    full = f"{path}: cannot be written, the disk is full ([Errno {errno.ENOSPC}] No space left on device)"
    assert message is not None and message.startswith(
        full if ranks.rank == ranks.size - 1 else f"{path}: {ELSEWHERE}"
    ), message
    checkpoint_io.save_parts = write
    io.settle()
    io.close()
    assert found.keys() == tensors(SafeCheckpointIO(ranks, io.parts).load_checkpoint(path)).keys()
    with torch.no_grad():
        for name, value in tensors(checkpoint(towers, made)).items():
            value.copy_(before[name])


def fail_together(ranks: Communicator, target: Path) -> None:
    """Let the last rank fail to write: every rank raises, and no file appears."""
    target.mkdir(exist_ok=True)
    (target / "older").write_text("stays")

    def write(folder: Path) -> None:
        (folder / str(ranks.rank)).write_text("x")
        if ranks.rank == ranks.size - 1:
            raise OSError("no space left")

    message = None
    try:
        write_folder(target, ranks, write)
    except InputError as error:
        message = str(error)
    ranks.wait()
    full = f"{target}: cannot be written, the disk is full (no space left); free space, or write elsewhere"
    assert message == (full if ranks.rank == ranks.size - 1 else f"{target}: {ELSEWHERE}"), message
    assert [path.name for path in target.iterdir()] == ["older"]
    assert not list(target.parent.glob(f".{target.name}*"))


def mined(towers: TwoTower) -> Tensor:
    """Mine the hard negatives of all queries, int32 [Q, 5]; queries with many items have few left."""
    objective = build_objective(MINED, cases.interactions())
    refresh = refresh_hard_negatives(objective, cases.interactions(), cases.LENGTH)
    assert refresh is not None
    refresh(towers)
    (source,) = (one for one in objective.pool.members() if isinstance(one, HardNegatives))
    return source.items


def ranked_alone() -> dict[str, Any]:
    return searched(TowerRanker(with_ties(model(Communicator())), cases.LENGTH))
