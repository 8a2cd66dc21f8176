"""Whether every rank has whole id tables, or each a part of their rows: said by the user, or decided by their size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from twotower import machine
from twotower.config import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.launch import Launch
from twotower.ranks import Ranks
from twotower.towers.shards import shared_tables
from twotower.training.memory_plan import F4

#: Where tables are shared for their size, those that need less than this with their state, bytes, stay whole.
SHARED_ABOVE = 16 << 20


@dataclass(frozen=True)
class Placement:
    """Where the rows of the id tables are.

    Attributes:
        ranks: the processes of the run.
        above: tables with more rows than this are held by parts; None: all tables are whole on every rank.
    """

    ranks: Ranks
    above: int | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Towers built in the block have their tables placed so."""
        if self.above is None:
            yield
        else:
            with shared_tables(self.ranks, above=self.above):
                yield


def place_tables(config: Config, data: Interactions, ranks: Ranks | None = None) -> Placement:
    """Decide where the rows of the id tables go, before any is made; collective.

    `training.table_placement` says `replicated` or `row-wise`. `auto` keeps whole tables as long as they and their
    optimizer state need no more than half of what a process has; beyond it tables of more than 16 MiB are shared.

    Args:
        config: the settings.
        data: the training interactions.
        ranks: the processes of the run; a process alone where None.

    Raises:
        InputError: a rank's tables and their optimizer state alone need more than there is: the system would end the
            process in the middle.
    """
    ranks, asked = ranks or Ranks(), config.training.table_placement
    tables, each = table_rows(config, data), row_bytes(config)
    whole = sum(tables) * each
    available = _least(machine.memory(Launch.of_environment().local_size if ranks.size > 1 else 1).available, ranks)
    above = None
    if ranks.size > 1:
        if asked == "row-wise":
            above = 0
        elif asked == "auto" and available is not None and whole > available // 2:
            above = SHARED_ABOVE // each
    needed = sum(-(-rows // ranks.size) if above is not None and rows > above else rows for rows in tables) * each
    if available is not None and needed > available:
        raise InputError(_refusal(sum(tables), needed, available, ranks, is_shared=above is not None))
    return Placement(ranks, above)


def table_rows(config: Config, data: Interactions) -> list[int]:
    """Rows of each id table that the settings ask for."""
    query, item = config.query_tower, config.item_tower
    separate = query.history is not None and not query.history.share_table
    asked = [(data.num_items, item.id_embedding), (data.num_items, separate), (data.num_queries, query.id_embedding)]
    return [rows for rows, wanted in asked if wanted]


def row_bytes(config: Config) -> int:
    """Bytes of a row of an id table and of its optimizer state."""
    width = config.item_tower.dimension
    each = 2 if config.item_tower.table_precision == "bfloat16" else F4
    state = F4 if config.training.table_optimizer == "rowwise-adagrad" else 2 * F4 * width
    return width * each + state


def _refusal(rows: int, needed: int, available: int, ranks: Ranks, *, is_shared: bool) -> str:
    if ranks.size == 1:
        more = "several processes that share the rows (torchrun; training.table_placement=row-wise), "
    else:
        more = "more processes, " if is_shared else "training.table_placement=row-wise, "
    whose = f"a W-th of tables of {rows:,} rows" if is_shared else f"tables of {rows:,} rows"
    return (
        f"item_tower.dimension: {whose} and their optimizer state need {needed >> 20:,} MiB, {available >> 20:,} MiB "
        f"are there; expected {more}a smaller dimension, training.table_optimizer=rowwise-adagrad, or "
        "item_tower.table_precision=bfloat16"
    )


def _least(available: int | None, ranks: Ranks) -> int | None:
    """The least that any rank has, so that all decide alike; None where one does not know."""
    told = torch.tensor([-1 if available is None else available], device=ranks.device)
    least = int(ranks.gather(told, [1] * ranks.size).min())
    return None if least < 0 else least
