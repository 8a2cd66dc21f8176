"""Suggested feature declarations for the columns of a table or of the interactions, with reasons, for review.

Columns that leak the target are omitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import time
from typing import Any

import numpy as np
import polars as pl
import yaml

from twotower.config.features import (
    AnyFeature,
    CategoricalFeature,
    DenseFeature,
    MultiFeature,
    NumericFeature,
    TextFeature,
    TimestampFeature,
)
from twotower.data.interactions import Interactions
from twotower.errors import InputError
from twotower.features.parsing import ErrorLocation, as_times

#: A column of whole numbers with at most this many distinct values is treated as a code (gender, store, rating).
FEW_VALUES = 32
#: More distinct values than this are hashed to this many buckets, because most are too rare to learn their own vectors.
MANY_VALUES = 10_000
#: Above this fraction of missing values, a column contains too little information.
MOSTLY_MISSING = 0.95
#: Above this fraction of distinct values, a column of single words identifies rows instead of describing them.
MOSTLY_UNIQUE = 0.5
SEPARATORS = ("|", ";", ",", " ")
#: Integer lists that all have the same length, at least this one, are vectors; other integer lists are sets of codes.
VECTOR_LENGTH = 8
#: Above this skewness, the logarithm is proposed for nonnegative numbers.
SKEWED = 2.0


@dataclass(frozen=True)
class FeatureSuggestion:
    """The proposal for one column.

    Attributes:
        column: the column's name.
        declared: the proposed feature, or None to omit the column.
        why: the reason, in a few words.
        distinct: number of distinct values; None for lists.
        missing: fraction of rows without a value.
    """

    column: str
    declared: AnyFeature | None
    why: str
    distinct: int | None
    missing: float

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        declared = None if self.declared is None else self.declared.model_dump(mode="json", exclude_defaults=True)
        kind = None if self.declared is None else self.declared.kind
        return {
            "column": self.column,
            "kind": kind,
            "why": self.why,
            "distinct": self.distinct,
            "missing": round(self.missing, 4),
            "feature": None if declared is None else {"column": self.column, "kind": kind, **declared},
        }


def propose(table: pl.DataFrame) -> list[FeatureSuggestion]:
    """Propose a feature, or none, for every column of a feature table except the first, which is the id."""
    return [propose_column(column) for column in table.get_columns()[1:]]


def features_of(proposed: list[FeatureSuggestion]) -> list[AnyFeature]:
    """Return the proposed features, without the omitted columns."""
    return [one.declared for one in proposed if one.declared is not None]


#: Configuration section and setting of each side's features.
SETTINGS = {
    "item": ("item_tower", "features"),
    "query": ("query_tower", "features"),
    "context": ("query_tower", "context"),
}


def as_yaml(found: Mapping[str, list[FeatureSuggestion]]) -> str:
    """Format the proposals of each side ("item", "query", "context") as configuration YAML."""
    sections: dict[str, list[str]] = {}
    for side, proposed in found.items():
        section, setting = SETTINGS[side]
        entries = [one.to_dict()["feature"] for one in proposed if one.declared is not None]
        lines = [yaml.safe_dump(one, default_flow_style=True, sort_keys=False, width=1000).strip() for one in entries]
        body = "".join(f"\n    - {line}" for line in lines) if lines else " none"
        sections.setdefault(section, []).append(f"  {setting}:{body}")
    return "\n".join("\n".join([f"{section}:", *parts]) for section, parts in sections.items())


def propose_column(column: pl.Series) -> FeatureSuggestion:
    """Propose a feature, or none, for one column."""
    nested = column.dtype.is_nested()
    known = column.drop_nulls()
    if column.dtype.is_float():
        known = known.drop_nans()
    if column.dtype == pl.String:
        known = known.filter(known.str.strip_chars() != "")
    missing = 1 - len(known) / max(len(column), 1)
    distinct = None if nested else known.n_unique()
    declared: AnyFeature | None = None
    if not len(known):
        why = "no values"
    elif missing > MOSTLY_MISSING:
        why = f"missing in {missing:.0%} of the rows"
    elif distinct == 1:
        why = "the same value in every row"
    elif nested:
        declared, why = _propose_list(known)
    elif column.dtype.is_temporal():
        dated = column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime)
        declared, why = (TimestampFeature(column=column.name), "dates") if dated else (None, f"type {column.dtype}")
    elif column.dtype == pl.Boolean:
        declared, why = CategoricalFeature(column=column.name), "true or false"
    elif column.dtype.is_numeric():
        declared, why = _propose_number(known, distinct or 0)
    elif column.dtype in (pl.String, pl.Categorical, pl.Enum):
        declared, why = _propose_text(known.cast(pl.String), distinct or 0)
    else:
        why = f"type {column.dtype}"
    return FeatureSuggestion(column.name, declared, why, distinct, missing)


def _propose_list(known: pl.Series) -> tuple[AnyFeature | None, str]:
    if isinstance(known.dtype, pl.Array):
        known = known.arr.to_list()
    if not isinstance(known.dtype, pl.List) or known.dtype.inner.is_nested():
        return None, f"type {known.dtype}"
    lengths = known.list.len()
    longest: Any = lengths.max()
    inner: Any = known.dtype.inner
    if inner.is_float() or (inner.is_numeric() and lengths.n_unique() == 1 and longest >= VECTOR_LENGTH):
        if lengths.n_unique() == 1:
            return DenseFeature(column=known.name), f"vectors of {longest} numbers"
        return None, "lists of numbers of different lengths"
    values = known.list.explode().drop_nulls().n_unique()
    return MultiFeature(column=known.name, **_buckets(values)), f"lists, {values:,} values"


def _propose_number(known: pl.Series, distinct: int) -> tuple[AnyFeature | None, str]:
    whole = known.dtype.is_integer() or bool((known == known.floor()).all())
    if whole and distinct <= FEW_VALUES:
        return CategoricalFeature(column=known.name), f"whole numbers, only {distinct} values"
    if whole and distinct == len(known):
        return None, "whole numbers, different in every row: looks like an id"
    skewness: Any = known.cast(pl.Float64).skew()
    smallest: Any = known.min()
    if skewness is not None and skewness > SKEWED and smallest >= 0:
        return NumericFeature(column=known.name, scale="log"), f"numbers, skewed ({skewness:.1f}): use the logarithm"
    return NumericFeature(column=known.name), "numbers"


def _propose_text(known: pl.Series, distinct: int) -> tuple[AnyFeature | None, str]:
    name = known.name
    try:
        as_times(known, ErrorLocation(""))
    except InputError:
        pass
    else:
        return TimestampFeature(column=name), "dates as text"
    words = known.str.extract_all(r"[\p{L}\p{N}]+")
    for separator in SEPARATORS:
        holds = known.str.contains(separator, literal=True)
        parts = known.str.split(separator).list.eval(pl.element().str.strip_chars()).list.explode().drop_nulls()
        # Several values per row: many rows contain the separator, and the same parts occur in other rows.
        values = parts.n_unique()
        if float(holds.mean() or 0) > 0.2 and values < min(distinct / 2, 0.2 * len(parts)):  # type: ignore[arg-type]
            declared = MultiFeature(column=name, separator=separator, **_buckets(values))
            return declared, f"several values separated by {separator!r}, {values:,} values"
    per_row = float(words.list.len().mean() or 0)  # type: ignore[arg-type]
    if distinct > MOSTLY_UNIQUE * len(known):
        if per_row >= 2:
            return TextFeature(column=name), f"text, {per_row:.1f} words per row"
        return None, f"{distinct:,} values in {len(known):,} rows: identifies rows instead of describing them"
    return CategoricalFeature(column=name, **_buckets(distinct)), f"text, {distinct:,} values"


def _buckets(values: int) -> dict[str, Any]:
    return {"buckets": MANY_VALUES} if values > MANY_VALUES else {}


#: Number of rows sampled to determine what a column depends on.
SAMPLE = 200_000
#: If more than this fraction of rows have the value that is most frequent for their item, the column describes the
#: item, unless a single value is that frequent in the whole column.
SETTLED = 0.95
#: If values have fewer queries than this on average, the column identifies queries or sessions.
QUERIES_PER_VALUE = 1.5


def propose_context(data: Interactions) -> list[FeatureSuggestion]:
    """Propose a feature, or none, for every context column.

    A column determined by the item, such as a price or a title in a log, is omitted: requests do not have the column,
    and a model that reads it in training learns nothing else. A column that identifies sessions is omitted too. Columns
    whose values are known only afterwards, such as a quantity, cannot be detected here; remove them by hand.
    """
    if data.context is None:
        return []
    return [_propose_context_column(data, data.context[name]) for name in data.context.columns]


def _propose_context_column(data: Interactions, column: pl.Series) -> FeatureSuggestion:
    found = propose_column(column)
    declared = found.declared
    if declared is None:
        return found
    if isinstance(declared, TimestampFeature):
        midnight = column.dtype == pl.Date or (
            isinstance(column.dtype, pl.Datetime) and bool((column.dt.time() == time(0)).all())
        )
        parts = ["weekday"] if midnight else ["hour", "weekday"]
        # The age is omitted, because every request is later than the training data.
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
    # An item with a single row always has its most frequent value, so it provides no evidence.
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
