"""Which further columns of the interactions could be the context of a request, and which would tell the answer."""

from __future__ import annotations

from dataclasses import replace
from datetime import time

import numpy as np
import polars as pl

from twotower.data.interactions import Interactions
from twotower.data.proposing import FEW_VALUES, Proposed, propose_column
from twotower.feature_config import CategoricalFeature, TimestampFeature

#: Rows that are looked at for what a column goes with.
SAMPLE = 200_000
#: A column whose value is its item's usual one in more rows than this describes the item, not the request.
SETTLED = 0.95
#: A column whose values have fewer queries each than this, on average, names sessions.
QUERIES_PER_VALUE = 1.5


def propose_context(data: Interactions) -> list[Proposed]:
    """A proposal for every column of the context.

    A column that goes with the item, as a price or a title does that stands in a log, is left out: a request does not
    have it before it is answered, and a model that reads it in training learns nothing else. So is one that names
    sessions. What is known only afterwards, such as a quantity, cannot be told from a context: leave it out by hand.
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
        # Not the age: every request comes after the training.
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
    # An item in one row has a usual value whatever the column is.
    several = pairs.group_by("item").agg(pl.col("len").max().alias("most"), pl.col("len").sum().alias("rows"))
    several = several.filter(pl.col("rows") > 1)
    share = float(several["most"].sum()) / max(float(several["rows"].sum()), 1.0)
    usual = float(frame["value"].value_counts()["count"].max() or 0) / max(len(frame), 1)  # type: ignore[arg-type]
    if share > SETTLED and usual < SETTLED:
        return replace(found, declared=None, why=f"goes with the item in {share:.0%} of its rows: it tells the answer")
    distinct = found.distinct or 0
    if isinstance(declared, CategoricalFeature) and distinct > FEW_VALUES:
        per_value = float(frame.group_by("value").agg(pl.col("query").n_unique())["query"].mean() or 0)  # type: ignore[arg-type]
        if per_value < QUERIES_PER_VALUE:
            return replace(found, declared=None, why=f"{distinct:,} values, {per_value:.1f} queries each: names them")
    return found
