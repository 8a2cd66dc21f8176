"""What a model folder keeps so that a training can go on with it: rows, the test, where it all comes from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config import Config
from twotower.continuing.parent import Parent
from twotower.data import Holdout, Interactions, Split
from twotower.data.account import Account
from twotower.data.declaring import wanted_context
from twotower.data.histories import take_ranges
from twotower.data.past import CARRIED, ContinuedSplit
from twotower.errors import InputError
from twotower.schema import Vocabulary
from twotower.serving.artifact import Artifact


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


def contexts_of(split: Split, config: Config) -> dict[str, pl.DataFrame]:
    """What a model folder keeps of the context of its rows, and of a continued model's test; nothing without one."""
    columns = wanted_context(config)
    found: dict[str, pl.DataFrame] = {}
    if columns is None or isinstance(columns, str) or split.data.context is None:
        return found
    found["context"] = split.data.context.select(columns)
    if isinstance(split, ContinuedSplit) and split.test.context is not None:
        found["test_context"] = split.test.context.select(columns)
    return found


def split_again(
    artifact: Artifact,
    rows: Mapping[str, NDArray[Any]],
    context: pl.DataFrame | None = None,
    test_context: pl.DataFrame | None = None,
) -> Split:
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
        context=context,
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
        test_context,
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
