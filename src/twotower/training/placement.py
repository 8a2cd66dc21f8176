"""Which ranks have what of the id tables: said by the user, for all or for each, or decided by their size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from twotower import machine
from twotower.config import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.launch import Launch
from twotower.ranks import Ranks
from twotower.towers.parts import Columns, Part, Rows, placed_tables
from twotower.training.memory_plan import F4, least_of_all

#: Where tables are shared for their size, those that need less than this with their state, bytes, stay whole.
SHARED_ABOVE = 16 << 20


@dataclass(frozen=True)
class Placement:
    """What this rank has of the id tables.

    Attributes:
        parts: its parts of shared tables, by name; all other tables are whole on every rank.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Towers built in the block have their tables placed so."""
        with placed_tables(self.parts):
            yield


def place_tables(config: Config, data: Interactions, ranks: Ranks | None = None) -> Placement:
    """Decide where the id tables go, before any is made; collective.

    `training.table_placement` says it for all tables, or for some by name; those that it does not name are `auto`:
    whole as long as they and their optimizer state need no more than half of what a process has; beyond it, those of
    more than 16 MiB are shared by rows. What it has is the free memory of its CUDA device where one trains, and main
    memory otherwise; on CUDA main memory has to take the tables without their state, for they are made there and come
    back there in the end. Of tables that are to lie on one rank each, the largest comes first, and goes
    to the rank that has least of them.

    Args:
        config: the settings.
        data: the training interactions.
        ranks: the processes of the run; a process alone where None.

    Raises:
        InputError: a table is named that the model does not have; or a rank's tables and their optimizer state alone
            need more than there is: the system would end the process in the middle.
    """
    ranks, tables = ranks or Ranks(), table_rows(config, data)
    asked = _asked(config, tables)
    room = _Room.of(config, ranks)
    parts: dict[str, Part] = {}
    if ranks.size > 1:
        parts = _told(config, tables, asked, ranks)
        if room.is_scarce(*_needed(config, tables, parts, ranks)):
            each = row_bytes(config)
            large = [name for name, word in asked.items() if word == "auto" and tables[name] * each > SHARED_ABOVE]
            parts |= {name: Rows(ranks, tables[name]) for name in large}
    lacking = room.lacking(*_needed(config, tables, parts, ranks))
    if lacking is not None:
        raise InputError(_refusal(sum(tables.values()), lacking, ranks, is_shared=bool(parts)))
    return Placement(parts)


@dataclass(frozen=True)
class _Room:
    """What the rank that has least has for its tables, bytes; None where the system does not tell.

    Attributes:
        main: of main memory.
        device: of its CUDA device; None where the training runs in main memory.
    """

    main: int | None
    device: int | None

    @classmethod
    def of(cls, config: Config, ranks: Ranks) -> _Room:
        """Ask the system; collective."""
        here = machine.memory(Launch.of_environment().local_size if ranks.size > 1 else 1).available
        return cls(least_of_all(here, ranks), least_of_all(machine.device_memory(config.training.accelerator), ranks))

    def is_scarce(self, weights: int, state: int) -> bool:
        """Whether tables and their state need more than half of the memory that the training runs in."""
        runs_in = self.main if self.device is None else self.device
        is_half = runs_in is not None and weights + state > runs_in // 2
        return is_half or self.lacking(weights, state) is not None

    def lacking(self, weights: int, state: int) -> str | None:
        """What is needed and what there is, in words, where that is too little."""
        needs = [("and their optimizer state need", weights + state, "main memory", self.main)]
        if self.device is not None:
            needs = [
                ("and their optimizer state need", weights + state, "the CUDA device's memory", self.device),
                ("need", weights, "main memory, where they are made", self.main),
            ]
        for verb, needed, which, there in needs:
            if there is not None and needed > there:
                return f"{verb} {needed >> 20:,} MiB of {which}, {there >> 20:,} MiB are there"
        return None


def table_rows(config: Config, data: Interactions) -> dict[str, int]:
    """Rows of each id table that the settings ask for, by its name in `training.table_placement`."""
    query, item = config.query_tower, config.item_tower
    history = query.history
    separate = history is not None and not history.share_table and (item.id_embedding or not history.item_features)
    asked = {
        "item": (data.num_items, item.id_embedding),
        "history": (data.num_items, separate),
        "query": (data.num_queries, query.id_embedding),
    }
    return {name: rows for name, (rows, wanted) in asked.items() if wanted}


def row_bytes(config: Config) -> int:
    """Bytes of a row of an id table and of its optimizer state."""
    return sum(_bytes(config, 1, config.item_tower.dimension))


def _bytes(config: Config, rows: int, columns: int) -> tuple[int, int]:
    """Bytes of so many rows and columns of a table, and of what the optimizer keeps for them."""
    each = 2 if config.item_tower.table_precision == "bfloat16" else F4
    is_rowwise = config.training.table_optimizer == "rowwise-adagrad"
    return rows * columns * each, rows * F4 if is_rowwise else rows * columns * 2 * F4


def _asked(config: Config, tables: Mapping[str, int]) -> dict[str, str]:
    """What the settings say of each table."""
    told = config.training.table_placement
    if isinstance(told, str):
        return dict.fromkeys(tables, told)
    for name in told:
        if name not in tables:
            raise InputError(
                f"training.table_placement: no table {name!r}; this model's id tables: {', '.join(tables) or 'none'}"
            )
    return {name: told.get(name, "auto") for name in tables}


def _told(config: Config, tables: Mapping[str, int], asked: Mapping[str, str], ranks: Ranks) -> dict[str, Part]:
    """The parts of tables of which the settings say where they go."""
    parts: dict[str, Part] = {}
    filled = [0] * ranks.size
    for name in sorted(tables, key=lambda name: (-tables[name], name)):
        rows = tables[name]
        if asked[name] == "row-wise":
            parts[name] = Rows(ranks, rows)
        elif asked[name] == "column-wise":
            parts[name] = Columns(ranks, rows, config.item_tower.dimension)
        elif asked[name] == "table-wise":
            holder = min(range(ranks.size), key=lambda rank: filled[rank])
            filled[holder] += rows
            parts[name] = Rows(ranks, rows, holder)
    return parts


def _needed(config: Config, tables: Mapping[str, int], parts: Mapping[str, Part], ranks: Ranks) -> tuple[int, int]:
    """Bytes of the tables, and of their optimizer state, on the rank that has most."""
    width, filled = config.item_tower.dimension, [(0, 0)] * ranks.size
    for name, rows in tables.items():
        part = parts.get(name)
        for rank, (weights, state) in enumerate(filled):
            held = (rows, width)
            if part is not None:
                share = part.bounds[rank + 1] - part.bounds[rank]
                held = (share, width) if isinstance(part, Rows) else (rows, share)
            more = _bytes(config, *held)
            filled[rank] = weights + more[0], state + more[1]
    return max(filled, key=sum)


def _refusal(rows: int, lacking: str, ranks: Ranks, *, is_shared: bool) -> str:
    if ranks.size == 1:
        more = "several processes that share the rows (torchrun; training.table_placement=row-wise), "
    else:
        more = "more processes, " if is_shared else "training.table_placement=row-wise, "
    whose = f"a rank's part of tables of {rows:,} rows" if is_shared else f"tables of {rows:,} rows"
    return (
        f"item_tower.dimension: {whose} {lacking}; "
        f"expected {more}a smaller dimension, training.table_optimizer=rowwise-adagrad, or "
        "item_tower.table_precision=bfloat16"
    )
