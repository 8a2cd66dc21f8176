"""How much memory a training will need, computed from its settings before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from twotower import machine, process
from twotower.config import Config, HistoryConfig
from twotower.data import Interactions
from twotower.data.prefetching import DEPTH
from twotower.launch import Launch
from twotower.losses import Objective
from twotower.losses.tiles import tile_starts
from twotower.negatives import CrossBatchMemory, InBatch
from twotower.ranks import Ranks
from twotower.towers import TwoTower
from twotower.towers.lookups import shared_tables_of
from twotower.towers.parts import Rows
from twotower.training.optimizers import state_dtype

#: Sizes of float32 and int64.
F4, I8 = 4, 8
#: Rows that `TwoTower.item_embeddings` embeds at once.
BLOCK = 65_536


@dataclass(frozen=True)
class MemoryPlan:
    """What a training holds, and what comes on top in its three moments, bytes by name.

    Attributes:
        held: from beginning to end. Where a CUDA device trains, the process is in main memory, and all else of this and
            of the next two on the device.
        step: on top of it in a training step.
        ranking: on top of it when the catalog is ranked for a validation or a test.
        saving: on top of it when the best weights are read back, which are then in main memory.
        available: main memory that the machine or the container has left; None where it does not tell.
        mapped: of the prepared data, read from files as it is needed; the system takes it back when memory is short.
        placed: where the id tables that ranks share are, in words; none for whole tables.
        state: what a checkpoint holds: of weights, their optimizer state and their average.
        in_background: whether checkpoints are written from a copy of the state while training goes on.
        on_device: free memory of the CUDA device that trains, the least of all ranks'; None where none does.
    """

    held: dict[str, int]
    step: dict[str, int]
    ranking: dict[str, int]
    saving: dict[str, int]
    available: int | None
    mapped: int
    placed: str = ""
    state: int = 0
    in_background: bool = False
    on_device: int | None = None

    @property
    def peak(self) -> int:
        """The most that this process will hold of the memory that the training runs in."""
        if self.on_device is not None:
            throughout = sum(self.held.values()) - self.held.get("process", 0)
            return throughout + max(sum(part.values()) for part in (self.step, self.ranking))
        moments = max(sum(part.values()) for part in (self.step, self.ranking, self.saving))
        return sum(self.held.values()) + moments + self.state * self.in_background

    @property
    def needed(self) -> int:
        """What is still to be asked of that memory: the process and the tables are in main memory already."""
        if self.on_device is not None:
            return self.peak
        return self.peak - self.held.get("process", 0) - self.held.get("tables", 0)

    @property
    def beside(self) -> int:
        """Main memory beside the process where a CUDA device trains: a checkpoint's copy, or tables with the best ones.

        Tables are made in main memory, moved, and come back in the end; a checkpoint's state is copied there, whether
        training waits for it or not.
        """
        return 0 if self.on_device is None else max(self.state, self.held["tables"] + sum(self.saving.values()))

    @property
    def shortages(self) -> list[tuple[str, int, int]]:
        """(which memory, bytes still needed, bytes there) of each that has less than is needed."""
        if self.on_device is None:
            found = [("main memory", self.needed, self.available)]
        else:
            beside = self.beside - self.held["tables"]
            found = [("the CUDA device's memory", self.needed, self.on_device), ("main memory", beside, self.available)]
        return [(name, needed, there) for name, needed, there in found if there is not None and needed > there]

    @property
    def is_too_large(self) -> bool:
        """Whether there is less than is needed."""
        return bool(self.shortages)

    def __str__(self) -> str:
        """A few lines: what is held, the moments, the peak beside what is there, and what to do if it does not fit."""
        where = "memory" if self.on_device is None else "memory of the CUDA device"
        held = {name: count for name, count in self.held.items() if self.on_device is None or name != "process"}
        lines = [f"{where}: {size(self.peak)} at most, of which held throughout: {listed(held)}"]
        if self.placed:
            lines.append(f"  id tables: {self.placed}; each rank ranks its own part of the items")
        moments = [("a step", self.step), ("ranking", self.ranking)]
        if self.on_device is None:
            moments.append(("reading back", self.saving))
        for name, part in moments:
            lines.append(f"  {name} adds {size(sum(part.values()))}: {listed(part)}")
        if self.on_device is not None:
            process, waits = self.held["process"], "" if self.in_background else ", for which training waits"
            lines.append(
                f"  main memory: {size(process + self.beside)} at most: process {size(process)}, and a checkpoint's "
                f"copy of the state ({size(self.state)}{waits}) or the best weights beside the tables"
            )
        elif self.in_background:
            lines.append(f"  a checkpoint adds {size(self.state)}: a copy of the state, written in the background")
        elif self.state:
            lines.append(f"  checkpoints: training waits while one is written (a copy would need {size(self.state)})")
        if self.mapped:
            lines.append(f"  the prepared data, {size(self.mapped)}, stays on disk and is read as needed")
        for name, needed, there in self.shortages:
            lines.append(
                f"  WARNING: {size(needed)} more of {name} are needed and {size(there)} are there. Smaller: "
                f"{'; '.join(self._advice())}"
            )
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        advice = {
            "optimizer state": "training.table_optimizer=rowwise-adagrad (a D-th of the state)",
            "tables": "item_tower.table_precision=bfloat16 (half the tables), or a smaller item_tower.dimension",
            "histories": "a smaller training.batch_size or query_tower.history.length",
            "tile": "a smaller training.batch_size",
            "checkpoint": "training.checkpoint_in_background=false",
        }
        parts = {**self.held, **self.step, "checkpoint": self.state * self.in_background * (self.on_device is None)}
        largest = sorted((name for name in advice if parts.get(name)), key=lambda name: -parts[name])
        return [advice[name] for name in largest[:3]] or ["a smaller item_tower.dimension"]


def plan_memory(
    config: Config, towers: TwoTower, objective: Objective, data: Interactions, ranks: Ranks | None = None
) -> MemoryPlan:
    """Compute a plan from the shapes of what was built; nothing is allocated. Collective.

    What is in memory already, such as libraries, counts and what the split took from the data, is asked of the system,
    and where the training runs on CUDA devices, what is free of them.

    Args:
        config: the settings, without "auto" (`Config.resolved`).
        towers: the model, in memory.
        objective: its pool says how many candidates a batch has.
        data: the training interactions.
        ranks: the processes of the run, which decide together; a process alone where None.
    """
    ranks = ranks or Ranks()
    found = machine.memory(Launch.of_environment().local_size if ranks.size > 1 else 1)
    on_device = least_of_all(machine.device_memory(config.training.accelerator), ranks)
    on_cpu = on_device is None
    width, rows = config.item_tower.dimension, int(config.training.batch_size)
    length = config.query_tower.history.length if config.query_tower.history else 0
    tables = {id(m.weight): m.weight for m in towers.modules() if isinstance(m, nn.Embedding)}
    sparse = {id(m.weight) for m in towers.modules() if isinstance(m, nn.Embedding) and m.sparse}
    layers = [p for p in (*towers.parameters(), *objective.parameters()) if id(p) not in tables]
    candidates, own = candidates_of(objective, rows, data.num_items)
    embedded = min(rows + candidates, data.num_items)
    in_tables = sum(table.nbytes for table in tables.values())
    held = {
        "process": max((found.resident or 0) - in_tables, 0),
        "tables": in_tables,
        "optimizer state": sum(_state(t, config.training.table_optimizer) for t in tables.values())
        + sum(_state(p, "adam") for p in layers),
    }
    if config.training.weight_average:
        held["average of the weights"] = _saved(towers)
    # Looked up, pooled and masked; then the gradient of what was looked up. A dense one is as large as its table.
    at_once = min(rows, int(config.training.micro_batch or rows))
    of_history = at_once * length * (3 * width * F4 + 4 * I8)
    if config.query_tower.history is not None and config.query_tower.history.sequence is not None:
        of_history = of_sequences(config.query_tower.history, rows, width)
    touched = min(embedded + rows * length, data.num_items) if length else embedded
    step = {
        "gradients": sum(p.nbytes for p in layers)
        + sum(t.nbytes for key, t in tables.items() if key not in sparse)
        + (2 * touched * width * F4 if sparse else 0),
        "batch": (1 + DEPTH) * rows * (3 + length) * I8,
        "histories": of_history,
        "embeddings": (6 * rows + 6 * embedded + 3 * rows * own) * width * F4,
        "tile": _tile(rows, candidates + own, on_cpu=on_cpu),
    }
    shared = shared_tables_of(towers)
    count = ranks.size if shared else 1
    if shared:
        # Fetched rows, their gradient, one for each of two lookups; rows given to others and what comes back for them:
        # as many, but on a rank that has all rows of a table.
        fetched = min(-(-embedded // count) + -(-rows // count) * (length + 1), data.num_items)
        gives_all = any(isinstance(table.part, Rows) and table.part.holder == ranks.rank for table in shared)
        step["rows of shared tables"] = (4 + 3 * (count if gives_all else 1)) * fetched * width * F4
    catalog = -(-data.num_items // count) * width * F4
    ranking = {
        "gradients": step["gradients"],  # those of the last step are still there
        "item embeddings": catalog if shared else 2 * catalog + 2 * min(data.num_items, BLOCK) * width * F4,
        # The items in its order, in bfloat16 (on a CPU), and which are NaN; of a part of the items it has no copy.
        "index": catalog * (not shared) + catalog // 2 * on_cpu + catalog // 4,
    }
    tuned = process.tuning()
    if on_cpu and tuned is not None and tuned.kept_below is not None:
        # What a step has freed stays with the process, and need not fit what a ranking asks for.
        freed = step["histories"] + step["embeddings"]
        ranking["kept for reuse"] = min(freed, process.KEPT_IN_ALL)
    saving = {"best weights": in_tables}
    # What `select` took from the prepared data is in memory already, and so counted with the process.
    state = _saved(towers, objective) + held["optimizer state"] + held.get("average of the weights", 0)
    placed = ", ".join(f"{table.name} {table.part}" for table in shared) + f", over {count} ranks" if shared else ""
    plan = MemoryPlan(held, step, ranking, saving, found.available, _mapped(data), placed, state, on_device=on_device)
    return replace(plan, in_background=_is_in_background(plan, config, ranks))


def _is_in_background(plan: MemoryPlan, config: Config, ranks: Ranks) -> bool:
    """As the settings say; with auto where on every rank a copy of the state needs half of what is left, or less."""
    asked = config.training.checkpoint_in_background
    if asked != "auto":
        return asked
    taken = plan.needed if plan.on_device is None else 0  # of main memory, by the training
    is_short = plan.available is not None and 2 * plan.state > plan.available - taken
    return not ranks.agree(is_short)


def least_of_all(available: int | None, ranks: Ranks) -> int | None:
    """The least that any rank has, so that all decide alike; None where one does not know. Collective."""
    told = torch.tensor([-1 if available is None else available], device=ranks.device)
    least = int(ranks.gather(told, [1] * ranks.size).min())
    return None if least < 0 else least


def candidates_of(objective: Objective, rows: int, num_items: int) -> tuple[int, int]:
    """(shared, of each row alone): how many candidates a batch has at most, copies of an item once where it may."""
    shared, own = 0, 0
    for source in objective.pool.members():
        size = int(getattr(source, "size", 0))
        if isinstance(source, InBatch):
            shared += rows
        elif isinstance(source, CrossBatchMemory):
            shared += size or int(getattr(source, "capacity", 0))
        elif getattr(source, "per_row", False):
            own += size
        else:
            shared += size or num_items  # a source that says no size is the catalog
    return (min(shared, num_items) if objective.merges_copies or objective.pool.unique else shared), own


def of_sequences(history: HistoryConfig, rows: int, width: int) -> int:
    """What an encoder keeps of a batch's sequences for the backward pass, bytes; a sixth more tokens than rows."""
    sequence = history.sequence
    if sequence is None:
        return 0
    if sequence.kind == "gru":
        each: float = sequence.blocks * 6 * width
    else:
        # Norms, projections and masks; the feed-forward layer, its activation and its mask; scores and their softmax.
        each = sequence.blocks * ((12 + 3 * sequence.expansion) * width + 2 * sequence.heads * (history.length + 1))
    return round(rows * 7 / 6 * (each + (3 + sequence.recency) * width) * F4)


def _saved(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers that are kept; tied ones once."""
    return sum({v.data_ptr(): v.nbytes for module in modules for v in module.state_dict().values()}.values())


def _state(parameter: torch.Tensor, rule: str) -> int:
    number = torch.empty((), dtype=state_dtype(parameter)).element_size()
    return len(parameter) * number if rule == "rowwise-adagrad" else 2 * parameter.numel() * number


def _tile(rows: int, width: int, *, on_cpu: bool) -> int:
    starts = tile_starts(rows, width, torch.empty(0, device="cpu" if on_cpu else "meta"))
    return (starts[1] - starts[0]) * width * F4 if len(starts) > 1 else 0


def _mapped(data: Interactions) -> int:
    arrays = (data.item_codes, data.timestamps, data.weights, data.labels, data.groups)
    return sum(array.nbytes for array in arrays if isinstance(array, np.memmap))


def listed(parts: dict[str, int]) -> str:
    """Every part that is worth a word, largest first."""
    named = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size(count)}" for name, count in named if count >= 1 << 20) or "less than 1 MiB"


def size(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"
