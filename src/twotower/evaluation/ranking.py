"""Evaluate rankers: the full catalog, exactly, beside what they must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data import Holdout, Interactions
from twotower.evaluation.baselines import ItemKNN, Popularity
from twotower.evaluation.metrics import coverage, hit_rate_at, hits, mrr_at, ndcg_at, recall_at
from twotower.evaluation.rankers import Ranker
from twotower.evaluation.report import Evaluation, Row
from twotower.evaluation.slices import SLICES, popularity_thirds

Empty = Literal["skip", "zero"]


def evaluate(
    ranker: Ranker,
    holdout: Holdout,
    *,
    train: Interactions,
    ks: Sequence[int] = (10, 20),
    exclude_seen: bool = True,
    baselines: bool | Mapping[str, Ranker] = True,
    name: str = "model",
    empty: Empty = "skip",
    allow_approximate: bool = False,
) -> Evaluation:
    """Rank the whole catalog for every query of a holdout, and compare with the baselines.

    With `exclude_seen`, a target that already stands in its query's history cannot be ranked: it is taken out of
    the targets, counted, and told in the notes.

    Args:
        ranker: what is evaluated; anything with `rank`.
        holdout: the queries, their histories and their targets.
        train: the training interactions: they define head, mid and tail, and train the baselines.
        ks: the cut-offs K.
        exclude_seen: leave items of a query's history out of its ranking.
        baselines: True for popularity and item-kNN; a mapping from names to rankers for others; False for none.
        name: the ranker's name in the table.
        empty: a query without targets is left out of every mean (`"skip"`) or counts as 0 (`"zero"`).
        allow_approximate: accept a ranker that declares `is_exact = False`.

    Returns:
        An `Evaluation`: prints as a table.

    Raises:
        ValueError: a setting is out of range, nothing is left to evaluate, the ranker is inexact, or what it
            returned is not a ranking (wrong shape, unknown codes, repeats, items it was told to leave out).
    """
    chosen, notes = _baselines(train, name) if baselines is True else (dict(baselines or {}), [])
    if name in chosen:
        raise ValueError(f"two rankers are called {name!r}: give the model another name")
    return evaluate_all(
        {name: ranker, **chosen},
        holdout,
        train=train,
        ks=ks,
        exclude_seen=exclude_seen,
        empty=empty,
        allow_approximate=allow_approximate,
        notes=notes,
    )


def evaluate_all(
    rankers: Mapping[str, Ranker],
    holdout: Holdout,
    *,
    train: Interactions,
    ks: Sequence[int] = (10, 20),
    exclude_seen: bool = True,
    empty: Empty = "skip",
    allow_approximate: bool = False,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Evaluate several rankers on the same queries and targets; see `evaluate` for the arguments."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be cut-offs of at least 1, got {tuple(ks)}")
    if empty not in ("skip", "zero"):
        raise ValueError(f"empty must be 'skip' or 'zero', got {empty!r}")
    for name, ranker in rankers.items():
        if not (allow_approximate or getattr(ranker, "is_exact", True)):
            raise ValueError(f"{name} searches an approximate index: pass allow_approximate=True to evaluate it")
    ks = tuple(sorted(set(ks)))
    targets = _Targets.of(holdout, train.num_items, exclude_seen)
    counted = targets.sizes() > 0
    num_empty = int((~counted).sum())
    if empty == "zero":
        counted = np.ones_like(counted)
    if not counted.any():
        raise ValueError(f"{holdout.name}: no query has a target that can be ranked, nothing to evaluate")
    notes = [*notes, *_notes(targets.removed, num_empty, empty)]
    thirds = popularity_thirds(train.item_counts())
    rows = []
    for name, ranker in rankers.items():
        ranked = _ranked(name, ranker, holdout, k=max(ks), exclude_seen=exclude_seen, num_items=train.num_items)
        rows.append(_measure(name, ranked, targets, counted=counted, thirds=thirds, ks=ks))
    return Evaluation(
        holdout=holdout.name,
        ks=ks,
        exclude_seen=exclude_seen,
        empty=empty,
        num_items=train.num_items,
        num_targets=len(targets.items),
        num_removed=targets.removed,
        num_empty=num_empty,
        queries=np.asarray(holdout.queries, dtype=np.int64)[counted],
        slice_sizes={
            label: {
                "items": int((thirds == number).sum()),
                "targets": int((thirds[targets.items] == number).sum()),
                "queries": int((targets.sizes(thirds[targets.items] == number) > 0).sum()),
            }
            for number, label in enumerate(SLICES)
        },
        rows=tuple(rows),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Targets:
    """The targets that can be found, in compressed rows without repeats."""

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    removed: int

    @classmethod
    def of(cls, holdout: Holdout, num_items: int, exclude_seen: bool) -> "_Targets":
        rows = _pairs(holdout.target_offsets, holdout.target_items, num_items, f"{holdout.name}: targets")
        wanted = np.unique(rows)
        kept = wanted
        if exclude_seen:
            seen = _pairs(holdout.history_offsets, holdout.history_items, num_items, f"{holdout.name}: history")
            kept = wanted[~np.isin(wanted, seen)]
        queries, items = np.divmod(kept, num_items)
        offsets = np.zeros(len(holdout.target_offsets), dtype=np.int64)
        np.cumsum(np.bincount(queries, minlength=len(offsets) - 1), out=offsets[1:])
        return cls(offsets, items, len(wanted) - len(kept))

    def sizes(self, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """[E] how many targets each query has, of the `chosen` ones where given."""
        rows = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        return np.bincount(rows if chosen is None else rows[chosen], minlength=len(self.offsets) - 1)


def _pairs(offsets: NDArray[np.int64], items: NDArray[np.integer], num_items: int, what: str) -> NDArray[np.int64]:
    """(query, item) as single integers: query * N + item."""
    codes = np.asarray(items, dtype=np.int64)
    if len(codes) and not 0 <= codes.min() <= codes.max() < num_items:
        raise ValueError(f"{what} must be item codes in 0 .. {num_items - 1}")
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets)) * num_items + codes


def _baselines(train: Interactions, name: str) -> tuple[dict[str, Ranker], list[str]]:
    chosen: dict[str, Ranker] = {"popularity": Popularity(train)}
    if reason := ItemKNN.refusal(train):
        return chosen, [f"the item-kNN baseline was left out: {reason}"]
    if name == "item-kNN":
        return chosen, []
    return {**chosen, "item-kNN": ItemKNN(train)}, []


def _notes(removed: int, num_empty: int, empty: Empty) -> list[str]:
    notes = []
    if removed:
        notes.append(f"{removed:,} targets already stand in their query's history and were taken out")
    if num_empty:
        what = "left out of the means" if empty == "skip" else "counted as 0"
        notes.append(f"{num_empty:,} queries have no target that can be ranked and were {what}")
    return notes


def _ranked(
    name: str, ranker: Ranker, holdout: Holdout, *, k: int, exclude_seen: bool, num_items: int
) -> NDArray[np.int64]:
    """The ranking as an array, after proof that it is one: a repeated item would count its hit twice."""
    ranked = torch.as_tensor(ranker.rank(holdout, k, exclude_seen)).cpu().numpy()
    if ranked.shape != (len(holdout.queries), k) or ranked.dtype != np.int64:
        raise ValueError(
            f"{name}: rank() must return int64 [{len(holdout.queries)}, {k}], got {ranked.dtype} {list(ranked.shape)}"
        )
    if ranked.size and not -1 <= ranked.min() <= ranked.max() < num_items:
        raise ValueError(f"{name}: rank() must return item codes below {num_items}, or -1")
    ordered = np.sort(ranked, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError(f"{name}: rank() returned the same item twice for one query")
    if exclude_seen and hits(ranked, holdout.history_offsets, holdout.history_items).any():
        raise ValueError(f"{name}: rank() returned an item of the query's history although exclude_seen is set")
    return ranked


def _measure(
    name: str,
    ranked: NDArray[np.int64],
    targets: _Targets,
    *,
    counted: NDArray[np.bool_],
    thirds: NDArray[np.int8],
    ks: tuple[int, ...],
) -> Row:
    hit = hits(ranked, targets.offsets, targets.items)[counted]
    ranked = ranked[counted]
    sizes = targets.sizes()[counted]
    values: dict[str, float] = {}
    per_query: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        per_query[f"Recall@{k}"] = recall_at(hit, sizes, k)
        per_query[f"NDCG@{k}"] = ndcg_at(hit, sizes, k)
        per_query[f"MRR@{k}"] = mrr_at(hit, k)
        per_query[f"HR@{k}"] = hit_rate_at(hit, k)
        values |= {key: float(per_query[key].mean()) for key in (f"{m}@{k}" for m in ("Recall", "NDCG", "MRR", "HR"))}
        values[f"coverage@{k}"] = coverage(ranked[:, :k], len(thirds))
    slices: dict[str, dict[str, float]] = {}
    for number, label in enumerate(SLICES):
        inside = targets.sizes(thirds[targets.items] == number)[counted]
        hit_inside = hit & (thirds[ranked] == number)
        slices[label] = {}
        for k in ks:
            for metric, function in (("Recall", recall_at), ("NDCG", ndcg_at)):
                value = np.where(inside > 0, function(hit_inside, inside, k), np.nan)
                per_query[f"{label}/{metric}@{k}"] = value
                slices[label][f"{metric}@{k}"] = float(np.nanmean(value)) if (inside > 0).any() else float("nan")
    return Row(name, values, slices, per_query)
