"""Evaluation of rankings with relevance judgements: nDCG, MAP, MRR and recall, computed with ir-measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Group

from twotower.errors import InputError, counted
from twotower.evaluation.results import TextTable
from twotower.evaluation.significance import paired_comparison

#: Name of a measure in the table -> its name in ir-measures.
MEASURES = {
    "nDCG@10": "nDCG@10",
    "MAP": "AP",
    "MRR": "RR",
    "Recall@10": "R@10",
    "Recall@100": "R@100",
    "Judged@10": "Judged@10",
}


@dataclass(frozen=True)
class JudgedEvaluation:
    """Measures of several rankings of the same judged queries.

    Attributes:
        queries: ids of the measured queries.
        values: per ranking and measure, the value of each query, float64 [E].
        num_items: N, number of items that were ranked.
        depth: length of the rankings.
        relevant: number of relevant items of the measured queries.
        notes: remarks for the reader.
    """

    queries: tuple[str, ...]
    values: dict[str, dict[str, NDArray[np.float64]]]
    num_items: int
    depth: int
    relevant: int
    notes: tuple[str, ...] = ()

    def mean(self, name: str, measure: str) -> float:
        """Return the mean of a measure of one ranking over the queries."""
        return float(self.values[name][measure].mean())

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "queries": len(self.queries),
            "items": self.num_items,
            "depth": self.depth,
            "relevant": self.relevant,
            "rows": {name: {one: self.mean(name, one) for one in found} for name, found in self.values.items()},
            "notes": list(self.notes),
        }

    def per_query(self) -> pl.DataFrame:
        """Return one row per ranking and query: columns `ranking`, `query` and the measures."""
        return pl.concat(
            pl.DataFrame({"ranking": [name] * len(self.queries), "query": self.queries, **found})
            for name, found in self.values.items()
        )

    def _parts(self) -> tuple[str, TextTable, list[str]]:
        head = (
            f"{len(self.queries):,} judged queries, {self.relevant:,} relevant items, full catalog of "
            f"{self.num_items:,} items, the best {self.depth:,} for each query"
        )
        rows = [[name, *(f"{self.mean(name, one):.4f}" for one in MEASURES)] for name in self.values]
        return head, TextTable(["", *MEASURES], rows), [*self._compared(), *(f"note: {one}" for one in self.notes)]

    def _compared(self) -> list[str]:
        """Compare the first ranking with each of the others by nDCG@10."""
        first, *others = self.values
        lines = []
        for other in others:
            found = paired_comparison(self.values[first]["nDCG@10"], self.values[other]["nDCG@10"])
            interval = f"{found.low:+.4f} to {found.high:+.4f}"
            lines.append(f"{first} - {other}: nDCG@10 {found.difference:+.4f} ({interval}, p = {found.p_value:.3f})")
        return lines

    def __str__(self) -> str:
        """Format as plain text."""
        head, table, lines = self._parts()
        return "\n".join([head, "", *table.lines(), "", *lines])

    def __rich__(self) -> Group:
        """Format for a rich console."""
        head, table, lines = self._parts()
        return Group(head, table.rich(), *lines)


def measure_judged(
    rankings: Mapping[str, NDArray[np.int64]],
    judged: Sequence[tuple[str, Mapping[int, int]]],
    *,
    num_items: int,
    notes: Sequence[str] = (),
) -> JudgedEvaluation:
    """Measure rankings against relevance judgements with ir-measures (and so with trec_eval).

    nDCG@10 uses the relevance as gain and log2(1 + rank) as discount; MAP, MRR and recall count items with a relevance
    of at least 1. An item without a judgement is not relevant; Judged@10 is the share of the first ten with a
    judgement. A negative relevance counts as 0. Queries without a relevant item are left out of the means, and a note
    reports their number.

    Args:
        rankings: name -> int64 [E, K], item codes, best first, -1 at the end; the first is compared with the others.
        judged: id of each query, and the relevance of its judged items by code; an item that is not in the catalog has
            a code below 0, and is never found.
        num_items: N.
        notes: remarks for the reader.

    Raises:
        InputError: ir-measures is not installed, there is no ranking, no query has a relevant item, or a ranking has
            the wrong number of rows or an item twice.
    """
    try:
        import ir_measures  # noqa: PLC0415  # an optional extra
    except ModuleNotFoundError as error:
        raise InputError(
            f"judgements: needs the package {error.name!r}; run pip install 'twotower[judgements]'"
        ) from None
    if not rankings:
        raise InputError("judgements: expected at least one ranking, found none")
    for name, ranked in rankings.items():
        ordered = np.sort(ranked, axis=1)
        if ranked.shape[0] != len(judged) or bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise InputError(
                f"{name}: expected a row of distinct items for each of {counted(len(judged), 'query', 'queries')}"
            )
    kept = [row for row, (_, grades) in enumerate(judged) if max(grades.values(), default=0) >= 1]
    if not kept:
        raise InputError("judgements: no query has an item with a relevance of at least 1, so nothing can be measured")
    if len(kept) < len(judged):
        left = ("judged query has no relevant item and was", "judged queries have no relevant item and were")
        notes = [*notes, f"{counted(len(judged) - len(kept), *left)} left out"]
    below = sum(grade < 0 for row in kept for grade in judged[row][1].values())
    if below:
        negative = ("judgement is negative and counts", "judgements are negative and count")
        notes = [*notes, f"{counted(below, *negative)} as not relevant"]
    qrels = {str(row): {str(item): max(grade, 0) for item, grade in judged[row][1].items()} for row in kept}
    measures = {ir_measures.parse_measure(own): name for name, own in MEASURES.items()}
    place = {str(row): at for at, row in enumerate(kept)}
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, ranked in rankings.items():
        # Scores are negative ranks, so that ir-measures has no ties to break.
        run = {
            str(row): {str(item): float(-rank) for rank, item in enumerate(ranked[row].tolist()) if item >= 0}
            for row in kept
            if (ranked[row] >= 0).any()  # a query with an empty ranking has the value 0
        }
        found = {one: np.zeros(len(kept)) for one in MEASURES}
        for metric in ir_measures.iter_calc(list(measures), qrels, run):
            found[measures[metric.measure]][place[metric.query_id]] = metric.value
        values[name] = found
    return JudgedEvaluation(
        queries=tuple(judged[row][0] for row in kept),
        values=values,
        num_items=num_items,
        depth=next(iter(rankings.values())).shape[1],
        relevant=sum(grade >= 1 for row in kept for grade in judged[row][1].values()),
        notes=tuple(notes),
    )
