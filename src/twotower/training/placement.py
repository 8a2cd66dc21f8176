"""Placement of the id tables over ranks: set by the user, for all tables or per table, or chosen by size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Launch
from twotower.distributed.partition import ColumnShard, RowShard, TableShard
from twotower.errors import InputError
from twotower.system import hardware
from twotower.training.memory_plan import F4, least_of_all

#: With automatic sharding, tables stay whole if they need fewer bytes than this, including their optimizer state.
SHARED_ABOVE = 16 << 20


def place_tables(config: Config, data: Interactions, ranks: Communicator | None = None) -> dict[str, TableShard]:
    """Choose the placement of the id tables before any of them is created, for `placed_tables`; collective.

    `training.table_placement` sets it for all tables, or for some by name. Unnamed tables are `auto`: they are whole as
    long as they and their optimizer state need at most half of a process's memory; otherwise tables of more than 16 MiB
    are sharded by rows. The memory is that of the CUDA device if training runs on one, and main memory otherwise. With
    CUDA the tables, without their state, must also fit into main memory, because they are created there and copied back
    at the end. Table-wise tables are placed largest first, each on the rank with the fewest rows so far.

    Args:
        config: the settings.
        data: the training interactions.
        ranks: the processes of the run; None for a single process.

    Returns:
        This rank's parts of sharded tables, by name; all other tables are whole on every rank.

    Raises:
        InputError: a named table does not exist in the model; or the tables and optimizer state of a rank need more
            memory than is available, so that the system would kill the process during training.
    """
    ranks, tables = ranks or Communicator(), table_rows(config, data)
    requested = _requested_placements(config, tables)
    room = _FreeMemory.of(config, ranks)
    parts: dict[str, TableShard] = {}
    if ranks.size > 1:
        parts = _requested_parts(config, tables, requested, ranks)
        if room.is_scarce(*_needed(config, tables, parts, ranks)):
            each = row_bytes(config)
            large = [
                name for name, choice in requested.items() if choice == "auto" and tables[name] * each > SHARED_ABOVE
            ]
            parts |= {name: RowShard(ranks, tables[name]) for name in large}
    shortage = room.shortage(*_needed(config, tables, parts, ranks))
    if shortage is not None:
        raise InputError(_shortage_message(sum(tables.values()), shortage, ranks, is_shared=bool(parts)))
    return parts


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
        """Query the system; collective."""
        here = hardware.memory(Launch.of_environment().local_size if ranks.size > 1 else 1).available
        return cls(least_of_all(here, ranks), least_of_all(hardware.device_memory(config.training.accelerator), ranks))

    def is_scarce(self, weights: int, state: int) -> bool:
        """Return whether tables and their state need more than half of the memory in which training runs."""
        runs_in = self.main if self.device is None else self.device
        is_half = runs_in is not None and weights + state > runs_in // 2
        return is_half or self.shortage(weights, state) is not None

    def shortage(self, weights: int, state: int) -> str | None:
        """Describe which memory is too small, with bytes needed and available; None if all fit."""
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


def _requested_parts(
    config: Config, tables: Mapping[str, int], requested: Mapping[str, str], ranks: Communicator
) -> dict[str, TableShard]:
    """Return the parts of the tables whose placement is set explicitly."""
    parts: dict[str, TableShard] = {}
    filled = [0] * ranks.size
    for name in sorted(tables, key=lambda name: (-tables[name], name)):
        rows = tables[name]
        if requested[name] == "row-wise":
            parts[name] = RowShard(ranks, rows)
        elif requested[name] == "column-wise":
            parts[name] = ColumnShard(ranks, rows, config.item_tower.dimension)
        elif requested[name] == "table-wise":
            holder = min(range(ranks.size), key=lambda rank: filled[rank])
            filled[holder] += rows
            parts[name] = RowShard(ranks, rows, holder)
    return parts


def _needed(
    config: Config, tables: Mapping[str, int], parts: Mapping[str, TableShard], ranks: Communicator
) -> tuple[int, int]:
    """Return the bytes of the tables, and of their optimizer state, on the rank with the most."""
    width, filled = config.item_tower.dimension, [(0, 0)] * ranks.size
    for name, rows in tables.items():
        part = parts.get(name)
        for rank, (weights, state) in enumerate(filled):
            held = (rows, width)
            if part is not None:
                share = part.bounds[rank + 1] - part.bounds[rank]
                held = (share, width) if isinstance(part, RowShard) else (rows, share)
            more = _bytes(config, *held)
            filled[rank] = weights + more[0], state + more[1]
    return max(filled, key=sum)


def _shortage_message(rows: int, shortage: str, ranks: Communicator, *, is_shared: bool) -> str:
    if ranks.size == 1:
        more = "several processes with sharded rows (torchrun; training.table_placement=row-wise), "
    else:
        more = "more processes, " if is_shared else "training.table_placement=row-wise, "
    whose = f"a rank's part of tables of {rows:,} rows" if is_shared else f"tables of {rows:,} rows"
    return (
        f"item_tower.dimension: {whose} {shortage}; "
        f"expected {more}a smaller dimension, training.table_optimizer=rowwise-adagrad, or "
        "item_tower.table_precision=bfloat16"
    )
