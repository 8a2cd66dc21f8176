"""Transfer of a parent model's weights and state to towers with more queries, items and feature values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
import pytorch_lightning as lightning
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from twotower.config.run import Config
from twotower.data.schema.vocabulary import Vocabulary
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.row_files import RowSource
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.incremental.features import extend_encoded_context, extend_encoded_table
from twotower.incremental.parent import BLOCK_ROWS, ParentModel, has_weights
from twotower.incremental.split import ContinuedSplit
from twotower.negatives import StreamingFrequency
from twotower.objectives import Objective
from twotower.towers import FeatureInputs, TwoTower, build_towers
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.training.checkpoint.lazy import open_checkpoint
from twotower.training.optimizer import TableOptimizer, fresh_state

Side = Literal["queries", "items"]


@dataclass(frozen=True)
class CodeMaps:
    """The new code of every old code, int64; -1 for a removed code.

    Attributes:
        queries, items: codes of the vocabularies.
        values: codes of feature values, by side ("item", "query", "context") and position of the feature.
    """

    queries: Tensor
    items: Tensor
    values: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def named_tables(build: Callable[[int, int], nn.Module], num_queries: int, num_items: int) -> dict[str, Side]:
    """Find the tensors of a model that have one row per query or per item.

    The model is built three times on the meta device: unchanged, with one more query, and with one more item. A tensor
    that grows is such a table, regardless of tower and name.

    Args:
        build: function that builds a model from the numbers of queries and items.
        num_queries: number of queries, Q.
        num_items: number of items, N.

    Returns:
        The side of each such parameter or buffer, by name in the state dict.
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
                    raise ValueError(f"{name}: shape {list(shape)} does not match the number of {side}")
                tables[name] = side
    return tables


def row_maps(model: nn.Module, tables: Mapping[str, Side], maps: CodeMaps) -> dict[str, Tensor]:
    """Return the row map of every table that grows, including tables of feature values, by name."""
    found = {name: maps.queries if side == "queries" else maps.items for name, side in tables.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FeatureInputs):
            for place, rows in maps.values.get(module.table.features.side, {}).items():
                found[f"{name}.embeddings.{place}.weight".lstrip(".")] = rows
    return found


@torch.no_grad()
def grow(model: nn.Module, state: Mapping[str, RowSource], rows: Mapping[str, Tensor]) -> None:
    """Copy an old model's tensors into a larger new model: retained rows of tables, and all other tensors entirely.

    Rows that the old model does not have keep their fresh initialization. Extra rows beyond the vocabulary, such as
    padding, are the last rows of a table and stay there. Each rank copies its own part of a sharded table.

    Args:
        model: the freshly built model; changed in place.
        state: the old model's state dict, in memory or in files.
        rows: the result of `row_maps`.

    Raises:
        InputError: the old model has different tensors or shapes.
    """
    parts = parts_of(model)
    for name, own in model.state_dict(keep_vars=True).items():
        old: RowSource | None = state.get(name)
        if old is None and own.dtype == torch.bool and name in rows:
            old = torch.ones(len(rows[name]), dtype=torch.bool)  # older versions saved no mask: all rows are trained
        if old is None:
            raise InputError(f"model: {name} is not in the saved weights; continue with the version that wrote them")
        if name in rows:
            copy_old_rows(own, old, rows[name], parts.get(id(own)))
        elif old.shape != own.shape:
            raise InputError(
                f"model: {name} is {list(old.shape)} in the saved weights and {list(own.shape)} here; the towers' "
                "settings cannot be changed when continuing a model"
            )
        else:
            own.copy_(old[...])


def parts_of(model: nn.Module) -> dict[int, RowShard]:
    """Return this rank's parts of sharded tables, by `id` of the weight."""
    return {id(table.weight): table.part for table in shared_tables_of(model) if table.part is not None}


@torch.no_grad()
def copy_old_rows(own: Tensor, old: RowSource, rows: Tensor, part: RowShard | None = None) -> None:
    """Copy retained rows of an old table into a new one; a boolean mask is combined with "or" instead of replaced.

    Args:
        own: the new table, or this rank's part of it; changed in place.
        old: the whole old table; only the needed rows are read.
        rows: the new code of every old row, int64 [old N]; -1 for a removed row.
        part: describes which part of the new table `own` is; None if it is the whole table.
    """
    total, first = (len(own), 0) if part is None else (part.rows, part.own.start)
    extra = len(old) - len(rows)  # extra rows stay at the end
    to = torch.cat([rows, torch.arange(total - extra, total)])
    kept = ((to >= first) & (to < first + len(own))).nonzero().squeeze(1)
    for some in torch.split(kept, BLOCK_ROWS):
        places, values = (to[some] - first).to(own.device), old[some].to(own.device, own.dtype)
        own[places] = own[places] | values if own.dtype == torch.bool else values


def continue_optimizer(
    optimizer: TableOptimizer,
    saved: Mapping[str, Any],
    maps_of: Mapping[int, Tensor],
    parts: Mapping[int, RowShard] | None = None,
) -> tuple[int, int]:
    """Load an old optimizer's state, row by row for tables that have grown.

    New rows start without state, like every row that a step updates for the first time.

    Args:
        optimizer: the new model's optimizer, with groups from `parameter_groups`.
        saved: the old optimizer's state dict.
        maps_of: row maps by `id` of the parameter.
        parts: this rank's parts of sharded tables, from `parts_of`.

    Returns:
        The number of parameters that keep their state, and the number that had state. A parameter loses its state if
        the update rule of its group has changed or the shapes do not match.
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
                    copy_old_rows(value, old[key], rows, part)
            optimizer.state[parameter] = fresh
            done += 1
    return done, count


def _whole_shape(value: Tensor, part: RowShard | None) -> torch.Size:
    return value.shape if part is None or value.ndim == 0 else torch.Size(part.whole_shape(value))


@torch.no_grad()
def continue_objective(objective: Objective, saved: Mapping[str, RowSource], items: Tensor) -> None:
    """Load an old objective's state: learned scalars, and streaming frequencies with the gaps of retained items.

    State that training refills, such as a cross-batch memory or mined items, starts empty.

    Args:
        objective: the new model's objective; changed in place.
        saved: the old objective's state dict.
        items: int64 [old N], the new code of each old item.
    """
    for name, parameter in objective.named_parameters():
        if name in saved and saved[name].shape == parameter.shape:
            parameter.copy_(saved[name][...])
    for name, module in objective.named_modules(remove_duplicate=False):
        if isinstance(module, StreamingFrequency) and f"{name}.gap" in saved:
            keys = [key for key in ("gap", "last", "gaps", "clock") if f"{name}.{key}" in saved]
            continue_streaming(module, {key: saved[f"{name}.{key}"][...] for key in keys}, items)


@torch.no_grad()
def continue_streaming(frequency: StreamingFrequency, saved: Mapping[str, Tensor], items: Tensor) -> None:
    """Load an old estimate: retained items keep their gap and last occurrence; new items count as unseen.

    A new item could not occur before, so its first gap is counted from this point, not over all rows of the old model.

    Raises:
        InputError: the saved estimate is for a different catalog.
    """
    if saved["gap"].shape != (1, len(items)):
        raise InputError(
            f"frequency: expected an estimate for {len(items)} items, found {list(saved['gap'].shape)}; "
            "set objective.frequency to counted, or train from scratch"
        )
    kept = (items >= 0).nonzero().squeeze(1)
    frequency.gap[:, items[kept]] = saved["gap"][:, kept]
    frequency.last.fill_(float(saved["clock"]))
    frequency.last[:, items[kept]] = saved["last"][:, kept]
    # Older versions did not count the gaps: treat them as fully averaged.
    gaps = saved["gaps"] if "gaps" in saved else torch.isfinite(saved["gap"]).double() / frequency.rate
    frequency.gaps[:, items[kept]] = gaps[:, kept].to(frequency.gaps)
    frequency.clock.copy_(saved["clock"])


class ContinueOptimizer(Callback):
    """A callback that loads the optimizer state of the parent model before the first step.

    Args:
        rows: row maps from `row_maps`, by tensor name.
        state: the old optimizer's state dict.
        on_message: receives a message if part of the state cannot be used.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], state: Mapping[str, Any], on_message: Callable[[object], None] | None = None
    ) -> None:
        self.rows, self.state, self.on_message = rows, state, on_message

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Load the parent's state; a resumed run is then restored from its own checkpoint."""
        towers: nn.Module = pl_module.towers  # type: ignore[assignment]
        named = dict(towers.named_parameters(remove_duplicate=False))
        maps = {id(named[name]): rows for name, rows in self.rows.items() if name in named}
        for optimizer in trainer.optimizers:
            assert isinstance(optimizer, TableOptimizer)
            done, count = continue_optimizer(optimizer, self.state, maps, parts_of(towers))
            if done < count and self.on_message is not None:
                self.on_message(
                    f"optimizer: {count - done} of {count} tensors start without state: their update rule changed"
                )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


#: Beginning of the message shown if only weights are inherited.
WEIGHTS_ONLY = "optimizer and objective start from scratch; only weights are inherited"


@dataclass(frozen=True)
class WarmFeatures:
    """The features of items, queries and context, extended to the new rows, and the maps from old to new codes.

    Attributes:
        features: encoded features by side, for sides that have any.
        maps: code maps of queries, items and feature values.
        num_queries, num_items: Q and N of the new model.
    """

    features: dict[str, EncodedTable]
    maps: CodeMaps
    num_queries: int
    num_items: int


def extend_features(parent: ParentModel, split: ContinuedSplit) -> WarmFeatures:
    """Extend the parent's fitted features to the new rows; see `incremental.features.extend_encoded_table`."""
    train = split.train
    sides: dict[str, tuple[Any, Vocabulary, pl.DataFrame | None, NDArray[np.bool_]]] = {
        "item": (split.item_map, train.items, split.new_item_table, train.item_counts() > 0),
        "query": (split.query_map, train.queries, train.query_table, np.diff(train.offsets) > 0),
    }
    features, values = {}, {}
    for old in parent.artifact.towers.feature_tables():
        side = old.features.side
        if side == "context":
            one = extend_encoded_context(old.features, train, ~split.learnt)
        else:
            codes, ids, table, known = sides[side]
            one = extend_encoded_table(old, codes, table, ids, known)
        features[side] = one.table
        values[side] = {place: torch.tensor(rows) for place, rows in one.value_maps.items()}
    maps = CodeMaps(torch.tensor(split.query_map), torch.tensor(split.item_map), values)
    return WarmFeatures(features, maps, train.num_queries, train.num_items)


def load_parent_state(
    parent: ParentModel,
    config: Config,
    growth: WarmFeatures,
    *,
    towers: TwoTower,
    objective: Objective,
    ranks: Communicator | None = None,
    on_message: Callable[[object], None] | None = None,
) -> ContinueOptimizer | None:
    """Load the parent's weights and state into fresh towers and a fresh objective, both changed in place; collective.

    Every rank must call it. Each rank reads only its own rows of sharded tables; optimizer state is read when training
    starts. The ranks jointly check that the checkpoint matches the model, each rank on its share of the rows.

    Args:
        parent: the model to continue.
        config: the settings.
        growth: the result of `extend_features`.
        towers: the freshly built towers.
        objective: the freshly built objective.
        ranks: the processes of the run; None for a single process.
        on_message: receives a message if the state of the optimizer and the objective cannot be inherited.

    Returns:
        The callback that loads the parent's optimizer state; None if that state is not available.
    """

    def build(num_queries: int, num_items: int) -> TwoTower:
        few = {
            side: EncodedTable(one.features, [rows[:1] for rows in one.arrays]) for side, one in growth.features.items()
        }
        return build_towers(
            config,
            num_queries=num_queries,
            num_items=num_items,
            item_features=few.get("item"),
            query_features=few.get("query"),
            context=few.get("context"),
        )

    tables = named_tables(build, growth.num_queries, growth.num_items)
    rows = row_maps(towers, tables, growth.maps)
    ranks, old = ranks or Communicator(), parent.weights()
    grow(towers, old, rows)
    if parent.checkpoint is None or not parent.checkpoint.is_dir():
        if on_message is not None:
            on_message(f"{WEIGHTS_ONLY}: {parent.where} has no checkpoint (checkpoints/best.ckpt)")
        return None
    saved = open_checkpoint(parent.checkpoint)
    state: Mapping[str, RowSource] = saved["state_dict"]
    if not has_weights(state, old, ranks):
        if on_message is not None:
            on_message(f"{WEIGHTS_ONLY}: {parent.checkpoint} and the model have different weights")
        return None
    prefix = "objective."
    kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    continue_objective(objective, kept, growth.maps.items)
    return ContinueOptimizer(rows, saved["optimizer_states"][0], on_message)
