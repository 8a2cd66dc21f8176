"""Placement of the id tables over ranks, and the engine that exchanges their rows: set by the user, or chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.distributed import torchrec_tables
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Launch
from twotower.distributed.partition import RowShard
from twotower.distributed.torchrec_tables import TorchRecTables, Way, plan_tables
from twotower.errors import InputError
from twotower.system import hardware
from twotower.training.memory_plan import F4, least_of_all

#: With automatic sharding, a table stays whole if it and its optimizer state need at most this many bytes.
SHARED_ABOVE = 16 << 20
#: The placements that TorchRec's planner chooses from.
_FREE: tuple[Way, ...] = ("row-wise", "table-wise")


@dataclass(frozen=True)
class Placement:
    """Placement of the id tables of a run.

    Attributes:
        parts: this rank's parts of sharded tables, by name; all other tables are whole on every rank.
        engine: the implementation that looks up and updates the rows of sharded tables.
        reason: why `training.table_engine=auto` chose the engine; empty if the engine was set.
    """

    parts: dict[str, RowShard]
    engine: Literal["torchrec", "builtin"] = "builtin"
    reason: str = ""

    def open_engine(self, width: int) -> TorchRecTables | None:
        """Allocate the parts that TorchRec looks up and updates; return None if there are none. Collective."""
        return TorchRecTables(self.parts, width) if self.parts and self.engine == "torchrec" else None

    def __str__(self) -> str:
        """Format the choice of the engine for the user."""
        name = {"torchrec": "TorchRec", "builtin": "the built-in exchange"}[self.engine]
        return f"rows of sharded id tables are looked up and updated by {name}" + f" ({self.reason})" * bool(
            self.reason
        )


def place_tables(config: Config, data: Interactions, ranks: Communicator | None = None) -> Placement:
    """Choose the placement of the id tables before any of them is created, for `placed_tables`; collective.

    `training.table_placement` sets it for all tables, or for some by name. Unnamed tables are `auto`: they are whole as
    long as all tables and their optimizer state need at most half of the memory that is free for a process; otherwise
    tables that need more than 16 MiB are sharded by rows, or, with TorchRec, by rows or as whole tables on single
    ranks, as its planner decides. If training runs on a CUDA device, its memory counts, otherwise main memory. With
    CUDA the tables, without their state, must also fit into main memory, because they are created there and copied back
    at the end.

    Args:
        config: the settings, without "auto" (`Config.resolved`).
        data: the training interactions.
        ranks: the processes of the run; None for a single process.

    Raises:
        InputError: a named table does not exist in the model; the engine does not support a setting; or the tables and
            optimizer state of a rank need more memory than is available, so that the system would kill the process
            during training.
    """
    ranks, tables = ranks or Communicator(), table_rows(config, data)
    requested = _requested_placements(config, tables)
    room = _FreeMemory.of(config, ranks)
    found = Placement({})
    if ranks.size > 1:
        chosen, reason = _choose_engine(config, requested, on_cuda=room.device is not None)
        ways: dict[str, tuple[Way, ...]] = {}
        for one in _FREE:
            ways |= {name: (one,) for name, way in requested.items() if way == one}
        made = partial(_parts, config, tables, engine=chosen, room=room, ranks=ranks)
        found = Placement(made(ways), chosen, reason)
        if room.is_scarce(*_needed(config, tables, found.parts, ranks)):
            each, free = row_bytes(config), _FREE if chosen == "torchrec" else _FREE[:1]
            ways |= {
                name: free for name, way in requested.items() if way == "auto" and tables[name] * each > SHARED_ABOVE
            }
            found = Placement(made(ways), chosen, reason)
    shortage = room.shortage(*_needed(config, tables, found.parts, ranks))
    if shortage is not None:
        raise InputError(_shortage_message(sum(tables.values()), shortage, ranks, is_shared=bool(found.parts)))
    return found


def _choose_engine(
    config: Config, requested: Mapping[str, str], *, on_cuda: bool
) -> tuple[Literal["torchrec", "builtin"], str]:
    """Return the engine of sharded tables, and the reason for a choice of `auto`.

    Raises:
        InputError: the engine that is set, or that a placement needs, does not support the settings.
    """
    setting, is_needed = config.training.table_engine, "table-wise" in requested.values()
    if setting == "builtin":
        if is_needed:
            raise InputError(
                "training.table_placement: table-wise needs TorchRec; use row-wise, or training.table_engine=torchrec"
            )
        return "builtin", ""
    if setting == "auto" and not (on_cuda or is_needed):
        return "builtin", "faster than TorchRec on a CPU"
    fault = _torchrec_fault(config, on_cuda=on_cuda)
    if fault is None:
        return "torchrec", "" if setting == "torchrec" else "table-wise" if is_needed else "on CUDA"
    if setting == "torchrec":
        raise InputError(f"training.table_engine=torchrec: {fault}, or training.table_engine=builtin")
    if is_needed:
        raise InputError(f"training.table_placement: table-wise needs TorchRec: {fault}, or row-wise")
    return "builtin", f"not TorchRec: {fault}"


def _torchrec_fault(config: Config, *, on_cuda: bool) -> str | None:
    """Explain why TorchRec does not support the tables of a run, and what to use instead; return None if it does."""
    width = config.item_tower.dimension
    faults = {
        f"it is not installed; use {torchrec_tables.INSTALL}": not torchrec_tables.is_installed(),
        "FBGEMM has no Adam on a CPU, and its Adam on CUDA has not been compared with the built-in one; use "
        "training.table_optimizer=rowwise-adagrad": config.training.table_optimizer != "rowwise-adagrad",
        "it does not round bfloat16 tables stochastically; use item_tower.table_precision=float32": (
            config.item_tower.table_precision != "float32"
        ),
        f"the width of its rows must be a multiple of 4; use item_tower.dimension={-(-width // 4) * 4}": width % 4 != 0,
    }
    fault = next((text for text, is_one in faults.items() if is_one), None)
    return torchrec_tables.cuda_fault() if fault is None and on_cuda else fault


@dataclass(frozen=True)
class _FreeMemory:
    """Free memory for tables in bytes, on the rank with the least; None if the system does not report it.

    Attributes:
        main: main memory.
        device: memory of the CUDA device; None if training runs in main memory.
    """

    main: int | None
    device: int | None

    @classmethod
    def of(cls, config: Config, ranks: Communicator) -> _FreeMemory:
        """Return the free memory that the system reports; collective."""
        here = hardware.memory(Launch.of_environment().local_size if ranks.size > 1 else 1).available
        return cls(least_of_all(here, ranks), least_of_all(hardware.device_memory(config.training.accelerator), ranks))

    def is_scarce(self, weights: int, state: int) -> bool:
        """Return whether tables and their state need more than half of the memory in which training runs."""
        runs_in = self.main if self.device is None else self.device
        is_half = runs_in is not None and weights + state > runs_in // 2
        return is_half or self.shortage(weights, state) is not None

    def shortage(self, weights: int, state: int) -> str | None:
        """Describe which memory is too small, with bytes needed and available; return None if the tables fit."""
        needs = [("and their optimizer state need", weights + state, "main memory", self.main)]
        if self.device is not None:
            needs = [
                ("and their optimizer state need", weights + state, "the CUDA device's memory", self.device),
                ("need", weights, "main memory, where they are created", self.main),
            ]
        for verb, needed, which, there in needs:
            if there is not None and needed > there:
                return f"{verb} {needed >> 20:,} MiB of {which}, but only {there >> 20:,} MiB are free"
        return None


def table_rows(config: Config, data: Interactions) -> dict[str, int]:
    """Return the number of rows of each id table in the model, by its name in `training.table_placement`."""
    query, item = config.query_tower, config.item_tower
    history = query.history
    separate = history is not None and not history.share_table and (item.id_embedding or not history.item_features)
    tables = {
        "item": (data.num_items, item.id_embedding),
        "history": (data.num_items, separate),
        "query": (data.num_queries, query.id_embedding),
    }
    return {name: rows for name, (rows, is_used) in tables.items() if is_used}


def row_bytes(config: Config) -> int:
    """Return the bytes of one row of an id table and of its optimizer state."""
    return sum(_bytes(config, 1, config.item_tower.dimension))


def _bytes(config: Config, rows: int, columns: int) -> tuple[int, int]:
    """Return the bytes of this many rows and columns of a table, and of their optimizer state."""
    each = 2 if config.item_tower.table_precision == "bfloat16" else F4
    is_rowwise = config.training.table_optimizer == "rowwise-adagrad"
    return rows * columns * each, rows * F4 if is_rowwise else rows * columns * 2 * F4


def _requested_placements(config: Config, tables: Mapping[str, int]) -> dict[str, str]:
    """Return the requested placement of each table."""
    placement = config.training.table_placement
    if isinstance(placement, str):
        return dict.fromkeys(tables, placement)
    for name in placement:
        if name not in tables:
            raise InputError(
                f"training.table_placement: no table {name!r}; this model's id tables: {', '.join(tables) or 'none'}"
            )
    return {name: placement.get(name, "auto") for name in tables}


def _parts(
    config: Config,
    tables: Mapping[str, int],
    ways: Mapping[str, tuple[Way, ...]],
    *,
    engine: str,
    room: _FreeMemory,
    ranks: Communicator,
) -> dict[str, RowShard]:
    """Return this rank's parts of the tables to shard, given the placements to choose from."""
    if engine == "builtin" or not ways:
        return {name: RowShard(ranks, tables[name]) for name in ways}
    length = config.query_tower.history.length if config.query_tower.history else 0
    planned = plan_tables(
        {name: tables[name] for name in ways},
        config.item_tower.dimension,
        ways,
        size=ranks.size,
        lookups=-(-int(config.training.batch_size) // ranks.size) * (2 + length),
        device="cpu" if room.device is None else "cuda",
        memory=room.main if room.device is None else room.device,
        local_size=Launch.of_environment().local_size,
    )
    if planned is None:  # sharding by rows needs the least memory per rank; the shortage is reported later
        return {name: RowShard(ranks, tables[name]) for name in ways}
    parts = {name: planned[name].part(ranks, tables[name]) for name in ways}
    return {name: part for name, part in parts.items() if part is not None}


def _needed(
    config: Config, tables: Mapping[str, int], parts: Mapping[str, RowShard], ranks: Communicator
) -> tuple[int, int]:
    """Return the bytes of the tables, and of their optimizer state, on the rank with the most."""
    filled = [0] * ranks.size
    for name, rows in tables.items():
        bounds = parts[name].bounds if name in parts else None
        for rank in range(ranks.size):
            filled[rank] += rows if bounds is None else bounds[rank + 1] - bounds[rank]
    return _bytes(config, max(filled), config.item_tower.dimension)


def _shortage_message(rows: int, shortage: str, ranks: Communicator, *, is_shared: bool) -> str:
    if ranks.size == 1:
        more = "several processes with sharded rows (torchrun; training.table_placement=row-wise), "
    else:
        more = "more processes, " if is_shared else "training.table_placement=row-wise, "
    whose = f"a rank's part of tables of {rows:,} rows" if is_shared else f"tables of {rows:,} rows"
    return (
        f"item_tower.dimension: {whose} {shortage}; "
        f"use {more}a smaller dimension, training.table_optimizer=rowwise-adagrad, or "
        "item_tower.table_precision=bfloat16"
    )
