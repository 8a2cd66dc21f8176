"""The report of one model: the sections of a comparison that apply to a single model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twotower import evaluation, report
from twotower.comparison.document import build_document, diagnostics
from twotower.comparison.measure import FolderRanker, calibrations, with_refined_weights
from twotower.comparison.popularity_curve import popularity_curve
from twotower.comparison.statistics import compare
from twotower.data import Split, exposure_log
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator
from twotower.evaluation import Evaluation
from twotower.ranking.distributed import over_ranks
from twotower.run import annotated, reread
from twotower.run.widths import WidthRanker, with_widths
from twotower.serving import Retriever, SavedModel
from twotower.serving.model_folder import find_evaluated, find_model
from twotower.serving.shards import shared_retriever
from twotower.system.filesystem import write_text

#: Settings of the popularity dial in the report. Each costs one ranking of the test queries; `twotower dial` uses more.
DIAL_SETTINGS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def evaluate_folder(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    page: str | Path | None = None,
    team: Coordinator | None = None,
) -> Evaluation:
    """Implement `twotower evaluate`: evaluate a saved model and write `per_query.parquet` and the report.

    For a model trained with refined-logq, both include the row weight 1 - P(y | x) of the test queries.

    Args:
        directory: a run folder or a model folder; `per_query.parquet` is written to the run folder, next to the model.
        source: the current location of the data, if it has moved.
        page: path of the report; if None, neither the report nor `per_query.parquet` is written.
        team: the processes that evaluate together: they divide the items of the search and the queries of the
            baselines. Rank 0 writes the files. None for a single process.

    Raises:
        InputError: the data was not found, or is not the data that the model was trained on.
    """
    team = team or Coordinator(Communicator())
    ranks = team.ranks
    artifact, split = reread(directory, source, team)
    settings = artifact.config.evaluation
    evaluated = find_evaluated(directory)
    ranker = FolderRanker(evaluated, ranks)
    found = evaluation.evaluate(
        ranker,
        split.test,
        train=split.train,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        baselines=settings.baselines,
        validation=split.validation,
        slices=settings.slices,
        log=exposure_log(split, settings.exposure, settings.ks),
        ranks=ranks,
    )
    found = annotated(found, directory, artifact, split)
    if len(artifact.towers.widths) > 1:
        retriever = Retriever.load(evaluated, exact=True)
        found = with_widths(
            found,
            artifact.towers.widths,
            lambda width: over_ranks(WidthRanker(retriever, width), ranks),
            split.test,
            split.train,
        )
    if page is None:
        return found
    dial = popularity_curve(
        shared_retriever(Retriever(artifact), ranks),
        split.test,
        train=split.train,
        k=found.ks[-1],
        settings=DIAL_SETTINGS,
        exclude_seen=settings.exclude_seen,
    ).to_dict()
    if ranks.is_first:
        _write(Path(directory), Path(page), artifact, split, found, dial=dial)
    team.broadcast_text("report", "written")
    return found


def _write(
    directory: Path, page: Path, artifact: SavedModel, split: Split, found: Evaluation, *, dial: dict[str, Any]
) -> None:
    """Write `per_query.parquet` and the report."""
    evaluated = find_evaluated(directory)
    folder = find_model(directory)
    run = folder.parent if folder.name == "model" else folder
    weighted, weights = with_refined_weights(found, evaluated, split)
    weighted.write_per_query(run / "per_query.parquet")
    model, *baselines = found.rows
    name = artifact.config.objective.name
    ks = found.ks
    compared = compare({name: [model]}, baselines, metric=f"NDCG@{ks[0]}", tail_metric=f"Recall@{ks[0]}")
    document = build_document(
        "evaluation",
        compared,
        found,
        baselines,
        metadata={name: [artifact.metadata]},
        data=split.data,
        command=f"twotower evaluate {directory}",
        objectives={name: artifact.config.objective.model_dump(mode="json")},
        calibration=calibrations({name: evaluated}, split),
        refined_weights=None if weights is None else {name: weights},
        diagnostics={name: diagnostics(run)},
        dial=dial,
    )
    write_text(page, report.render(document))
