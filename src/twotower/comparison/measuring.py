"""Evaluation of the finished runs of a comparison and of the baselines on the same test queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file

from twotower import evaluation
from twotower.comparison.cells import Cell
from twotower.config import EvaluationConfig
from twotower.data import Holdout, Split
from twotower.evaluation import Evaluation, Row
from twotower.serving import Retriever
from twotower.serving.artifact import find_model, read_metadata


@dataclass
class FolderRanker:
    """A ranker that loads the model of a run folder only while ranking, so that many models need the memory of one.

    Attributes:
        directory: the run folder.
        ranked: the most recent ranking, int32 [E, k].
    """

    directory: Path
    ranked: NDArray[np.int32] | None = field(default=None, repr=False)

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the top k items of every query of a holdout, int64 [E, k]."""
        ranked: NDArray[np.int64] = Retriever.load(self.directory).rank(holdout, k, exclude_seen)
        self.ranked = ranked.astype(np.int32)
        return ranked

    @property
    def item_embeddings(self) -> NDArray[np.float32]:
        """Item embeddings [N, D], for the diversity of lists."""
        embeddings: NDArray[np.float32] = load_file(find_model(self.directory) / "items.safetensors")["embeddings"]
        return embeddings


@dataclass(frozen=True)
class Measurements:
    """The evaluation of all models of a comparison on the same queries.

    Attributes:
        evaluation: the rows of all cells, then of the baselines.
        rows: objective -> one row per seed.
        baselines: rows of the baselines.
        ranked: objective -> ranking of the first seed, int32 [E, max K].
        metadata: objective -> `metadata.json` of each seed's model.
    """

    evaluation: Evaluation
    rows: dict[str, list[Row]]
    baselines: list[Row]
    ranked: dict[str, NDArray[np.int32]]
    metadata: dict[str, list[dict[str, Any]]]


def measure_cells(cells: Sequence[Cell], split: Split, settings: EvaluationConfig) -> Measurements:
    """Rank the test queries once with every finished model and with the baselines."""
    rankers = {cell.directory.name: FolderRanker(cell.directory) for cell in cells}
    first, *others = rankers
    chosen: dict[str, Any] = {name: rankers[name] for name in others}
    notes: list[str] = []
    if settings.baselines:
        chosen["popularity"] = evaluation.Popularity(split.train)
        if reason := evaluation.ItemKNN.refusal(split.train):
            notes.append(f"the item-kNN baseline was left out: {reason}")
        else:
            chosen["item-kNN"] = evaluation.ItemKNN(split.train)
    measured = evaluation.evaluate_all(
        {first: rankers[first], **chosen},
        split.test,
        train=split.train,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        slices=settings.slices,
        notes=notes,
    )
    rows: dict[str, list[Row]] = {}
    metadata: dict[str, list[dict[str, Any]]] = {}
    ranked: dict[str, NDArray[np.int32]] = {}
    for cell in cells:
        rows.setdefault(cell.name, []).append(measured[cell.directory.name])
        metadata.setdefault(cell.name, []).append(read_metadata(find_model(cell.directory)))
        lists = rankers[cell.directory.name].ranked
        if cell.name not in ranked and lists is not None:
            ranked[cell.name] = lists
    baselines = [row for row in measured.rows if row.name not in rankers]
    return Measurements(measured, rows, baselines, ranked, metadata)


def per_query_frame(found: Measurements, cells: Sequence[Cell], queries: pl.Series) -> pl.DataFrame:
    """Build a frame with one row per model, seed and query: model, seed, query id and every per-query metric.

    Slices are omitted: the slice of a target follows from the data.
    """
    places = dict.fromkeys(found.rows, 0)
    parts = []
    for cell in cells:
        row = found.rows[cell.name][places[cell.name]]
        places[cell.name] += 1
        parts.append(_frame(cell.name, cell.seed, queries, row))
    parts += [_frame(row.name, None, queries, row) for row in found.baselines]
    return pl.concat(parts)


def _frame(name: str, seed: int | None, queries: pl.Series, row: Row) -> pl.DataFrame:
    metrics = {key: values.astype(np.float32) for key, values in row.per_query.items() if "/" not in key}
    return pl.DataFrame({"query": queries, **metrics}).select(
        pl.lit(name).alias("model"), pl.lit(seed, dtype=pl.Int64).alias("seed"), pl.all()
    )
