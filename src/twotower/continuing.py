"""Training that goes on with a model on new days: what is taken over from the model, and what it is joined with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from twotower.config import Config
from twotower.data import Holdout, Interactions, Split
from twotower.data.account import Account
from twotower.data.encoding import EncodedTable
from twotower.data.growing import grown
from twotower.data.histories import take_ranges
from twotower.data.joining import continued
from twotower.data.past import CARRIED, ContinuedSplit, Past
from twotower.data.reading import open_source
from twotower.errors import InputError
from twotower.losses import Objective
from twotower.schema import USUAL_NAMES, IdValues, Vocabulary, ids_of, listed, usual_column
from twotower.serving.artifact import Artifact, find_model, load_rows
from twotower.towers import TwoTower, build_towers
from twotower.training import FitResult
from twotower.training.checkpoints import SafeCheckpointIO
from twotower.training.continuing import ContinueOptimizer, Maps, continue_objective, grow, named_tables, row_maps

#: Settings of the towers that may be changed when a training goes on: no tensor depends on them.
FREE = ("dropout", "id_dropout")


@dataclass(frozen=True)
class Parent:
    """The model that a training goes on with.

    Attributes:
        artifact: the model.
        checkpoint: where the state of its optimizer is, if it is still there.
        where: what messages and the lineage call it.
    """

    artifact: Artifact
    checkpoint: Path | None
    where: str

    @classmethod
    def load(cls, directory: str | Path) -> Parent:
        """From a run folder, or a model folder alone, whose optimizer state is not at hand.

        Raises:
            InputError: see `Artifact.load`.
        """
        folder = find_model(directory)
        artifact = Artifact.load(folder)
        best = folder.parent / "checkpoints" / "best.ckpt"
        known = load_rows(folder)
        return cls(replace(artifact, rows=known), best if best.is_dir() else None, str(Path(directory).resolve()))

    @property
    def fingerprint(self) -> str:
        """Of its data."""
        return str(self.artifact.metadata["data"]["fingerprint"])

    def past(self) -> Past:
        """What it was trained on. A model of an older version does not tell which rows: all of them count as learnt."""
        model, rows = self.artifact, self.artifact.rows or {}
        times = rows.get("timestamps")
        names = model.metadata["data"].get("groups")
        return Past(
            model.queries,
            model.items,
            np.asarray(model.history_offsets, dtype=np.int64),
            np.asarray(model.history_items),
            np.asarray(rows.get("learnt", np.diff(model.history_offsets))),
            {name: np.asarray(rows[name]) for name in CARRIED if name in rows},
            None if names is None else Vocabulary(names),
            model.item_table,
            self.fingerprint,
            None if times is None or not len(times) else int(np.max(times)),
        )


class Fitted(Protocol):
    """A model in memory, such as `twotower.Model`."""

    @property
    def artifact(self) -> Artifact: ...  # noqa: D102
    @property
    def fit(self) -> FitResult: ...  # noqa: D102


def parent_of(start: Fitted | Parent | str | Path | None) -> Parent | None:
    """The parent that a model, or its folder, is; None for none.

    Raises:
        InputError: see `Parent.load`.
    """
    if start is None or isinstance(start, Parent):
        return start
    if isinstance(start, str | Path):
        return Parent.load(start)
    return Parent(start.artifact, start.fit.checkpoint, "a model in memory")


def checked(split: Split) -> ContinuedSplit:
    """A split that is known to be one of new days."""
    assert isinstance(split, ContinuedSplit)
    return split


def rows_to_learn(split: Split, parent: Parent | None, settings: Config) -> NDArray[np.int64] | None:
    """Rows of `split.train` that a continued training goes through; None for a training from the beginning.

    Raises:
        InputError: split and parent do not belong together.
    """
    if parent is None and not isinstance(split, ContinuedSplit):
        return None
    if parent is None or not isinstance(split, ContinuedSplit) or split.parent != parent.fingerprint:
        raise InputError(
            "fit: to go on with a model, give start=MODEL and the split that continue_with(MODEL, data) makes"
        )
    history = settings.query_tower.history
    whole = history is not None and history.sequence is not None
    return split.rows_to_learn(settings.training.replay, settings.training.seed, whole=whole)


def new_days(
    parent: Parent,
    data: Interactions,
    config: Config,
    split: Callable[[Interactions], Split],
    *,
    withdrawn: IdValues | None = None,
) -> ContinuedSplit:
    """What `fit(start=...)` trains on: the parent's past and new interactions; see `data.joining.continued`."""
    cold: Any = "keep" if config.data.split == "leave-last-out" else "drop"
    return continued(parent.past(), data, split, withdrawn=withdrawn, catalog=config.data.catalog, cold=cold)


def read_withdrawn(path: str | Path, kind: pl.DataType) -> pl.Series:
    """Item ids from a file: one a line, or a table with an item column.

    Args:
        path: `.txt` with one id a line, or Parquet, CSV or TSV.
        kind: of the model's item ids, Int64 or String.

    Raises:
        InputError: not readable, no item column, or an id that cannot be one of the model's.
    """
    file = Path(path)
    if file.suffix.lower() == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not readable as text ({error}); expected one item id a line") from None
        ids = pl.Series("id", [line.strip() for line in lines if line.strip()], dtype=pl.String)
    else:
        source = open_source(file)
        name = usual_column(source.columns, USUAL_NAMES["item"], "item", source.name)
        if name is None and len(source.columns) == 1:
            name = source.columns[0]
        if name is None:
            raise InputError(f"{file}: no item id column; found {listed(source.columns)}")
        ids = ids_of(pl.concat(source.chunks([name]))[name].drop_nulls(), f"{file}: column {name!r}")
    if ids.dtype != kind:
        cast = ids.cast(kind, strict=False)
        if cast.null_count():
            row = int(cast.is_null().arg_true()[0])
            raise InputError(f"{file}: row {row + 1}: {ids[row]!r} is no item id of the model, whose ids are integers")
        ids = cast
    return ids.alias("id")


def settled(parent: Config, config: Config) -> Config:
    """Settings of a continued training: features left to "auto" are the parent's.

    Raises:
        InputError: what would need other weights than the parent's differs; it is named.
    """
    changed = {}
    for section in ("query_tower", "item_tower"):
        own, theirs = getattr(config, section), getattr(parent, section)
        if own.features == "auto":
            taken: dict[str, Any] = {"features": theirs.features}
            if section == "item_tower" and theirs.features == "none":
                taken["id_dropout"] = 0.0
            changed[section] = own.model_copy(update=taken)
    config = config.model_copy(update=changed)
    old, new = parent.model_dump(mode="json"), config.model_dump(mode="json")
    for section in ("query_tower", "item_tower"):
        found = _difference(old[section], new[section], section)
        if found is not None:
            raise InputError(f"{found}; what the towers are made of cannot be changed when a training is continued")
    first, second = old["objective"], new["objective"]
    if first["similarity"] != second["similarity"]:
        raise InputError(
            f"objective.similarity: {first['similarity']} in the model, {second['similarity']} here; it cannot be "
            "changed when a training is continued"
        )
    if (first["temperature"] == "learned") != (second["temperature"] == "learned"):
        raise InputError(
            f"objective.temperature: {first['temperature']} in the model, {second['temperature']} here; a learned one "
            "goes on as learned, a fixed one as fixed"
        )
    return config


def _difference(old: Any, new: Any, name: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if key not in FREE:
                found = _difference(old.get(key), new.get(key), f"{name}.{key}")
                if found is not None:
                    return found
        return None
    return None if old == new else f"{name}: {old!r} in the model, {new!r} here"


@dataclass(frozen=True)
class Grown:
    """The features of both sides with the new rows, and where old codes have gone.

    Attributes:
        features: by side; a side without features is absent.
        maps: of queries, items and feature values.
        num_queries, num_items: Q and N of the new model.
    """

    features: dict[str, EncodedTable]
    maps: Maps
    num_queries: int
    num_items: int


def grown_features(parent: Parent, split: ContinuedSplit) -> Grown:
    """The parent's fitted features on the new rows as well; see `data.growing.grown`."""
    train = split.train
    sides: dict[str, tuple[Any, Vocabulary, pl.DataFrame | None, NDArray[np.bool_]]] = {
        "item": (split.item_map, train.items, split.new_item_table, train.item_counts() > 0),
        "query": (split.query_map, train.queries, train.query_table, np.diff(train.offsets) > 0),
    }
    features, values = {}, {}
    for old in parent.artifact.towers.feature_tables():
        side = old.features.side
        codes, ids, table, known = sides[side]
        one = grown(old, codes, table, ids, known)
        features[side] = one.table
        values[side] = {place: torch.tensor(rows) for place, rows in one.value_maps.items()}
    maps = Maps(torch.tensor(split.query_map), torch.tensor(split.item_map), values)
    return Grown(features, maps, train.num_queries, train.num_items)


def carry_on(
    parent: Parent, config: Config, growth: Grown, *, towers: TwoTower, objective: Objective
) -> ContinueOptimizer | None:
    """Put what the parent has learnt into fresh towers and a fresh objective, both changed in place.

    Returns:
        What brings the optimizer to where the parent's was; None where its state is not at hand.
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
        )

    tables = named_tables(build, growth.num_queries, growth.num_items)
    rows = row_maps(towers, tables, growth.maps)
    old = parent.artifact.towers.state_dict()
    grow(towers, old, rows)
    if parent.checkpoint is None or not parent.checkpoint.is_dir():
        return None
    saved = SafeCheckpointIO().load_checkpoint(parent.checkpoint)
    state: Mapping[str, torch.Tensor] = saved["state_dict"]
    # The checkpoint goes with the model only where it holds the same weights.
    if any(f"towers.{name}" not in state or not torch.equal(state[f"towers.{name}"], own) for name, own in old.items()):
        return None
    prefix = "objective."
    kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    continue_objective(objective, kept, growth.maps.items)
    return ContinueOptimizer(rows, saved["optimizer_states"][0])


def rows_of(split: Split) -> dict[str, NDArray[Any]]:
    """What a model folder keeps of its rows, so that a training can go on with it.

    Returns:
        `learnt`: how many rows of each query, from the first, it was trained on; `timestamps`, `weights` and `groups`
        of all rows, where there are any. After a continued training also its test (`test.*`), which no reading of the
        new days alone could make again.
    """
    data, train = split.data, split.train
    counts = np.diff(train.offsets)
    rows, _ = take_ranges(data.offsets[:-1], np.minimum(data.offsets[:-1] + counts, data.offsets[1:]))
    first = len(rows) == len(train) and bool(np.array_equal(data.item_codes[rows], train.item_codes))
    # Where training rows are not the first ones of their query, all count as learnt: none is learnt twice.
    found: dict[str, NDArray[Any]] = {"learnt": counts if first else np.diff(data.offsets)}
    found |= {name: np.asarray(getattr(data, name)) for name in CARRIED if getattr(data, name) is not None}
    if isinstance(split, ContinuedSplit):
        test = split.test
        found["test.queries"] = test.queries
        found["test.history"] = np.diff(test.history_offsets)
        found["test.offsets"], found["test.items"] = test.target_offsets, test.target_items
        if test.query_times is not None:
            found["test.times"] = test.query_times
    return found


def split_again(artifact: Artifact, rows: Mapping[str, NDArray[Any]]) -> Split:
    """The split of a continued training, from its model folder alone; its validation is not kept.

    Raises:
        InputError: the folder does not hold the rows.
    """
    needed = ("learnt", "test.queries", "test.history", "test.offsets", "test.items")
    if any(name not in rows for name in needed):
        raise InputError(
            "rows.safetensors: the model folder does not say what was held out; continue the training again"
        )
    names = artifact.metadata["data"].get("groups")
    data = Interactions(
        artifact.queries,
        artifact.items,
        np.asarray(artifact.history_offsets, dtype=np.int64),
        np.asarray(artifact.history_items),
        timestamps=rows.get("timestamps"),
        weights=rows.get("weights"),
        groups=rows.get("groups"),
        group_names=None if names is None else Vocabulary(names),
        item_table=artifact.item_table,
        known_fingerprint=artifact.metadata["data"]["fingerprint"],
    )
    place = np.arange(len(data)) - np.repeat(data.offsets[:-1], np.diff(data.offsets))
    train = data.select(place < np.repeat(rows["learnt"], np.diff(data.offsets)))
    starts = data.offsets[rows["test.queries"]]
    history, offsets = take_ranges(starts, starts + rows["test.history"])
    test = Holdout(
        "test",
        np.asarray(rows["test.queries"]),
        offsets,
        np.asarray(data.item_codes[history]),
        np.asarray(rows["test.offsets"]),
        np.asarray(rows["test.items"]),
        None if data.timestamps is None else np.asarray(data.timestamps[history]),
        rows.get("test.times"),
    )
    told = artifact.metadata["split"]
    return Split(
        train,
        Holdout.empty("validation"),
        test,
        Account.from_dict(told["account"]),
        told["name"],
        told["settings"],
        data,
    )


def lineage(parent: Parent | None, split: Split, learnt: int, replayed: int) -> list[dict[str, Any]]:
    """Every training that went into a model, oldest first: parent, rows, dates, JSON values."""
    before: list[dict[str, Any]] = [] if parent is None else list(parent.artifact.metadata["data"].get("lineage", []))
    times = split.data.timestamps
    dates = None if times is None or not len(times) else (int(np.min(times)), int(np.max(times)))
    if isinstance(split, ContinuedSplit):
        dates = split.dates
    return [
        *before,
        {
            "parent": None if parent is None else {"model": parent.where, "fingerprint": parent.fingerprint},
            "rows_learnt": learnt,
            "rows_replayed": replayed,
            "queries": split.train.num_queries,
            "items": split.train.num_items,
            "items_withdrawn": int((split.item_map < 0).sum()) if isinstance(split, ContinuedSplit) else 0,
            "first": None if dates is None else _day(dates[0]),
            "last": None if dates is None else _day(dates[1]),
        },
    ]


def _day(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, tz=UTC).isoformat(timespec="seconds")
