"""Rolling time windows: a model is trained and tested for each of several consecutive windows (`data.windows`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from twotower.config.run import Config
from twotower.data import Holdout, Interactions, rolling
from twotower.errors import counted
from twotower.evaluation import Evaluation
from twotower.evaluation.windows import WindowTable
from twotower.run.data import split_options
from twotower.run.model import evaluate, fit
from twotower.system.filesystem import write_text
from twotower.system.parquet import read_parquet
from twotower.training import LAST

#: Folder of the earlier windows in a run folder, and the files of a window: metrics per query; first test day and rows.
FOLDER, QUERIES, WINDOW = "windows", "per_query.parquet", "window.json"


def measure_earlier(
    data: Interactions,
    config: Config,
    directory: Path,
    *,
    resume: bool,
    progress: bool,
    on_message: Callable[[object], None],
) -> None:
    """Train and test a model for every window except the last, in `directory/windows/1`, `2`, ...

    Args:
        data: all interactions.
        config: the settings before "auto" is resolved; each window resolves it from its own rows.
        directory: the run folder.
        resume: keep finished windows, and resume the interrupted one.
        progress: show a progress bar.
        on_message: receives progress messages.
    """
    settings, windows = config.data, config.data.windows
    assert isinstance(settings.validation, float) and isinstance(settings.test, float)
    options = split_options(config)
    options = {name: value for name, value in options.items() if value is not None}
    config = config.changed("training", refit=False)
    for number, split in enumerate(
        rolling(
            data,
            settings.validation,
            settings.test,
            windows=windows,
            new_queries=settings.texts_are_queries,
            **options,
        ),
        start=1,
    ):
        folder = directory / FOLDER / str(number)
        if number == windows or (resume and (folder / QUERIES).is_file()):
            continue
        begin = begin_of(split.test)
        on_message(f"window {number} of {windows}: {counted(len(split.train), 'training row')}, test from {begin}")
        resumes = resume and (folder / LAST).exists()
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)
        model = fit(split, config, directory=folder, resume=resumes, progress=progress)
        measured = evaluate(
            model,
            split.test,
            ks=tuple(config.evaluation.ks),
            exclude_seen=config.evaluation.exclude_seen,
            baselines=config.evaluation.baselines,
        )
        write_text(folder / WINDOW, json.dumps({"begin": begin, "rows": len(split.train)}))
        measured.write_per_query(folder / QUERIES)
        shutil.rmtree((folder / LAST).parent, ignore_errors=True)


def forget_windows(directory: Path) -> None:
    """Remove the windows of an older run."""
    for folder in (directory / FOLDER).glob("[0-9]*"):
        if (folder / QUERIES).is_file() or (folder / LAST).exists():
            shutil.rmtree(folder)


def with_windows(measured: Evaluation, directory: Path, test: Holdout, windows: int) -> Evaluation:
    """Add the table of all windows to the evaluation of the last window, if the run folder has earlier windows.

    Args:
        measured: the evaluation of the last window.
        directory: the run folder.
        test: the test queries of the last window.
        windows: number of windows.
    """
    folders = [directory / FOLDER / str(number) for number in range(1, windows)]
    if not folders or not all((folder / QUERIES).is_file() for folder in folders):
        return measured
    frames = [read_parquet(folder / QUERIES) for folder in folders]
    begins = [json.loads((folder / WINDOW).read_text(encoding="utf-8"))["begin"] for folder in folders]
    metrics = [f"{name}@{k}" for k in measured.ks for name in ("NDCG", "Recall")]
    if any(metric not in frame.columns for frame in frames for metric in metrics):
        return measured  # the cut-offs were changed after the windows were measured
    table = WindowTable.of([*frames, measured.per_query_frame()], [*begins, begin_of(test)], metrics)
    return replace(measured, windows=table)


def begin_of(test: Holdout) -> str:
    """Return the day of the first test query."""
    assert test.query_times is not None
    return datetime.fromtimestamp(int(np.min(test.query_times)) / 1e6, tz=UTC).strftime("%Y-%m-%d")
