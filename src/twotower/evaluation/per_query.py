"""Results of a ranker, computed from its ranked lists: every metric per query, and means over queries and slices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twotower.data import Holdout
from twotower.errors import InputError
from twotower.evaluation.metrics import (
    coverage,
    diversity_at,
    exposure,
    gini,
    hit_rate_at,
    hits,
    list_mean,
    mrr_at,
    ndcg_at,
    recall_at,
    self_information,
)
from twotower.evaluation.results import Row
from twotower.evaluation.slices import Slice

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets that can be ranked, in compressed rows without repeats.

    Attributes:
        offsets: int64 [E+1], the offsets of each query's targets in `items`.
        items: int64, the item codes of the targets of all queries.
        removed: number of targets removed because they are in their query's history.
        not_eligible: number of targets removed because they were not eligible for their query (`Holdout.eligible`).
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    removed: int
    not_eligible: int = 0

    @classmethod
    def of(cls, holdout: Holdout, num_items: int, exclude_seen: bool) -> "Targets":
        """Collect the targets of a holdout; repeats count once.

        Raises:
            InputError: an item code is not in 0 .. N - 1, or a query lacks the group or time that eligibility needs.
        """
        every = np.unique(_pairs(holdout.target_offsets, holdout.target_items, num_items, f"{holdout.name}: targets"))
        rankable = every
        if exclude_seen:
            seen = _pairs(holdout.history_offsets, holdout.history_items, num_items, f"{holdout.name}: history")
            rankable = every[~_among(every, seen)]
        removed = len(every) - len(rankable)
        queries, items = np.divmod(rankable, num_items)
        if holdout.eligibility is not None:
            groups, times = holdout.query_groups, holdout.query_times
            holdout.eligibility.rows(groups, times)  # rejects queries without group or time
            fits = holdout.eligibility.allows(
                items, None if groups is None else groups[queries], None if times is None else times[queries]
            )
            queries, items = queries[fits], items[fits]
        offsets = np.zeros(len(holdout.target_offsets), dtype=np.int64)
        np.cumsum(np.bincount(queries, minlength=len(offsets) - 1), out=offsets[1:])
        return cls(offsets, items, removed, len(every) - removed - len(items))

    def sizes(self, part: Slice | None = None) -> NDArray[np.int64]:
        """Count the targets of each query, [E], within a slice if one is given."""
        rows = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        if part is not None and part.items is not None:
            rows = rows[part.items[self.items]]
        sizes = np.bincount(rows, minlength=len(self.offsets) - 1)
        return sizes if part is None or part.queries is None else sizes * part.queries


@dataclass(frozen=True, eq=False)
class EvaluationTask:
    """The targets, queries and slices that every ranker is measured on.

    Attributes:
        targets: the targets of each query.
        counted: bool [E], queries that are included in the means.
        ks: the cut-offs, ascending.
        slices: the slices by name.
        item_counts: [N] training interactions of each item.
    """

    targets: Targets
    counted: NDArray[np.bool_]
    ks: tuple[int, ...]
    slices: Mapping[str, Slice]
    item_counts: NDArray[np.int64]

    def size(self, part: Slice) -> dict[str, int]:
        """Return the size of a slice: its `items`, its `targets`, and the `queries` with a target in it."""
        sizes = self.targets.sizes(part)
        return {
            "items": len(self.item_counts) if part.items is None else int(part.items.sum()),
            "targets": int(sizes.sum()),
            "queries": int((sizes > 0).sum()),
        }


def measure(
    name: str,
    ranked: NDArray[np.int64],
    task: EvaluationTask,
    item_embeddings: NDArray[np.floating] | None,
    places: NDArray[np.int64] | None = None,
) -> Row:
    """Compute all results of one ranker.

    Args:
        name: name of the ranker.
        ranked: [E, K] item codes, best first, -1 where nothing was ranked.
        task: the targets, cut-offs and slices.
        item_embeddings: [N, D] for the diversity of lists; None if the ranker has none.
        places: [E, K] row of `item_embeddings` for each entry of `ranked`; None if rows are item codes.
    """
    counted = task.counted
    hit = hits(ranked, task.targets.offsets, task.targets.items)[counted]
    ranked, sizes = ranked[counted], task.targets.sizes()[counted]
    surprise = self_information(task.item_counts)
    diversities: Sequence[Values] = [np.full(len(ranked), np.nan)] * len(task.ks)
    if item_embeddings is not None:
        lists = ranked if places is None else places[counted]
        diversities = diversity_at(lists, item_embeddings, task.ks)
    values: dict[str, float] = {}
    per_query: dict[str, Values] = {}
    for k, diversity in zip(task.ks, diversities, strict=True):
        of_queries = {
            f"Recall@{k}": recall_at(hit, sizes, k),
            f"NDCG@{k}": ndcg_at(hit, sizes, k),
            f"MRR@{k}": mrr_at(hit, k),
            f"HR@{k}": hit_rate_at(hit, k),
            f"novelty@{k}": list_mean(ranked, surprise, k),
            f"popularity@{k}": list_mean(ranked, task.item_counts, k),
            f"diversity@{k}": diversity,
        }
        per_query |= of_queries
        values |= {key: _mean(of_query) for key, of_query in of_queries.items()}
        values[f"coverage@{k}"] = coverage(ranked[:, :k], len(task.item_counts))
        values[f"Gini@{k}"] = gini(exposure(ranked[:, :k], len(task.item_counts)))
    slices: dict[str, dict[str, float]] = {}
    for label, part in task.slices.items():
        of_slice = _measure_slice(ranked, hit, part, task)
        per_query |= {f"{label}/{metric}": value for metric, value in of_slice.items()}
        slices[label] = {metric: _mean(value) for metric, value in of_slice.items()}
    return Row(name, values, slices, per_query)


def _measure_slice(
    ranked: NDArray[np.int64], hit: NDArray[np.bool_], part: Slice, task: EvaluationTask
) -> dict[str, Values]:
    """Compute Recall and NDCG on the targets of the slice alone, [E], NaN for a query without a target in it."""
    inside = task.targets.sizes(part)[task.counted]
    if part.items is not None:
        row, place = np.nonzero(hit)  # only hits matter, and hits are few
        hit = np.zeros_like(hit)
        hit[row, place] = part.items[ranked[row, place]]
    values = {}
    for k in task.ks:
        for metric, function in (("Recall", recall_at), ("NDCG", ndcg_at)):
            values[f"{metric}@{k}"] = np.where(inside > 0, function(hit, inside, k), np.nan)
    return values


def _mean(values: Values) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _among(few: NDArray[np.int64], many: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark which of `few` (ascending and distinct) occur in `many` (unsorted), by binary search in `few`."""
    occurs = np.zeros(len(few), dtype=bool)
    if len(few):
        place = np.minimum(np.searchsorted(few, many), len(few) - 1)
        occurs[place[few[place] == many]] = True
    return occurs


def _pairs(offsets: NDArray[np.int64], items: NDArray[np.integer], num_items: int, what: str) -> NDArray[np.int64]:
    """Encode (query, item) pairs as single integers: query * N + item."""
    codes = np.asarray(items, dtype=np.int64)
    if len(codes) and not 0 <= codes.min() <= codes.max() < num_items:
        raise InputError(f"{what} must be item codes in 0 .. {num_items - 1}")
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets)) * num_items + codes
