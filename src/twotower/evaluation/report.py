"""The result of an evaluation: numbers for machines, a table for people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from twotower.evaluation.slices import SLICES

METRICS = ("Recall", "NDCG", "MRR", "HR")
SLICE_METRICS = ("Recall", "NDCG")


@dataclass(frozen=True)
class Row:
    """One ranker's results.

    Attributes:
        name: what the ranker is called in the table.
        values: the mean over queries of each metric, by its name (`"Recall@20"`, `"coverage@20"`).
        slices: by slice (`"head"`, `"mid"`, `"tail"`), the mean of each metric over the queries that have a target
            in the slice, with only those targets; NaN where no query has one.
        per_query: the values behind the means, [E] by metric name, `"tail/Recall@20"` for a slice (NaN where the
            query has no target there). Rows of one `Evaluation` are aligned: compare them in pairs.
    """

    name: str
    values: dict[str, float]
    slices: dict[str, dict[str, float]]
    per_query: dict[str, NDArray[np.float64]] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """Rankers compared on one holdout. Print it, or take `to_dict()`.

    Attributes:
        holdout: name of the holdout.
        ks: the cut-offs, ascending.
        exclude_seen: whether items of a query's history were left out of its ranking.
        empty: what was done with queries without targets, `"skip"` or `"zero"`.
        num_items: N, the size of the catalog, all of which was ranked.
        num_targets: targets that could be found.
        num_removed: targets taken out because they already stand in their query's history.
        num_empty: queries left without any target.
        queries: [E] the query codes that were counted, in the order of `per_query`.
        slice_sizes: by slice, the number of `items`, of `targets`, and of `queries` with such a target.
        rows: the ranker that was asked about first, then the baselines.
        notes: what a reader should know.
    """

    holdout: str
    ks: tuple[int, ...]
    exclude_seen: bool
    empty: str
    num_items: int
    num_targets: int
    num_removed: int
    num_empty: int
    queries: NDArray[np.int64] = field(repr=False)
    slice_sizes: dict[str, dict[str, int]]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_queries(self) -> int:
        """E, how many queries were counted."""
        return len(self.queries)

    def __getitem__(self, name: str) -> Row:
        """The row of that name; KeyError with the known names otherwise."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}: there are {[row.name for row in self.rows]}")

    def to_dict(self, *, per_query: bool = False) -> dict[str, Any]:
        """Plain types for JSON; NaN becomes None.

        Args:
            per_query: include the value of every query.
        """
        result: dict[str, Any] = {
            "holdout": self.holdout,
            "protocol": {
                "catalog": "full",
                "exact": True,
                "exclude_seen": self.exclude_seen,
                "empty": self.empty,
                "ks": list(self.ks),
            },
            "num_items": self.num_items,
            "num_queries": self.num_queries,
            "num_targets": self.num_targets,
            "num_removed": self.num_removed,
            "num_empty": self.num_empty,
            "slice_sizes": self.slice_sizes,
            "rows": [
                {
                    "name": row.name,
                    "values": _plain(row.values),
                    "slices": {name: _plain(values) for name, values in row.slices.items()},
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }
        if per_query:
            result["queries"] = self.queries.tolist()
            for row, plain in zip(self.rows, result["rows"], strict=True):
                plain["per_query"] = {
                    name: [None if np.isnan(x) else x for x in values.tolist()]
                    for name, values in row.per_query.items()
                }
        return result

    def __str__(self) -> str:
        """The table as plain text, a block for each K."""
        parts = [self._title(), *self._subtitle()]
        for k in self.ks:
            parts += ["", *_aligned([self._header(k), *(self._cells(row, k) for row in self.rows)])]
        return "\n".join([*parts, "", *self._verdict(), *(f"note: {note}" for note in self.notes)])

    def __rich__(self) -> Group:
        """The same table for a rich console."""
        parts: list[Any] = [self._title(), *self._subtitle()]
        for k in self.ks:
            table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)  # nine columns in 80 characters
            for place, title in enumerate(self._header(k)):
                table.add_column(title, justify="right" if place else "left")
            for row in self.rows:
                table.add_row(*self._cells(row, k))
            parts.append(table)
        return Group(*parts, *self._verdict(), *(f"note: {note}" for note in self.notes))

    def _title(self) -> str:
        return (
            f"{self.holdout}: {self.num_queries:,} queries, {self.num_targets:,} targets, "
            f"full catalog of {self.num_items:,} items, items already seen "
            f"{'excluded' if self.exclude_seen else 'kept'}"
        )

    def _subtitle(self) -> list[str]:
        sizes = [
            f"{name} {size['items']:,} items / {size['targets']:,} targets" for name, size in self.slice_sizes.items()
        ]
        return [
            "thirds of the training interactions: " + ", ".join(sizes),
            "columns head, mid, tail: Recall of the targets in that third",
        ]

    def _verdict(self) -> list[str]:
        """Whether the first row earns its keep, in words."""
        model, *others = self.rows
        metric = f"NDCG@{self.ks[-1]}"
        if not others:
            return []
        best = max(others, key=lambda row: row.values[metric])
        mine, theirs = model.values[metric], best.values[metric]
        if mine > theirs:
            return [f"{model.name} is above the best baseline, {best.name}: {metric} {mine:.4f} against {theirs:.4f}"]
        return [
            f"{model.name} does not beat {best.name}: {metric} {mine:.4f} against {theirs:.4f}; "
            "more epochs, more data or another configuration is needed before it earns its keep"
        ]

    @staticmethod
    def _header(k: int) -> list[str]:
        return [f"@{k}", *METRICS, "coverage", *SLICES]

    @staticmethod
    def _cells(row: Row, k: int) -> list[str]:
        values = [row.values[f"{metric}@{k}"] for metric in (*METRICS, "coverage")]
        values += [row.slices[name][f"Recall@{k}"] for name in SLICES]
        return [row.name, *("-" if np.isnan(value) else f"{value:.4f}" for value in values)]


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
