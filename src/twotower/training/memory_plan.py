"""An estimate of the memory of a training run, computed from its settings before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from twotower.config.run import Config, HistoryConfig
from twotower.data import Interactions
from twotower.data.loading.shuffle import DEPTH
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Launch
from twotower.features.tokens import TokenEncoder
from twotower.losses.tiled.blocks import tile_starts
from twotower.negatives import CrossBatchMemory, InBatch
from twotower.objectives import Objective
from twotower.system import hardware, tuning
from twotower.towers import FeatureInputs, TwoTower
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.towers.text import text_transformers
from twotower.training.optimizer import state_dtype

#: Sizes of float32 and int64, in bytes.
F4, I8 = 4, 8
#: Number of rows that `TwoTower.item_embeddings` embeds at a time.
BLOCK = 65_536


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training run, in bytes by name: held throughout, and added in each of its three phases.

    Attributes:
        held: in use from start to end. With a CUDA device, "process" is in main memory, and everything else here and in
            `step` and `ranking` is on the device.
        step: added during a training step.
        ranking: added while the catalog is ranked for validation or test.
        saving: added while the best weights are read back into main memory.
        available: main memory left on the machine or in the container; None if the system does not report it.
        mapped: memory-mapped prepared data; the system reclaims these pages when memory is short.
        placed: placement of sharded id tables, as text; empty if all tables are whole.
        state: size of a checkpoint: weights, optimizer state and weight average.
        in_background: whether checkpoints are written in the background, from a copy of the state.
        on_device: free memory of the CUDA device that trains, the minimum over ranks; None if no device is used.
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
        """Peak use of the memory in which training runs, in bytes."""
        if self.on_device is not None:
            throughout = sum(self.held.values()) - self.held.get("process", 0)
            return throughout + max(sum(part.values()) for part in (self.step, self.ranking))
        moments = max(sum(part.values()) for part in (self.step, self.ranking, self.saving))
        return sum(self.held.values()) + moments + self.state * self.in_background

    @property
    def needed(self) -> int:
        """Bytes still to be allocated: on a CPU, the process, tables and text encoders are already in main memory."""
        if self.on_device is not None:
            return self.peak
        return self.peak - sum(self.held.get(name, 0) for name in ("process", "tables", "text encoders"))

    @property
    def main_memory(self) -> int:
        """Main memory needed in addition to the process when a CUDA device trains.

        This is the larger of a checkpoint's copy and the tables with the best weights. Tables are created in main
        memory, moved to the device and copied back at the end; a checkpoint's state is copied to main memory whether it
        is written in the background or not.
        """
        return 0 if self.on_device is None else max(self.state, self.held["tables"] + sum(self.saving.values()))

    @property
    def shortages(self) -> list[tuple[str, int, int]]:
        """(memory name, bytes still needed, bytes available) of each memory that is too small."""
        if self.on_device is None:
            needs = [("main memory", self.needed, self.available)]
        else:
            main_memory = self.main_memory - self.held["tables"]
            needs = [
                ("the CUDA device's memory", self.needed, self.on_device),
                ("main memory", main_memory, self.available),
            ]
        return [(name, needed, there) for name, needed, there in needs if there is not None and needed > there]

    def __str__(self) -> str:
        """Format the plan as a few lines: peak, memory held, each phase, and advice if the run does not fit."""
        where = "memory" if self.on_device is None else "memory of the CUDA device"
        held = {name: count for name, count in self.held.items() if self.on_device is None or name != "process"}
        lines = [f"{where}: {size(self.peak)} at most, of which held throughout: {sizes_listed(held)}"]
        if self.placed:
            lines.append(f"  id tables: {self.placed}; each rank ranks its own part of the items")
        moments = [("a step", self.step), ("ranking", self.ranking)]
        if self.on_device is None:
            moments.append(("reading back", self.saving))
        for name, part in moments:
            lines.append(f"  {name} adds {size(sum(part.values()))}: {sizes_listed(part)}")
        if self.on_device is not None:
            process, waits = self.held["process"], "" if self.in_background else ", while training pauses"
            lines.append(
                f"  main memory: {size(process + self.main_memory)} at most: process {size(process)}, and a "
                f"checkpoint's copy of the state ({size(self.state)}{waits}) or the best weights next to the tables"
            )
        elif self.in_background:
            lines.append(f"  a checkpoint adds {size(self.state)}: a copy of the state, written in the background")
        elif self.state:
            lines.append(f"  checkpoints: training pauses while one is written (a copy would need {size(self.state)})")
        if self.mapped:
            lines.append(f"  the prepared data, {size(self.mapped)}, stays on disk and is read as needed")
        for name, needed, there in self.shortages:
            lines.append(
                f"  WARNING: {size(needed)} more of {name} is needed, but only {size(there)} is available. To reduce: "
                f"{'; '.join(self._advice())}"
            )
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        advice = {
            "optimizer state": "training.table_optimizer=rowwise-adagrad (one number of state per row, not 2 D)",
            "tables": "item_tower.table_precision=bfloat16 (half the tables), or a smaller item_tower.dimension",
            "histories": "a smaller training.batch_size or query_tower.history.length",
            "tile": "a smaller training.batch_size",
            "encoded texts": "training.micro_batch, or max_tokens or gradient_checkpointing of the text features",
            "checkpoint": "training.checkpoint_in_background=false",
        }
        parts = {**self.held, **self.step, "checkpoint": self.state * self.in_background * (self.on_device is None)}
        largest = sorted((name for name in advice if parts.get(name)), key=lambda name: -parts[name])
        return [advice[name] for name in largest[:3]] or ["a smaller item_tower.dimension"]


def _of_histories(history: HistoryConfig | None, rows: int, micro_batch: int | None, width: int) -> int:
    """Return the bytes of a step's histories, which are looked up, pooled and masked, and whose rows have gradients."""
    if history is None:
        return 0
    if history.sequence is not None:
        return of_sequences(history, rows, width)
    each = 3 * width * F4 + 4 * I8
    if history.event_weights:  # a pair of types, and two copies of the weights of the heads
        each += 2 * history.heads * F4 + 2 * I8
    return min(rows, micro_batch or rows) * history.length * each


def plan_memory(
    config: Config, towers: TwoTower, objective: Objective, data: Interactions, ranks: Communicator | None = None
) -> MemoryPlan:
    """Compute a plan from the shapes of the model and the data; nothing is allocated. Collective.

    The system reports the memory already in use (libraries, counts, the part of the data that the split selected) and
    the free memory of the CUDA devices if training runs on them.

    Args:
        config: the settings, without "auto" (`Config.resolved`).
        towers: the model, in memory.
        objective: its pool determines the number of candidates per batch.
        data: the training interactions.
        ranks: the processes of the run, which agree on the plan; None for a single process.
    """
    ranks = ranks or Communicator()
    memory = hardware.memory(Launch.of_environment().local_size if ranks.size > 1 else 1)
    on_device = least_of_all(hardware.device_memory(config.training.accelerator), ranks)
    on_cpu = on_device is None
    width, rows = config.item_tower.dimension, int(config.training.batch_size)
    length = config.query_tower.history.length if config.query_tower.history else 0
    # At every nested width, the coordinates and their gradient are copied.
    item = config.item_tower
    all_widths = sum(item.widths) + len(item.widths) * (towers.width - item.dimension)
    texts = {id(p): p for text in text_transformers(towers) for p in text.parameters()}
    in_texts = sum(p.nbytes for p in texts.values())
    tables = {
        id(m.weight): m.weight for m in towers.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in texts
    }
    sparse = {id(m.weight) for m in towers.modules() if isinstance(m, nn.Embedding) and m.sparse}
    layers = [p for p in (*towers.parameters(), *objective.parameters()) if id(p) not in tables and p.requires_grad]
    candidates, own = candidates_of(objective, rows, data.num_items)
    embedded = min(rows + candidates, data.num_items)
    in_tables = sum(table.nbytes for table in tables.values())
    if on_device is not None:  # TorchRec's tables are on the device already
        on_device += sum(table.nbytes for table in tables.values() if table.is_cuda)
    held = {
        "process": max((memory.resident or 0) - in_tables - in_texts, 0),
        "tables": in_tables,
        "text encoders": in_texts,
        "optimizer state": sum(_state(t, config.training.table_optimizer) for t in tables.values())
        + sum(_state(p, "adam") for p in layers),
    }
    if config.training.weight_average:
        held["average of the weights"] = _saved(towers) + sum(p.nbytes for p in texts.values() if not p.requires_grad)
    if (guard := objective.pool.guard) is not None:
        held["vectors of the guard"] = sum(one.nbytes for one in guard.buffers())
    history = config.query_tower.history
    types = length if history is not None and history.event_weights else 0
    touched = min(embedded + rows * length, data.num_items) if length else embedded
    step = {
        # A dense gradient is as large as its table.
        "gradients": sum(p.nbytes for p in layers)
        + sum(t.nbytes for key, t in tables.items() if key not in sparse)
        + (2 * touched * width * F4 if sparse else 0),
        "batch": (1 + DEPTH) * rows * (3 + length + types) * I8,
        "histories": _of_histories(history, rows, config.training.micro_batch, width),
        "embeddings": (6 * rows + 6 * embedded + 3 * rows * own) * all_widths * F4,
        "tile": _tile(rows, candidates + own, on_cpu=on_cpu),
    }
    if texts:
        step["encoded texts"] = of_texts(towers, config.training.micro_batch, rows, embedded)
    if towers.propagation is not None:
        # The vectors of this step, their sums, one layer with its scaled rows, and their gradients.
        step["propagation"] = 6 * in_tables
    shared = shared_tables_of(towers)
    count = ranks.size if shared else 1
    if shared:
        # Fetched rows and their gradients, for each of two lookups, and rows sent to other ranks with the gradients
        # received for them: as many, except on a rank that has all rows of a table.
        fetched = min(-(-embedded // count) + -(-rows // count) * (length + 1), data.num_items)
        gives_all = any(table.part is not None and table.part.holder == ranks.rank for table in shared)
        step["rows of shared tables"] = (4 + 3 * (count if gives_all else 1)) * fetched * width * F4
    catalog = -(-data.num_items // count) * towers.width * F4
    ranking = {
        "gradients": step["gradients"],  # the last step's gradients are not yet freed
        "item embeddings": catalog if shared else 2 * catalog + 2 * min(data.num_items, BLOCK) * towers.width * F4,
        # A copy of the items in index order, a bfloat16 copy on a CPU, and a NaN mask; a shard is not copied.
        "index": catalog * (not shared) + catalog // 2 * on_cpu + catalog // 4,
    }
    tuned = tuning.tuning()
    if on_cpu and tuned is not None and tuned.kept_below is not None:
        # Memory freed by a step stays with the process, and a ranking cannot always reuse it.
        freed = step["histories"] + step["embeddings"]
        ranking["kept for reuse"] = min(freed, tuning.KEPT_IN_ALL)
    saving = {"best weights": in_tables}
    # The rows that `select` copied from the prepared data are already counted with the process.
    state = _saved(towers, objective) + held["optimizer state"] + held.get("average of the weights", 0)
    placed = ", ".join(f"{table.name} {table.part}" for table in shared) + f", over {count} ranks" if shared else ""
    plan = MemoryPlan(held, step, ranking, saving, memory.available, _mapped(data), placed, state, on_device=on_device)
    return replace(plan, in_background=_is_in_background(plan, config, ranks))


def _is_in_background(plan: MemoryPlan, config: Config, ranks: Communicator) -> bool:
    """Return the setting, or for "auto", whether every rank has free memory for two copies of the state."""
    setting = config.training.checkpoint_in_background
    if setting != "auto":
        return setting
    taken = plan.needed if plan.on_device is None else 0  # main memory used by training
    is_short = plan.available is not None and 2 * plan.state > plan.available - taken
    return not ranks.agree(is_short)


def least_of_all(available: int | None, ranks: Communicator) -> int | None:
    """Return the minimum over ranks, so that all ranks decide alike; None if it is unknown on any rank. Collective."""
    values = torch.tensor([-1 if available is None else available], device=ranks.device)
    least = int(ranks.gather(values, [1] * ranks.size).min())
    return None if least < 0 else least


def candidates_of(objective: Objective, rows: int, num_items: int) -> tuple[int, int]:
    """Return the maximum number of candidates of a batch, (shared, per row), with copies merged."""
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
            shared += size or num_items  # a source without a size is the whole catalog
    if objective.feedback is not None:
        own += objective.feedback.size
    return min(shared, num_items), own


def of_sequences(history: HistoryConfig, rows: int, width: int) -> int:
    """Return the bytes that a sequence encoder stores for the backward pass, with 7/6 as many tokens as rows."""
    sequence = history.sequence
    if sequence is None:
        return 0
    if sequence.kind == "gru":
        each: float = sequence.blocks * 6 * width
    else:
        # Norms, projections and masks; the feed-forward layer, its activation and mask; scores and their softmax.
        each = sequence.blocks * ((12 + 3 * sequence.expansion) * width + 2 * sequence.heads * (history.length + 1))
    return round(rows * 7 / 6 * (each + (3 + sequence.recency) * width) * F4)


def of_texts(towers: TwoTower, micro_batch: int | None, rows: int, items: int) -> int:
    """Return the bytes that text encoders store for the backward pass, if every text is as long as the longest.

    Per layer, a token has about 20 vectors of the width of the model (inputs, attention, the feed-forward layer of four
    times the width, norms and masks), and 3 L weights for each head; low-rank updates add the inputs of their dropout.
    With `gradient_checkpointing` the input of every layer is stored, and one layer as above.

    Args:
        towers: the model.
        micro_batch: rows that go through a tower at a time; None for all.
        rows: rows of a batch.
        items: items embedded in a step.
    """
    most = 0
    for module in towers.modules():
        if not isinstance(module, FeatureInputs):
            continue
        texts = items if module.table.features.side == "item" else rows
        texts = min(texts, micro_batch or texts)
        for place, encoder in enumerate(module.encoders):
            if isinstance(encoder, TokenEncoder):
                is_context = module.table.features.side == "context"
                length = encoder.most if is_context else module.table.arrays[place].shape[1]
                config = encoder.model.config
                layers = next((int(config[name]) for name in ("num_hidden_layers", "n_layers") if name in config), 12)
                heads = next((int(config[name]) for name in ("num_attention_heads", "n_heads") if name in config), 12)
                width = encoder.model.width
                each = (30 if encoder.declared.train == "lora" else 20) * width + 3 * heads * length
                stored = layers * width + each if encoder.declared.gradient_checkpointing else layers * each
                most += texts * length * stored * F4
    return most


def _saved(*modules: nn.Module) -> int:
    """Return the bytes of the parameters and buffers that are saved; tied parameters count once."""
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


def sizes_listed(parts: dict[str, int]) -> str:
    """Format every part of at least 1 MiB, largest first."""
    named = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size(count)}" for name, count in named if count >= 1 << 20) or "less than 1 MiB"


def size(count: int) -> str:
    """Format bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"
