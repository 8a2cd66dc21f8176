"""Contents of a model folder that continued training needs: rows, holdouts and lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.run import Config
from twotower.data import Holdout, Interactions, Split
from twotower.data.interactions import EventColumn
from twotower.data.loading.histories import take_ranges
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError
from twotower.features.from_config import context_to_read, exposure_columns
from twotower.incremental.parent import ParentModel
from twotower.incremental.saved_rows import has_validation, holdout_of
from twotower.incremental.split import CARRIED, ContinuedSplit
from twotower.serving.model_folder import SavedModel


def saved_rows_of(split: Split, trained: NDArray[np.int64] | None = None) -> dict[str, NDArray[Any]]:
    """Collect the row data that a model folder stores for continued training and for the audit.

    Args:
        split: the data.
        trained: indices of the rows of `split.train` that an incremental run was trained on; None for all.

    Returns:
        `learnt`, how many rows of each query, counted from its first, the model was trained on; and `timestamps`,
        `weights` and `groups` of all rows, if the data has them. After incremental training, also the test (`test.*`)
        and validation (`validation.*`), which cannot be recreated from the new data alone, and `trained`, the indices
        of the rows of `split.train` that the model was trained on.
    """
    data, train = split.data, split.train
    counts = np.diff(train.offsets)
    rows, _ = take_ranges(data.offsets[:-1], np.minimum(data.offsets[:-1] + counts, data.offsets[1:]))
    first = len(rows) == len(train) and bool(np.array_equal(data.item_codes[rows], train.item_codes))
    # If the training rows are not the first rows of their query, all rows count as learnt, so none is learnt twice.
    found: dict[str, NDArray[Any]] = {"learnt": counts if first else np.diff(data.offsets)}
    found |= {name: np.asarray(getattr(data, name)) for name in CARRIED if getattr(data, name) is not None}
    if trained is not None and first:
        found["trained"] = trained
    if isinstance(split, ContinuedSplit):
        for held in (split.test, split.validation):
            found[f"{held.name}.queries"] = held.queries
            found[f"{held.name}.history"] = np.diff(held.history_offsets)
            found[f"{held.name}.offsets"], found[f"{held.name}.items"] = held.target_offsets, held.target_items
            if held.query_times is not None:
                found[f"{held.name}.times"] = held.query_times
            if held.query_groups is not None:
                found[f"{held.name}.groups"] = held.query_groups
    return found


def contexts_of(split: Split, config: Config) -> dict[str, pl.DataFrame]:
    """Collect the row contexts that a model folder stores; an empty dict without context.

    Returns:
        `context` of all rows; after incremental training, also `test_context` of the test queries followed by the
        validation queries.
    """
    columns = [name for name in context_to_read(config) or () if name not in exposure_columns(config)]
    found: dict[str, pl.DataFrame] = {}
    if not columns or split.data.context is None:
        return found
    found["context"] = split.data.context.select(columns)
    if isinstance(split, ContinuedSplit):
        frames = [held.context.select(columns) for held in (split.test, split.validation) if held.context is not None]
        if frames:
            found["test_context"] = pl.concat(frames)
    return found


def split_again(
    artifact: SavedModel,
    rows: Mapping[str, NDArray[Any]],
    context: pl.DataFrame | None = None,
    test_context: pl.DataFrame | None = None,
) -> Split:
    """Rebuild the split of an incremental run from the model folder alone.

    Args:
        artifact: the model.
        rows: the rows from `saved_rows_of`. Older versions saved no validation rows; the validation part is then empty.
        context: the context of all rows, from `contexts_of`.
        test_context: the context of the holdout queries, from `contexts_of`.

    Raises:
        InputError: the folder does not contain the rows.
    """
    needed = ("learnt", "test.queries", "test.history", "test.offsets", "test.items")
    if any(name not in rows for name in needed):
        raise InputError(
            "rows.safetensors: the model folder does not record what was held out; run the incremental training again"
        )
    names = artifact.metadata["data"].get("groups")
    events = artifact.config.data.events
    event = None if events is None or events.column is None else EventColumn(events.column, events.held_out)
    settings = artifact.config.data
    text = None if settings.texts_are_queries else settings.query_text
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
        event=event,
        query_text=text,
        known_fingerprint=artifact.metadata["data"]["fingerprint"],
        eligibility=artifact.eligibility,
    )
    place = np.arange(len(data)) - np.repeat(data.offsets[:-1], np.diff(data.offsets))
    train = data.select(place < np.repeat(rows["learnt"], np.diff(data.offsets)))
    count = len(rows["test.queries"])
    contexts = (None, None) if test_context is None else (test_context[:count], test_context[count:])
    saved = artifact.metadata["split"]
    column = None if event is None else event.column
    validation = Holdout.empty("validation")
    if has_validation(rows):
        validation = replace(holdout_of("validation", rows, data, contexts[1]), event=column, query_text=text)
    return Split(
        train,
        validation,
        replace(holdout_of("test", rows, data, contexts[0]), event=column, query_text=text),
        Account.from_dict(saved["account"]),
        saved["name"],
        saved["settings"],
        data,
    )


def lineage(parent: ParentModel | None, split: Split, learnt: int, replayed: int) -> list[dict[str, Any]]:
    """List the training runs that produced a model, oldest first, as JSON values: parent, rows, dates."""
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
