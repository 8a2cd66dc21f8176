"""The result of an evaluation: JSON for machines, and tables for a terminal or a text file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import counted
from twotower.evaluation.off_policy import OffPolicyTable
from twotower.evaluation.significance import (
    SIGNIFICANT,
    Interval,
    bootstrap_interval,
    bootstrap_intervals,
    holm,
    paired_comparison,
)
from twotower.evaluation.slices import SLICES
from twotower.evaluation.widths import WidthTable
from twotower.evaluation.windows import WindowTable
from twotower.system.filesystem import whole_file
from twotower.system.terminal import cell, plain

#: Width of a terminal line, in characters.
WIDTH = 80


@dataclass(frozen=True)
class TextTable:
    """Cells of text: the first column left-aligned, the others right-aligned.

    Attributes:
        header: titles of the columns.
        rows: cells, the same number in each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Format as plain text."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.header))]
        return [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]

    def rich(self) -> Table:
        """Format for a rich console."""
        # Two characters between columns, as in `lines`: nine columns fit into 80 characters. A longer cell wraps to a
        # second line, because a truncated number would look like a different number.
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for place, title in enumerate(self.header):
            table.add_column(cell(title), justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(cell, row))
        return table


def shortened(text: str, width: int) -> str:
    """Truncate text to the width if it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"


METRICS = ("Recall", "NDCG", "MRR", "HR")
#: Groups of slices that are shown in the main table or only in figures.
_SHOWN_ELSEWHERE = ("thirds", "deciles")


@dataclass(frozen=True)
class Row:
    """One ranker's results.

    Attributes:
        name: the ranker's name in the table.
        values: by metric and K (`"Recall@20"`), the mean over queries of Recall, NDCG, MRR, HR, novelty (bits),
            popularity (training interactions) and diversity, and the coverage and Gini index of all lists together; NaN
            if not measurable, such as the diversity of a ranker without item embeddings.
        slices: by slice (`"head"`, `"decile 3"`, `"cold items"`, `"items.genres=Comedy"`), the mean Recall and NDCG
            over the queries with a target in the slice. Only these targets count, at their rank in the whole list; NaN
            if no query has a target in the slice.
        per_query: the values behind the means, as arrays [E] by name, such as `"Recall@20"` or, for a slice,
            `"tail/Recall@20"` (NaN if the query has no target in the slice). The arrays of all rows of an `Evaluation`
            have the same queries in the same order, as `paired_comparison` needs.
    """

    name: str
    values: dict[str, float]
    slices: dict[str, dict[str, float]]
    per_query: dict[str, NDArray[np.float64]] = field(repr=False)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % confidence intervals of every value that is a mean over queries (`bootstrap_interval`)."""
        overall = {name: values for name, values in self.per_query.items() if "/" not in name}
        complete = [name for name, values in overall.items() if not np.isnan(values).any()]
        together = np.stack([overall[name] for name in complete], axis=1) if complete else np.empty((0, 0))
        computed = dict(zip(complete, bootstrap_intervals(together), strict=True))
        return {name: computed[name] if name in computed else bootstrap_interval(overall[name]) for name in overall}


@dataclass(frozen=True)
class Evaluation:
    """Rankers compared on one holdout; print it, or use `to_dict()`.

    Attributes:
        holdout: name of the holdout.
        ks: the cut-offs, ascending.
        exclude_seen: whether items of a query's history were excluded from its ranking.
        empty: treatment of queries without targets, `"skip"` or `"zero"`.
        num_items: N, the size of the catalog; all eligible items were ranked.
        num_targets: number of targets that could be ranked.
        num_removed: number of targets removed because they are already in their query's history.
        num_empty: number of queries left without targets.
        queries: [E] the query codes that were counted, in the order of `per_query`.
        slice_sizes: by slice, the number of `items`, of `targets`, and of `queries` with a target in the slice.
        rows: the evaluated ranker first, then the baselines.
        notes: remarks for the reader.
        slice_groups: by group ("thirds", "deciles", "cold", "items.genres"), the names of its slices in order.
        is_exact: whether every ranker searched exactly.
        query_ids: vocabulary of the query codes; None if unknown.
        advice: settings to try if the model does not beat the best baseline, such as `"item_tower.dimension=256"`.
        command: command that searches for settings, shown with the advice; None to show no command.
        windows: metrics over several test windows, if this evaluation is of the last one; None for a single window.
        off_policy: estimated rewards from a log with propensities; None without such a log.
        widths: metrics of the evaluated model at each width of its nested embeddings; None if they have one width.
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
    slice_groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    is_exact: bool = True
    query_ids: Vocabulary | None = field(default=None, repr=False)
    advice: tuple[str, ...] = ()
    command: str | None = None
    windows: WindowTable | None = None
    off_policy: OffPolicyTable | None = None
    widths: WidthTable | None = None

    @property
    def num_queries(self) -> int:
        """E, the number of queries counted."""
        return len(self.queries)

    def __getitem__(self, name: str) -> Row:
        """Return the row with this name, or raise KeyError with the known names."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; the rows are {[row.name for row in self.rows]}")

    def to_dict(self, *, per_query: bool = False) -> dict[str, Any]:
        """Convert to plain types for JSON; NaN becomes None.

        Args:
            per_query: whether to include the values of every query.
        """
        result: dict[str, Any] = {
            "holdout": self.holdout,
            "protocol": {
                "catalog": "full",
                "exact": self.is_exact,
                "exclude_seen": self.exclude_seen,
                "empty": self.empty,
                "ks": list(self.ks),
            },
            "num_items": self.num_items,
            "num_queries": self.num_queries,
            "num_targets": self.num_targets,
            "num_removed": self.num_removed,
            "num_empty": self.num_empty,
            "slice_groups": {group: list(names) for group, names in self.slice_groups.items()},
            "slice_sizes": self.slice_sizes,
            "rows": [
                {
                    "name": row.name,
                    "values": _plain(row.values),
                    "intervals": {metric: interval.to_dict() for metric, interval in row.intervals.items()},
                    "slices": {name: _plain(values) for name, values in row.slices.items()},
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            "advice": list(self.advice),
        }
        if self.command is not None:
            result["command"] = self.command
        if self.windows is not None:
            result["windows"] = self.windows.to_dict()
        if self.off_policy is not None:
            result["off_policy"] = self.off_policy.to_dict()
        if self.widths is not None:
            result["widths"] = self.widths.to_dict()
        if per_query:
            result["queries"] = self.queries.tolist()
            for row, plain in zip(self.rows, result["rows"], strict=True):
                plain["per_query"] = {
                    name: [None if np.isnan(x) else x for x in values.tolist()]
                    for name, values in row.per_query.items()
                }
        return result

    def per_query_frame(self) -> pl.DataFrame:
        """Return one row per ranker and query.

        Returns:
            Columns `ranker`, `query` (the id; null for a query outside the vocabulary; absent if ids are not known),
            `query_code` (int64), and the metrics of `Row.per_query`, float64, null if a query has no value.
        """
        keys: dict[str, Any] = {"query_code": self.queries}
        if self.query_ids is not None:
            keys = {"query": self.query_ids.decode(self.queries), **keys}
        frames = [
            pl.DataFrame({"ranker": [row.name] * len(self.queries), **keys, **row.per_query}) for row in self.rows
        ]
        # "diagonal", because rankers may have different columns.
        return pl.concat(frames, how="diagonal").with_columns(pl.selectors.float().fill_nan(None))

    def write_per_query(self, path: str | Path) -> Path:
        """Write `per_query_frame()` as Parquet, atomically.

        Args:
            path: path of the file; its folder is created if missing.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            self.per_query_frame().write_parquet(temporary)
        return target

    def __str__(self) -> str:
        """Format the table as plain text, a block for each K."""
        parts = [line for part in self._parts() for line in ("", *part.lines())]
        return "\n".join([self._title(), *self._subtitle(), *parts, "", *self._closing()])

    def __rich__(self) -> Group:
        """Format the same table for a rich console."""
        tables = [part.rich() for part in self._parts()]
        return Group(cell(self._title()), *map(cell, self._subtitle()), *tables, *map(cell, self._closing()))

    def _parts(self) -> Iterator[TextTable]:
        for k in self.ks:
            yield TextTable(self._header(k), [self._cells(row, k) for row in self.rows])
        if (more := self._more_slices()) is not None:
            yield more
        if self.widths is not None:
            yield TextTable(self.widths.header(), self.widths.cells())
        if self.windows is not None:
            yield TextTable(self.windows.header(), self.windows.cells())
        if self.off_policy is not None:
            yield TextTable(self.off_policy.header(self.ks[0]), self.off_policy.cells(self.ks[0]))

    def _more_slices(self) -> TextTable | None:
        """Build the table of cold, event and user-defined slices, one row each; None if there are no such slices."""
        names = [name for group in self.slice_groups if group not in _SHOWN_ELSEWHERE for name in self._present(group)]
        shown = {name: shortened(plain(name), 30) for name in names}  # names may contain control characters
        if not names:
            return None
        metric = f"Recall@{self.ks[-1]}"
        width = max(len(metric), *map(len, shown.values())) + 9  # plus a column of sizes
        rows: list[Row] = []
        for row in self.rows:
            width += max(len(row.name), 6) + 3
            if width <= WIDTH or not rows:
                rows.append(row)
        return TextTable(
            [metric, "queries", *(row.name for row in rows)],
            [
                [
                    shown[name],
                    f"{self.slice_sizes[name]['queries']:,}",
                    *(_cell(row.slices[name][metric]) for row in rows),
                ]
                for name in names
            ],
        )

    def _present(self, group: str) -> tuple[str, ...]:
        """List the slices of a group to show: cold and warm only if something is cold."""
        names = self.slice_groups[group]
        if group != "cold":
            return names
        return tuple(
            name
            for name in names
            if self.slice_sizes[f"cold {name.split()[1]}"]["targets"]  # items or queries, as in `name`
        )

    def _title(self) -> str:
        return (
            f"{self.holdout}: {counted(self.num_queries, 'query', 'queries')}, {counted(self.num_targets, 'target')}, "
            f"full catalog of {counted(self.num_items, 'item')}, items already seen "
            f"{'excluded' if self.exclude_seen else 'included'}"
        )

    def _subtitle(self) -> list[str]:
        sizes = [
            f"{name} {counted(self.slice_sizes[name]['items'], 'item')} / "
            f"{counted(self.slice_sizes[name]['targets'], 'target')}"
            for name in SLICES
        ]
        return [
            "thirds of the training interactions: " + ", ".join(sizes),
            "columns head, mid, tail: Recall of the targets in that third",
        ]

    def _verdict(self) -> list[str]:
        """Compare the evaluated ranker with the best baseline; if the ranker is not better, list settings to try."""
        model, *others = self.rows
        if not others:
            return []
        metric = f"NDCG@{self.ks[0]}"
        # The best of several baselines is best partly by chance, so its p-value is adjusted for all of them.
        pairs = [paired_comparison(model.per_query[metric], row.per_query[metric]) for row in others]
        adjusted = holm([pair.p_value for pair in pairs]).tolist()
        best, pair, p_value = max(zip(others, pairs, adjusted, strict=True), key=lambda one: one[0].values[metric])
        if math.isnan(p_value):
            p = "p unknown"
        else:
            p = f"p {'<' if p_value < 0.001 else '='} {max(p_value, 0.001):.3f}"
            p += f", adjusted for {len(others)} baselines" if len(others) > 1 else ""
        numbers = f"{metric} {model.values[metric]:.4f} against {best.values[metric]:.4f} ({p})"
        if p_value < SIGNIFICANT and pair.difference > 0:
            return [f"{model.name} is above the best baseline, {best.name}: {numbers}"]
        what = "is below" if p_value < SIGNIFICANT else "does not differ significantly from"
        lines = [f"{model.name} {what} the best baseline, {best.name}: {numbers}"]
        if self.advice:
            lines.append(f"settings to try on this data: {' '.join(f'--set {setting}' for setting in self.advice)}")
        if self.command:
            lines.append(f"to search over these and other settings: {self.command}")
        return lines

    def _closing(self) -> list[str]:
        notes = [*self.notes, *([] if self.windows is None else [self.windows.note()])]
        notes += [] if self.widths is None else [self.widths.note()]
        notes += [] if self.off_policy is None else self.off_policy.notes()
        return [*self._verdict(), *(f"note: {note}" for note in notes)]

    @staticmethod
    def _header(k: int) -> list[str]:
        return [f"@{k}", *METRICS, "coverage", *SLICES]

    @staticmethod
    def _cells(row: Row, k: int) -> list[str]:
        values = [row.values[f"{metric}@{k}"] for metric in (*METRICS, "coverage")]
        values += [row.slices[name][f"Recall@{k}"] for name in SLICES]
        return [row.name, *map(_cell, values)]


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
