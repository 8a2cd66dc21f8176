"""What is done with tables that ranks share: kept, read by another number of ranks, searched, written as a model."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
import torch.distributed.checkpoint  # once, before the ranks are forked
from torch import Tensor

from twotower import evaluation
from twotower.build import build_objective
from twotower.config import Config
from twotower.data import Split, leave_last_out
from twotower.errors import InputError
from twotower.evaluation.by_parts import ShardedRanker, own_item_embeddings
from twotower.evaluation.towers import TowerRanker
from twotower.negatives import Mined
from twotower.ranks import Ranks
from twotower.run.mining import miner
from twotower.serving import Artifact
from twotower.shared_files import write_folder
from twotower.towers import TwoTower, build_towers
from twotower.towers.shards import Part, shared_tables
from twotower.training import TableOptimizer, checkpoints
from twotower.training.checkpoints import SafeCheckpointIO
from twotower.training.optimizers import parameter_groups
from twotower.training.table_parts import cut_optimizer_state, mark_parts

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


def model(ranks: Ranks, seed: int = 5) -> TwoTower:
    """The same weights however the tables are placed."""
    torch.manual_seed(seed)
    with shared_tables(ranks):
        return build_towers(CONFIG, num_queries=cases.NUM_QUERIES, num_items=cases.NUM_ITEMS).eval()


def optimizer(towers: TwoTower, rule: str) -> TableOptimizer:
    """An optimizer whose state is a function of the parameters, after a step with gradients of all rows."""
    made = TableOptimizer(parameter_groups(towers, 0.0, lr=0.01, table_rule=rule), lr=0.01)
    for parameter in towers.parameters():
        parameter.grad = parameter.detach().clone()
    made.step()
    return made


def checkpoint(towers: TwoTower, made: TableOptimizer) -> dict[str, Any]:
    return {"state_dict": towers.state_dict(), "optimizer_states": [made.state_dict()], "epoch": 3}


def tensors(kept: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name."""
    states = kept["optimizer_states"][0]["state"]
    named = {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}
    return {**kept["state_dict"], **named}


def cut(found: dict[str, Tensor], towers: TwoTower, ranks: Ranks) -> dict[str, Tensor]:
    """Of whole tensors what this rank should have."""
    rows = {cases.NUM_ITEMS, cases.NUM_QUERIES}
    return {n: v[Part(ranks, len(v)).own] if v.ndim and len(v) in rows else v for n, v in found.items()}


def searched(ranker: Any) -> dict[str, Any]:
    """What a ranker ranks and how it is measured, with ties: three items have the very same embedding."""
    held = split()
    measured = evaluation.evaluate(ranker, held.test, train=held.train, ks=(3, 70), baselines=False)
    more = {"few": ranker.rank(held.test, 2, False), "all": ranker.rank(held.test, 70, True)}
    return {"measured": measured["model"].values, **{name: torch.as_tensor(value) for name, value in more.items()}}


def with_ties(towers: TwoTower) -> TwoTower:
    """Items far apart get the embedding of one another; each on the rank that holds it."""
    table = towers.item_tower.ids
    start, stop = (0, cases.NUM_ITEMS) if table.part is None else (table.part.own.start, table.part.own.stop)
    with torch.no_grad():
        for code in (4, 31, 59):
            if start <= code < stop:
                table.weight[code - start] = torch.linspace(-1, 1, 8)
    return towers


def artifact(towers: TwoTower, item_embeddings: Tensor) -> Artifact:
    data = cases.interactions()
    return Artifact(
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


def work(ranks: Ranks, out: Path) -> None:
    """One rank of two or three; those of three read what those of two have written, and the other way round."""
    for rule in ("adam", "rowwise-adagrad"):
        towers = model(ranks)
        made = optimizer(towers, rule)
        shared = {cases.NUM_ITEMS, cases.NUM_QUERIES}
        io = SafeCheckpointIO(ranks, shared)
        kept = checkpoint(towers, made)
        mark_parts(kept, towers, [made])
        io.save_checkpoint(kept, out / f"{rule}.{ranks.size}.ckpt")
        assert all(isinstance(value, Tensor) for state in made.state.values() for value in state.values())
        # What two ranks have written is read by two, by three, and by the test; what three have, by the test.
        found = tensors(io.load_checkpoint(out / f"{rule}.2.ckpt"))
        expected = tensors(checkpoint(towers, made))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), rule
        assert io.load_weights(out / f"{rule}.2.ckpt").keys() == towers.state_dict().keys()
        saved_beside(ranks, towers, made, out / f"beside.{rule}.{ranks.size}.ckpt")
        # A state that was saved whole.
        alone = model(Ranks())
        whole = optimizer(alone, rule).state_dict()
        cut_optimizer_state(whole, made, towers)
        made.load_state_dict(whole)
        towers.load_state_dict(alone.state_dict())
        again = tensors(checkpoint(towers, made))
        assert all(torch.equal(again[name], value) for name, value in expected.items()), rule
    towers = with_ties(model(ranks))
    torch.save(searched(ShardedRanker(towers, cases.LENGTH, ranks)), out / f"searched.{ranks.size}.{ranks.rank}.pt")
    torch.save(mined(towers), out / f"mined.{ranks.size}.{ranks.rank}.pt")
    own = own_item_embeddings(towers, Part(ranks, cases.NUM_ITEMS))
    artifact(towers, own).save(out / f"model-{ranks.size}", ranks)
    fail_together(ranks, out / f"folder-{ranks.size}")


def saved_beside(ranks: Ranks, towers: TwoTower, made: TableOptimizer, path: Path) -> None:
    """Written in the background, while weights and state change and the ranks exchange; then one cannot write."""
    io = SafeCheckpointIO(ranks, {cases.NUM_ITEMS, cases.NUM_QUERIES}, in_background=True, timeout=60)
    before = {name: value.clone() for name, value in tensors(checkpoint(towers, made)).items()}
    release, write = threading.Event(), checkpoints.save_parts

    def held(*given: Any) -> None:
        assert release.wait(60)
        write(*given)

    def fails(*given: Any) -> None:
        if ranks.rank == ranks.size - 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.save_parts = held
    kept = checkpoint(towers, made)
    mark_parts(kept, towers, [made])
    io.save_checkpoint(kept, path)
    with torch.no_grad():  # a step
        for value in tensors(checkpoint(towers, made)).values():
            value.add_(ranks.sum(torch.ones(3))[0] == ranks.size)
    assert not path.exists()
    release.set()
    io.settle()
    assert path.exists(), "all ranks find it"
    found = tensors(io.load_checkpoint(path))
    assert all(torch.equal(found[name], value) for name, value in before.items()), "of the step it was asked for"
    checkpoints.save_parts = fails
    io.save_checkpoint(kept, path)
    told = None
    try:
        io.save_checkpoint(kept, path)
    except (OSError, InputError) as error:
        told = str(error)
    full = f"{path}: cannot be written, the disk is full ([Errno {errno.ENOSPC}] No space left on device)"
    assert told is not None and told.startswith(full if ranks.rank == ranks.size - 1 else f"{path}: {ELSEWHERE}"), told
    checkpoints.save_parts = write
    io.settle()
    io.close()
    assert found.keys() == tensors(SafeCheckpointIO(ranks, io.shared).load_checkpoint(path)).keys()
    with torch.no_grad():
        for name, value in tensors(checkpoint(towers, made)).items():
            value.copy_(before[name])


def fail_together(ranks: Ranks, target: Path) -> None:
    """The last rank cannot write: every rank is told, and nothing appears."""
    target.mkdir(exist_ok=True)
    (target / "older").write_text("stays")

    def write(folder: Path) -> None:
        (folder / str(ranks.rank)).write_text("x")
        if ranks.rank == ranks.size - 1:
            raise OSError("no space left")

    told = None
    try:
        write_folder(target, ranks, write)
    except (OSError, InputError) as error:
        told = str(error)
    ranks.wait()
    full = f"{target}: cannot be written, the disk is full (no space left); free space, or write elsewhere"
    assert told == (full if ranks.rank == ranks.size - 1 else f"{target}: {ELSEWHERE}"), told
    assert [path.name for path in target.iterdir()] == ["older"]
    assert not list(target.parent.glob(f".{target.name}*"))


def mined(towers: TwoTower) -> Tensor:
    """The hard negatives of all queries, int32 [Q, 5]; queries with many items have few left."""
    objective = build_objective(MINED, cases.interactions())
    refresh = miner(objective, cases.interactions(), cases.LENGTH)
    assert refresh is not None
    refresh(towers)
    (source,) = (one for one in objective.pool.members() if isinstance(one, Mined))
    return source.items


def ranked_alone() -> dict[str, Any]:
    return searched(TowerRanker(with_ties(model(Ranks())), cases.LENGTH))
