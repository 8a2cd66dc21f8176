"""What a model folder keeps so that a training can go on with it: rows, the test, where it all comes from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config import Config
from twotower.continuing.kept import has_validation, holdout_of
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
        of all rows, where there are any. After a continued training also its test (`test.*`) and its validation
        (`validation.*`), which no reading of the new days alone could make again.
    """
    data, train = split.data, split.train
    counts = np.diff(train.offsets)
    rows, _ = take_ranges(data.offsets[:-1], np.minimum(data.offsets[:-1] + counts, data.offsets[1:]))
    first = len(rows) == len(train) and bool(np.array_equal(data.item_codes[rows], train.item_codes))
    # Where training rows are not the first ones of their query, all count as learnt: none is learnt twice.
    found: dict[str, NDArray[Any]] = {"learnt": counts if first else np.diff(data.offsets)}
    found |= {name: np.asarray(getattr(data, name)) for name in CARRIED if getattr(data, name) is not None}
    if isinstance(split, ContinuedSplit):
        for held in (split.test, split.validation):
            found[f"{held.name}.queries"] = held.queries
            found[f"{held.name}.history"] = np.diff(held.history_offsets)
            found[f"{held.name}.offsets"], found[f"{held.name}.items"] = held.target_offsets, held.target_items
            if held.query_times is not None:
                found[f"{held.name}.times"] = held.query_times
    return found


def contexts_of(split: Split, config: Config) -> dict[str, pl.DataFrame]:
    """What a model folder keeps of the context of its rows; nothing without one.

    Returns:
        `context` of all rows; of a continued model `test_context` too: of the questions of its test, then of those of
        its validation.
    """
    columns = wanted_context(config)
    found: dict[str, pl.DataFrame] = {}
    if columns is None or isinstance(columns, str) or split.data.context is None:
        return found
    found["context"] = split.data.context.select(columns)
    if isinstance(split, ContinuedSplit):
        asked = [held.context.select(columns) for held in (split.test, split.validation) if held.context is not None]
        if asked:
            found["test_context"] = pl.concat(asked)
    return found


def split_again(
    artifact: Artifact,
    rows: Mapping[str, NDArray[Any]],
    context: pl.DataFrame | None = None,
    test_context: pl.DataFrame | None = None,
) -> Split:
    """The split of a continued training, from its model folder alone.

    Args:
        artifact: the model.
        rows: `rows_of` its split. Where an older version wrote them, the validation is not there: it is empty here.
        context: of all rows, as in `contexts_of` its split.
        test_context: of its questions, likewise.

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
    count = len(rows["test.queries"])
    asked = (None, None) if test_context is None else (test_context[:count], test_context[count:])
    told = artifact.metadata["split"]
    return Split(
        train,
        holdout_of("validation", rows, data, asked[1]) if has_validation(rows) else Holdout.empty("validation"),
        holdout_of("test", rows, data, asked[0]),
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
