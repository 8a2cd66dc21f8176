"""Evaluation of nested embeddings at each of their widths (`item_tower.nested`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twotower import evaluation
from twotower.data import Holdout, Interactions
from twotower.evaluation import Evaluation
from twotower.evaluation.evaluator import Empty
from twotower.evaluation.widths import WidthTable
from twotower.ranking import Ranker
from twotower.serving import Retriever


@dataclass(frozen=True)
class WidthRanker:
    """A ranker that uses the first coordinates of a model's embeddings.

    Attributes:
        retriever: the model.
        width: number of coordinates.
    """

    retriever: Retriever
    width: int

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the top k items of every query of a holdout, int64 [E, k]."""
        ranked: NDArray[np.int64] = self.retriever.rank(holdout, k, exclude_seen, width=self.width)
        return ranked


def with_widths(
    measured: Evaluation,
    widths: Sequence[int],
    ranker: Callable[[int], Ranker],
    holdout: Holdout,
    train: Interactions,
    *,
    empty: Empty = "skip",
) -> Evaluation:
    """Add the metrics at every width to an evaluation of a model; with a single width, return it unchanged.

    Args:
        measured: the evaluation at the full width; its first row is the model.
        widths: the widths, ascending, the full width last.
        ranker: a function that makes the ranker for a width; all ranks call it, and the ranker's `rank`, together.
        holdout: the queries that were measured.
        train: the training interactions.
        empty: treatment of queries without targets, as in `measured`.
    """
    if len(widths) < 2:
        return measured
    rows = {}
    for width in widths[:-1]:
        found = evaluation.evaluate(
            ranker(width),
            holdout,
            train=train,
            ks=measured.ks,
            exclude_seen=measured.exclude_seen,
            baselines=False,
            empty=empty,
        )
        rows[width] = found.rows[0]
    rows[widths[-1]] = measured.rows[0]
    metrics = tuple(f"{name}@{k}" for k in measured.ks for name in ("Recall", "NDCG"))
    table = WidthTable(
        metrics,
        {width: {name: row.values[name] for name in metrics} for width, row in rows.items()},
        {width: {name: row.intervals[name] for name in metrics} for width, row in rows.items()},
    )
    return replace(measured, widths=table)
