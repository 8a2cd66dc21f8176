"""A trained model's state in a model of more queries, items and feature values: tables grow, the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.losses import Objective
from twotower.negatives import StreamingFrequency
from twotower.stored_rows import RowSource
from twotower.towers import FeatureInputs
from twotower.towers.lookups import shared_tables_of
from twotower.towers.parts import Columns, Part
from twotower.training.optimizers import TableOptimizer, fresh_state

Side = Literal["queries", "items"]

#: Rows of a table that are taken over at once.
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Maps:
    """New code of every old code, int64, -1 for one that has left.

    Attributes:
        queries, items: of the vocabularies.
        values: by side ("item", "query", "context") and place of the feature, of the codes of a feature's values.
    """

    queries: Tensor
    items: Tensor
    values: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def named_tables(build: Callable[[int, int], nn.Module], num_queries: int, num_items: int) -> dict[str, Side]:
    """Which tensors of a model have a row for each query or each item.

    The model is built three times without memory, with one query and one item more: what grows along is such a table,
    whatever the tower and its name.

    Args:
        build: a model from numbers of queries and items.
        num_queries: Q.
        num_items: N.

    Returns:
        Names in the state dict, parameters and buffers alike.
    """
    with torch.device("meta"):
        plain = _shapes(build(num_queries, num_items))
        more: dict[Side, dict[str, torch.Size]] = {
            "queries": _shapes(build(num_queries + 1, num_items)),
            "items": _shapes(build(num_queries, num_items + 1)),
        }
    tables: dict[str, Side] = {}
    for side, shapes in more.items():
        for name, shape in plain.items():
            if shapes[name] != shape:
                if shapes[name][1:] != shape[1:] or shape[0] < (num_queries if side == "queries" else num_items):
                    raise ValueError(f"{name}: of shape {list(shape)} has no row for each of the {side}")
                tables[name] = side
    return tables


def row_maps(model: nn.Module, tables: Mapping[str, Side], maps: Maps) -> dict[str, Tensor]:
    """The map of rows of every table of a model that grows, features' tables of values among them, by name."""
    found = {name: maps.queries if side == "queries" else maps.items for name, side in tables.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FeatureInputs):
            for place, rows in maps.values.get(module.table.features.side, {}).items():
                found[f"{name}.embeddings.{place}.weight".lstrip(".")] = rows
    return found


@torch.no_grad()
def grow(model: nn.Module, state: Mapping[str, RowSource], rows: Mapping[str, Tensor]) -> None:
    """Put an old model's tensors into a freshly built larger one: kept rows of tables, everything else whole.

    Rows that the old model does not have stay as the fresh model has them. Rows beyond a vocabulary's, such as one for
    padding, stand at the end of a table and are kept there. Of a table that ranks share, each takes its part.

    Args:
        model: fresh; changed in place.
        state: the old model's state dict, in memory or in its files.
        rows: `row_maps`.

    Raises:
        InputError: the old model has other parts or shapes.
    """
    parts = parts_of(model)
    for name, own in model.state_dict(keep_vars=True).items():
        old: RowSource | None = state.get(name)
        if old is None and own.dtype == torch.bool and name in rows:
            old = torch.ones(len(rows[name]), dtype=torch.bool)  # an older version kept no such mask: all are trained
        if old is None:
            raise InputError(f"model: {name} is not among the saved weights; continue with the version that wrote them")
        if name in rows:
            grown_rows(own, old, rows[name], parts.get(id(own)))
        elif old.shape != own.shape:
            raise InputError(
                f"model: {name} is {list(old.shape)} in the saved weights and {list(own.shape)} here; the towers' "
                "settings cannot be changed when a training is continued"
            )
        else:
            own.copy_(old[...])


def parts_of(model: nn.Module) -> dict[int, Part]:
    """What this rank has of the tables that it shares, by `id` of their weight."""
    return {id(table.weight): table.part for table in shared_tables_of(model) if table.part is not None}


@torch.no_grad()
def grown_rows(own: Tensor, old: RowSource, rows: Tensor, part: Part | None = None) -> None:
    """Kept rows of an old table into a new one; a mask of rows is joined instead of replaced.

    Args:
        own: the new table, or this rank's part of it; changed in place.
        old: the whole old one, of which no other rows are read than those that are wanted.
        rows: new code of every old row, int64 [old N], -1 for one that has left.
        part: which part of the new table `own` is; all where None.
    """
    total, first = (len(own), 0) if part is None else (part.rows, part.place(0)[0].start)
    extra = len(old) - len(rows)  # those at the end stay there
    to = torch.cat([rows, torch.arange(total - extra, total)])
    kept = ((to >= first) & (to < first + len(own))).nonzero().squeeze(1)
    for some in torch.split(kept, BLOCK_ROWS):
        places, values = (to[some] - first).to(own.device), old[some]
        values = (part.cut(values) if isinstance(part, Columns) else values).to(own.device, own.dtype)
        own[places] = own[places] | values if own.dtype == torch.bool else values


def continue_optimizer(
    optimizer: TableOptimizer,
    saved: Mapping[str, Any],
    maps_of: Mapping[int, Tensor],
    parts: Mapping[int, Part] | None = None,
) -> tuple[int, int]:
    """Let an optimizer go on with an old one's state, row by row in tables that have grown.

    New rows begin without a past, as rows do that a step touches for the first time.

    Args:
        optimizer: of the new model, its groups as `parameter_groups` makes them.
        saved: the old optimizer's state dict.
        maps_of: map of rows by `id` of a parameter.
        parts: what this rank has of those that are shared (`parts_of`).

    Returns:
        How many parameters go on, of how many that have a state. One begins afresh where the rule of its group has
        changed.
    """
    done = count = 0
    for group, old_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], old_group["params"], strict=False):
            old = saved["state"].get(number)
            count += bool(old)
            fresh = fresh_state(parameter, group["rule"])
            rows, part = maps_of.get(id(parameter)), (parts or {}).get(id(parameter))
            if not old or set(old) != set(fresh) or group["rule"] != old_group["rule"]:
                continue
            shapes = {key: _whole_shape(value, part) for key, value in fresh.items()}
            if any(old[key].shape[1:] != shape[1:] for key, shape in shapes.items()):
                continue
            if rows is None and any(old[key].shape != shape for key, shape in shapes.items()):
                continue
            for key, value in fresh.items():
                if rows is None or value.ndim == 0:
                    value.copy_(old[key][...])
                else:
                    grown_rows(value, old[key], rows, part)
            optimizer.state[parameter] = fresh
            done += 1
    return done, count


def _whole_shape(value: Tensor, part: Part | None) -> torch.Size:
    return value.shape if part is None or value.ndim == 0 else torch.Size(part.whole_shape(value))


@torch.no_grad()
def continue_objective(objective: Objective, saved: Mapping[str, RowSource], items: Tensor) -> None:
    """Let an objective go on: learned scalars, and streaming frequencies, whose items keep their gaps.

    What is drawn anew in every step, such as a memory of the last batches or mined items, begins empty.

    Args:
        objective: of the new model; changed in place.
        saved: the old objective's state dict.
        items: int64 [old N], new codes.
    """
    for name, parameter in objective.named_parameters():
        if name in saved and saved[name].shape == parameter.shape:
            parameter.copy_(saved[name][...])
    for name, module in objective.named_modules(remove_duplicate=False):
        if isinstance(module, StreamingFrequency) and f"{name}.gap" in saved:
            continue_streaming(module, {key: saved[f"{name}.{key}"][...] for key in ("gap", "last", "clock")}, items)


@torch.no_grad()
def continue_streaming(frequency: StreamingFrequency, saved: Mapping[str, Tensor], items: Tensor) -> None:
    """The estimate goes on: kept items have their gaps and the row of their last sight, new ones were never seen.

    Raises:
        InputError: hashed tables, whose places depend on codes that have changed.
    """
    if frequency.buckets is not None or len(items) != saved["gap"].shape[1]:
        raise InputError("frequency: hashed tables cannot be carried on to other codes; count, or begin anew")
    kept = (items >= 0).nonzero().squeeze(1)
    frequency.gap[:, items[kept]] = saved["gap"][:, kept]
    frequency.last[:, items[kept]] = saved["last"][:, kept]
    frequency.clock.copy_(saved["clock"])


class ContinueOptimizer(Callback):
    """Brings the optimizer to where that of the model's parent was, before the first step.

    Args:
        rows: maps of rows by name of a tensor of the towers, as `row_maps` gives them.
        state: state dict of the old optimizer.
        say: where it is told that some of it cannot go on.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], state: Mapping[str, Any], say: Callable[[object], None] | None = None
    ) -> None:
        self.rows, self.state, self.say = rows, state, say

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run is restored from its own checkpoint after this."""
        towers: nn.Module = pl_module.towers  # type: ignore[assignment]
        named = dict(towers.named_parameters(remove_duplicate=False))
        maps = {id(named[name]): rows for name, rows in self.rows.items() if name in named}
        for optimizer in trainer.optimizers:
            assert isinstance(optimizer, TableOptimizer)
            done, count = continue_optimizer(optimizer, self.state, maps, parts_of(towers))
            if done < count and self.say is not None:
                self.say(f"optimizer: {count - done} of {count} tensors begin afresh, their update rule has changed")


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}
