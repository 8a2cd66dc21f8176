"""The popularity dial curve: the trade-off between accuracy and discovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from twotower.data import Holdout, Interactions
from twotower.evaluation import evaluate_all
from twotower.serving import Retriever
from twotower.serving.shards import SharedRetriever

SETTINGS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0)


@dataclass(frozen=True)
class DialPoint:
    """One setting of the dial, over all queries of a holdout.

    Attributes:
        popularity: the setting, b.
        recall: Recall@K.
        tail_recall: Recall@K of the targets in the tail third of the training interactions.
        ndcg: NDCG@K.
        coverage: share of the catalog that appears in at least one list.
        interactions: mean number of training interactions of a recommended item, over all lists.
        percentile: mean share of items with fewer training interactions, over all lists; ties count half.
    """

    popularity: float
    recall: float
    tail_recall: float
    ndcg: float
    coverage: float
    interactions: float
    percentile: float


@dataclass(frozen=True)
class DialCurve:
    """The result of `popularity_curve`; prints as a table.

    A model that has learnt `log P(item | query)` exactly is most accurate at 1. A model trained on few interactions
    estimates popularity better than individual preferences, and may be more accurate above 1.

    Attributes:
        holdout: name of the holdout.
        k: length of the lists.
        points: one for each setting, ascending.
    """

    holdout: str
    k: int
    points: tuple[DialPoint, ...]

    @property
    def best(self) -> DialPoint:
        """The point with the highest NDCG; among ties, the one closest to the model as trained."""
        return max(self.points, key=lambda point: (point.ndcg, -abs(point.popularity - 1.0)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        points = [dict(point.__dict__) for point in self.points]
        return {"holdout": self.holdout, "k": self.k, "points": points, "best": self.best.popularity}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"The popularity dial on {self.holdout}, lists of {self.k}", title_justify="left")
        names = ("popularity", "recall", "tail recall", "NDCG", "coverage", "interactions", "percentile")
        for name in names:
            table.add_column(name, justify="right")
        for point in self.points:
            values = list(point.__dict__.values())
            table.add_row(
                f"{values[0]:g}", *(f"{value:.4f}" for value in values[1:5]), *(f"{v:.2f}" for v in values[5:])
            )
        yield table
        yield "1 is the model as trained; 0 removes log p(item) from the score; above 1, popular items gain."
        yield f"NDCG@{self.k} is highest at {self.best.popularity:g}."


class _At:
    """A ranker at one setting of the dial, which keeps its last ranking."""

    def __init__(self, retriever: Retriever | SharedRetriever, popularity: float) -> None:
        self.retriever = retriever
        self.popularity = popularity
        self.ranked: np.ndarray | None = None

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray:
        self.ranked = self.retriever.rank(holdout, k, exclude_seen, popularity=self.popularity)
        return self.ranked


def popularity_curve(
    retriever: Retriever | SharedRetriever,
    holdout: Holdout,
    *,
    train: Interactions,
    k: int = 20,
    settings: Sequence[float] = SETTINGS,
    exclude_seen: bool = True,
) -> DialCurve:
    """Measure recall, tail recall, coverage and popularity of the lists at several dial settings, by exact search.

    Args:
        retriever: the model, or its part on this rank; all ranks then call this together.
        holdout: queries with targets, such as `split.test`.
        train: the training interactions, which define the tail and an item's popularity.
        k: length of the lists.
        settings: values of b; see `PopularityDial`.
        exclude_seen: whether to exclude items of a query's history.

    Returns:
        The curve, with one point for each setting.
    """
    rankers = {f"{popularity:g}": _At(retriever, popularity) for popularity in sorted(settings)}
    measured = evaluate_all(rankers, holdout, train=train, ks=(k,), exclude_seen=exclude_seen)
    counts = train.item_counts()
    percentile = _percentiles(counts)
    points = []
    for name, ranker in rankers.items():
        row = measured[name]
        ranked = ranker.ranked
        listed = ranked[ranked >= 0] if ranked is not None else np.empty(0, dtype=np.int64)
        points.append(
            DialPoint(
                popularity=ranker.popularity,
                recall=row.values[f"Recall@{k}"],
                tail_recall=row.slices["tail"][f"Recall@{k}"],
                ndcg=row.values[f"NDCG@{k}"],
                coverage=row.values[f"coverage@{k}"],
                interactions=float(counts[listed].mean()) if len(listed) else float("nan"),
                percentile=float(percentile[listed].mean()) if len(listed) else float("nan"),
            )
        )
    return DialCurve(holdout.name, k, tuple(points))


def _percentiles(counts: np.ndarray) -> np.ndarray:
    """Compute the share of items with fewer interactions, ties counting half, float64 [N]."""
    ascending = np.sort(counts)
    below = np.searchsorted(ascending, counts, side="left")
    up_to = np.searchsorted(ascending, counts, side="right")
    return np.asarray((below + up_to) / (2 * max(len(counts), 1)))
