"""The report of one model: the same sections as a comparison's, where they make sense for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from twotower import evaluation
from twotower.analysis import report
from twotower.analysis.compare import compare
from twotower.analysis.dial import popularity_curve
from twotower.comparison.calibrating import calibrations
from twotower.comparison.document import build_document, diagnostics
from twotower.comparison.measuring import FolderRanker
from twotower.evaluation import Evaluation
from twotower.files import write_text
from twotower.run import reread
from twotower.serving import Retriever
from twotower.serving.artifact import find_model

#: Settings of the popularity dial in the report: each costs one ranking of the test queries. `twotower dial` has more.
DIAL_SETTINGS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def evaluate_folder(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    page: str | Path | None = None,
    slices: Sequence[str] | None = None,
) -> Evaluation:
    """The whole of `twotower evaluate`: measure a saved model again, and write `per_query.parquet` and the report.

    Args:
        directory: a run folder, or the model folder alone; what is written goes beside the model.
        source: where the data is now, if it has moved.
        page: where the report goes; none is written where None.
        slices: columns to slice by, instead of those of the model's settings.

    Raises:
        InputError: the data is not to be found, or not the data the model was trained on.
    """
    artifact, split = reread(directory, source)
    settings = artifact.config.evaluation
    ranker = FolderRanker(Path(directory))
    found = evaluation.evaluate(
        ranker,
        split.test,
        train=split.train,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        baselines=settings.baselines,
        slices=settings.slices if slices is None else slices,
    )
    if page is None:
        return found
    folder = find_model(directory)
    run = folder.parent if folder.name == "model" else folder
    found.write_per_query(run / "per_query.parquet")
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
        calibration=calibrations({name: run}, split),
        diagnostics={name: diagnostics(run)},
        dial=popularity_curve(
            Retriever(artifact),
            split.test,
            train=split.train,
            k=ks[-1],
            settings=DIAL_SETTINGS,
            exclude_seen=settings.exclude_seen,
        ).to_dict(),
    )
    write_text(Path(page), report.render(document))
    return found
