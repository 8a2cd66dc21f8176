"""Evaluation and calibration of the finished runs of a comparison, on the same test queries as the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from twotower import evaluation
from twotower.audit import estimates_softmax
from twotower.comparison.cells import Cell
from twotower.config.run import Config, EvaluationConfig
from twotower.data import ExposureLog, Holdout, Split
from twotower.data.loading.histories import take_ranges
from twotower.distributed.communicator import Communicator
from twotower.evaluation import Evaluation, Row
from twotower.evaluation.calibration import refined_weights, softmax_calibration
from twotower.evaluation.per_query import Targets
from twotower.negatives import popularity_deciles
from twotower.objectives.build import build_objective
from twotower.run import with_advice
from twotower.serving import Retriever
from twotower.serving.model_folder import find_model, read_metadata
from twotower.serving.shards import shared_retriever


@dataclass
class FolderRanker:
    """A ranker that loads a run's model only while ranking, so that only one model is in memory at a time.

    Attributes:
        directory: the run folder.
        ranks: the processes that rank together; all of them call `rank`, with the same holdout.
        ranked: the first ranking, of the test queries, int32 [E, k]; later rankings, of a log, are not kept.
    """

    directory: Path
    ranks: Communicator = field(default_factory=Communicator, repr=False)
    ranked: NDArray[np.int32] | None = field(default=None, repr=False)

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the top k items of every query of a holdout, int64 [E, k]."""
        retriever = shared_retriever(Retriever.load(self.directory), self.ranks)
        ranked: NDArray[np.int64] = retriever.rank(holdout, k, exclude_seen)
        if self.ranked is None:
            self.ranked = ranked.astype(np.int32)
        return ranked

    @property
    def item_embeddings(self) -> NDArray[np.float32]:
        """Item embeddings [N, D], without a coordinate for biases, for the diversity of lists."""
        folder = find_model(self.directory)
        embeddings: NDArray[np.float32] = load_file(folder / "items.safetensors")["embeddings"]
        return embeddings[:, : int(read_metadata(folder)["config"]["item_tower"]["dimension"])]


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


def measure_cells(
    cells: Sequence[Cell],
    split: Split,
    settings: EvaluationConfig,
    ranks: Communicator,
    log: ExposureLog | None = None,
) -> Measurements:
    """Evaluate every finished model and the baselines on the test queries; the ranks divide the work.

    Args:
        cells: the finished runs.
        split: the data.
        settings: the evaluation settings.
        ranks: the processes.
        log: the items shown in the test window, to estimate the reward of every model and baseline; None for no
            estimate.
    """
    rankers = {cell.directory.name: FolderRanker(cell.directory, ranks) for cell in cells}
    first, *others = rankers
    chosen: dict[str, Any] = {name: rankers[name] for name in others}
    notes: tuple[str, ...] = ()
    if settings.baselines:
        fitted = evaluation.fit_baselines(
            split.train,
            split.validation,
            names=None if settings.baselines is True else settings.baselines,
            k=min(settings.ks),
            exclude_seen=settings.exclude_seen,
            ranks=ranks,
        )
        chosen |= fitted.rankers
        notes = fitted.notes
    measured = evaluation.evaluate_all(
        {first: rankers[first], **chosen},
        split.test,
        train=split.train,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        slices=settings.slices,
        notes=notes,
        log=log,
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
    # The model has the settings of the finished run, in which every "auto" has been replaced.
    measured = with_advice(measured, Config.model_validate(metadata[cells[0].name][0]["config"]))
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


#: Maximum number of (query, item) pairs of a calibration; with more, queries are sampled.
_PAIRS = 200_000_000


def calibrations(directories: Mapping[str, Path], split: Split) -> dict[str, dict[str, Any]]:
    """Measure the calibration of each model whose objective estimates the softmax.

    Args:
        directories: name -> run folder.
        split: the data; its test queries are used.

    Returns:
        The calibration of each such model by name, as JSON values.
    """
    found = {}
    rows = _sampled_queries(split)
    histories, targets = _histories_and_targets(split.test, rows)
    eligible = split.test.eligible
    for name, directory in directories.items():
        retriever = Retriever.load(directory)
        artifact = retriever.artifact
        if not estimates_softmax(build_objective(artifact.config, split.train)):
            continue
        context = None if split.test.context is None else split.test.context[rows]
        queries = retriever.ranker.embed(split.test.queries[rows], histories, context=context)
        calibration = softmax_calibration(
            queries,
            artifact.item_embeddings,
            targets,
            temperature=float(artifact.towers.temperature.detach()),
            exclude=histories if artifact.config.evaluation.exclude_seen else None,
            eligible=None if eligible is None else eligible.of_rows(torch.from_numpy(rows)),
        )
        found[name] = calibration.to_dict()
    return found


#: Name of the weight of refined logQ in the per-query values; the value is the mean over the targets of the query.
REFINED_WEIGHT = "refined_weight"


def with_refined_weights(found: Evaluation, directory: Path, split: Split) -> tuple[Evaluation, dict[str, Any] | None]:
    """Add the weight 1 - P(y | x) of the test queries to the first row of an evaluation, and summarize it.

    Args:
        found: the evaluation of the model on the test queries.
        directory: the folder of this model.
        split: the data.

    Returns:
        The evaluation, with `refined_weight` in the per-query values of the model: the mean over the targets of a
        query, or NaN without targets. The second value is a summary over all (query, target) pairs: `mean`, the
        quartiles `low`, `middle` and `high`, and `deciles`, the mean for each popularity decile of the target, or None
        if it has no targets. If the model was not trained with refined-logq, the evaluation is unchanged and the
        summary is None.
    """
    retriever = Retriever.load(directory)
    artifact = retriever.artifact
    if artifact.config.objective.name != "refined-logq":
        return found, None
    histories, targets = _histories_and_targets(split.test, np.arange(len(split.test)))
    query, item, weight = refined_weights(
        retriever.ranker.embed_holdout(split.test),
        artifact.item_embeddings,
        targets,
        temperature=artifact.towers.temperature.detach(),
        exclude=histories if artifact.config.evaluation.exclude_seen else None,
    )
    count = np.bincount(query, minlength=len(split.test))
    mean = np.bincount(query, weight, minlength=len(split.test)) / np.where(count > 0, count, np.nan)
    exclude_seen = artifact.config.evaluation.exclude_seen
    counted = Targets.of(split.test, len(artifact.items), exclude_seen).sizes() > 0  # as in `evaluate`
    model, *others = found.rows
    model = replace(model, per_query={**model.per_query, REFINED_WEIGHT: mean[counted]})
    low, middle, high = (float(value) for value in np.quantile(weight, [0.25, 0.5, 0.75]))
    decile = popularity_deciles(torch.from_numpy(split.train.item_counts())).numpy()[item]
    deciles = [float(weight[decile == each].mean()) if bool((decile == each).any()) else None for each in range(10)]
    summary = {"mean": float(weight.mean()), "low": low, "middle": middle, "high": high, "deciles": deciles}
    return replace(found, rows=(model, *others)), summary


def _sampled_queries(split: Split) -> np.ndarray:
    """Choose the test queries to measure: a sample if the catalog is too large for all of them."""
    count = len(split.test)
    most = max(_PAIRS // split.train.num_items, 100)
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


CompressedRows = tuple[NDArray[np.int64], NDArray[np.int32]]


def _histories_and_targets(holdout: Holdout, rows: np.ndarray) -> tuple[CompressedRows, CompressedRows]:
    """Select histories and targets of some queries, in compressed-row format."""

    def chosen(offsets: NDArray[np.int64], items: NDArray[np.int32]) -> CompressedRows:
        place, ends = take_ranges(offsets[rows], offsets[rows + 1])
        return ends, items[place]

    return chosen(holdout.history_offsets, holdout.history_items), chosen(holdout.target_offsets, holdout.target_items)
