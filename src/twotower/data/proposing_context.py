"""Proposed context features from the further columns of the interactions; columns that leak the target are left out."""

from __future__ import annotations

from dataclasses import replace
from datetime import time

import numpy as np
import polars as pl

from twotower.data.interactions import Interactions
from twotower.data.proposing import FEW_VALUES, Proposed, propose_column
from twotower.feature_config import CategoricalFeature, TimestampFeature

#: Rows sampled to find out what a column depends on.
SAMPLE = 200_000
#: If more than this fraction of rows has the most frequent value of its item, the column describes the item.
SETTLED = 0.95
#: If a value has fewer queries than this on average, the column identifies queries or sessions.
QUERIES_PER_VALUE = 1.5


def propose_context(data: Interactions) -> list[Proposed]:
    """Propose a feature for every context column.

    A column that is determined by the item, such as a price or a title in a log, is left out: a request does not have
    it, and a model that reads it in training learns nothing else. A column that identifies sessions is left out too.
    Values known only afterwards, such as a quantity, cannot be detected here: leave them out by hand.
    """
    if data.context is None:
        return []
    return [_one(data, data.context[name]) for name in data.context.columns]


def _one(data: Interactions, column: pl.Series) -> Proposed:
    found = propose_column(column)
    declared = found.declared
    if declared is None:
        return found
    if isinstance(declared, TimestampFeature):
        midnight = column.dtype == pl.Date or (
            isinstance(column.dtype, pl.Datetime) and bool((column.dt.time() == time(0)).all())
        )
        parts = ["weekday"] if midnight else ["hour", "weekday"]
        # Without the age: every request is later than the training data.
        return replace(found, declared=TimestampFeature.model_validate({"column": column.name, "parts": parts}))
    rows = np.arange(len(data))
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))
    values = column.gather(rows)
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if isinstance(values.dtype, pl.List):
        values = values.list.eval(pl.element().cast(pl.String)).list.join("|")
    frame = pl.DataFrame({
        "value": values,
        "item": np.asarray(data.item_codes)[rows],
        "query": np.searchsorted(data.offsets, rows, side="right") - 1,
    }).drop_nulls()  # fmt: skip
    pairs = frame.group_by("item", "value").len()
    # Items with a single row always have their most frequent value, so they are not evidence.
    several = pairs.group_by("item").agg(pl.col("len").max().alias("most"), pl.col("len").sum().alias("rows"))
    several = several.filter(pl.col("rows") > 1)
    share = float(several["most"].sum()) / max(float(several["rows"].sum()), 1.0)
    usual = float(frame["value"].value_counts()["count"].max() or 0) / max(len(frame), 1)  # type: ignore[arg-type]
    if share > SETTLED and usual < SETTLED:
        why = f"determined by the item in {share:.0%} of the rows: it would leak the target"
        return replace(found, declared=None, why=why)
    distinct = found.distinct or 0
    if isinstance(declared, CategoricalFeature) and distinct > FEW_VALUES:
        per_value = float(frame.group_by("value").agg(pl.col("query").n_unique())["query"].mean() or 0)  # type: ignore[arg-type]
        if per_value < QUERIES_PER_VALUE:
            why = f"{distinct:,} values, {per_value:.1f} queries per value: identifies queries"
            return replace(found, declared=None, why=why)
    return found
