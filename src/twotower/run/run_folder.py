"""Run folders: the training run behind `twotower train`, and later evaluations and audits of its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower import evaluation, incremental
from twotower.audit.subject import Subject, subject_of
from twotower.config.run import Config
from twotower.data import Split
from twotower.data.io.id_lists import ids_like, read_ids
from twotower.distributed.launch import Coordinator, joined_processes
from twotower.errors import InputError
from twotower.evaluation import Evaluation
from twotower.features.from_config import fit_features, unused_tables, wanted_context, with_features
from twotower.incremental import ParentModel
from twotower.incremental.saved_rows import load_context, load_rows
from twotower.objectives.build import build_objective
from twotower.run.data import absolute, read_by_all, read_data, split_data, with_catalog
from twotower.run.model import Model, continue_with, evaluate, fit
from twotower.serving import Retriever, SavedModel
from twotower.serving.model_folder import FOLDER, TOWERS, find_model, read_metadata
from twotower.system.filesystem import require_replaceable, write_text
from twotower.training import LAST

#: File of a run folder that lists the input files of the run and their sizes.
INPUTS = "inputs.json"


def train_run(
    source: str | Path,
    out: str | Path,
    config: Config,
    *,
    warm_start: str | Path | None = None,
    withdraw: str | Path | None = None,
    resume: bool = False,
    replace: bool = True,
    progress: bool = True,
    on_message: Callable[[object], None] = print,
) -> tuple[Model, Evaluation]:
    """Implement `twotower train`: read, split, fit, evaluate on the test queries, write the run folder.

    Under torchrun, its processes train one model together, and only the first rank writes files and prints. After a
    restart by torchrun, they resume from the last checkpoint if there is one.

    Args:
        source: a file, a folder or the name of a data set.
        out: the run folder: `config.yaml`, `model/`, `results.json`, `checkpoints/`, `logs/`.
        config: the settings.
        warm_start: folder of the model to continue from; `source` is then the new data.
        withdraw: file with the ids of items to remove from the catalog.
        resume: resume an interrupted run in `out`.
        replace: if not resuming, replace an existing run in `out`.
        progress: show a progress bar.
        on_message: receives the accounts and progress messages.

    Raises:
        InputError: `out` already contains a run, and neither `resume` nor `replace` is set.
        RankLost: another process of the run has died.
    """
    training = config.training
    with joined_processes(timeout=training.exchange_timeout, accelerator=training.accelerator) as team:
        if team.resumes and not resume:  # torchrun restarts with the same arguments, without --resume
            resume = bool(team.broadcast_text("resume", "yes" if (Path(out) / LAST).exists() else ""))
        elif not resume and team.ranks.is_first:
            _require_free(Path(out), replace=replace)
        return _train(
            source,
            Path(out),
            config,
            team,
            warm_start=warm_start,
            withdraw=withdraw,
            resume=resume,
            progress=progress,
            on_message=on_message if team.ranks.is_first else _discard,
        )


def _require_free(directory: Path, *, replace: bool) -> None:
    require_replaceable(directory / FOLDER, TOWERS, "model")  # fail now, not after hours of training
    if replace:
        return
    if (directory / FOLDER).exists():
        raise InputError(f"{directory}: already contains a model; choose another --out, or pass --force to replace it")
    if (directory / LAST.parent).exists():
        raise InputError(
            f"{directory}: contains an interrupted run; pass --resume to continue it, or --force to start over"
        )
    settings = directory / "config.yaml"
    if settings.exists():  # the configuration of a run that stopped before its first checkpoint may be replaced
        try:
            Config.load(settings)
        except InputError:
            raise InputError(
                f"{settings}: exists and does not belong to a run; choose another --out, or pass --force to replace it"
            ) from None


def _train(
    source: str | Path,
    directory: Path,
    config: Config,
    team: Coordinator,
    *,
    warm_start: str | Path | None,
    withdraw: str | Path | None,
    resume: bool,
    progress: bool,
    on_message: Callable[[object], None],
) -> tuple[Model, Evaluation]:
    is_first = team.ranks.is_first
    parents = directory / "parent.json"
    if warm_start is None and resume and parents.is_file():
        warm_start = json.loads(parents.read_text(encoding="utf-8"))["model"]
    parent = None if warm_start is None else ParentModel.load(warm_start)
    reading = config.data if parent is None else with_catalog(config.data)
    files, data = read_by_all(
        source, reading, team, context=wanted_context(config), before=directory / INPUTS if resume else None
    )
    on_message(data.account)
    split: Split
    if parent is None:
        split = split_data(data, config.data)
    else:
        ids = None
        if withdraw is not None:
            ids = ids_like(read_ids(withdraw), parent.artifact.items, str(withdraw))
        split = continue_with(parent, data, config, withdrawn=ids)
    on_message(split.account)
    for line in unused_tables(config, split.train):
        on_message(line)
    rows = incremental.rows_to_learn(split, parent, config)
    if parent is not None:
        config = incremental.inherit_settings(parent.artifact.config, config)
    config = with_features(config.resolved(len(split.train) if rows is None else len(rows)), split.train)
    # Raises on wrong settings before anything is written.
    build_objective(config, split.train)
    if parent is None:
        for fitted in fit_features(config, split.train).values():
            on_message(fitted)
    evaluation.check_slices(split.train, config.evaluation.slices)
    for holdout in (split.validation, split.test):
        evaluation.check_targets(holdout, split.train.num_items, config.evaluation.exclude_seen)
    directory.mkdir(parents=True, exist_ok=True)
    team.require_shared(directory)
    if not resume and is_first:
        shutil.rmtree((directory / LAST).parent, ignore_errors=True)  # of an older run: must not be resumed
        write_text(directory / "config.yaml", config.to_yaml())
        write_text(directory / INPUTS, json.dumps(files, indent=1))
        parents.unlink(missing_ok=True)
        if parent is not None:
            write_text(parents, json.dumps({"model": parent.where, "fingerprint": parent.fingerprint}))
    team.begins()
    model = fit(
        split, config, directory=directory, warm_start=parent, resume=resume, progress=progress, on_message=on_message
    )
    if resume and is_first:  # only after fit: settings that do not match the checkpoint must not replace the old ones
        write_text(directory / "config.yaml", config.to_yaml())
    on_message(_summary(model, config))
    measured = evaluate(
        model,
        split.test,
        ks=tuple(config.evaluation.ks),
        exclude_seen=config.evaluation.exclude_seen,
        baselines=config.evaluation.baselines,
        slices=config.evaluation.slices,
    )
    model.artifact.metadata["data"]["source"] = absolute(source)
    model.artifact.metadata["metrics"] = measured.to_dict()
    _write_results(model, measured, directory, is_first=is_first)
    return model, measured


def _write_results(model: Model, measured: Evaluation, directory: Path, *, is_first: bool) -> None:
    """Write the model and the results on the first rank; all ranks take part if the tables are sharded."""
    if is_first or model.artifact.is_shared:
        model.save(directory / FOLDER)
    if is_first:
        write_text(directory / "results.json", json.dumps(measured.to_dict(), indent=1))


def _discard(message: object) -> None:
    """Discard a message: only the first rank prints."""


def _summary(model: Model, config: Config) -> str:
    """Summarize training in one line."""
    result = model.fit
    text = f"trained {result.epochs} epochs in {result.seconds:.0f} s"
    if not result.history:
        return text
    metric = config.training.metric
    best = max(result.history, key=lambda row: row[metric])
    before = model.artifact.metadata["training"].get("before", {}).get(metric)
    if before is not None:
        text = f"{text}; validation {metric} of the previous model {before:.4f}"
    ended = "stopped early" if result.epochs < config.training.max_epochs else "all epochs done"
    return f"{text} ({ended}); best validation {metric} {best[metric]:.4f} after epoch {int(best['epoch']) + 1}"


def evaluate_run(directory: str | Path, source: str | Path | None = None) -> Evaluation:
    """Evaluate a saved model on the test queries of the data it was trained on.

    `source` is the location of the data, if it has moved.

    Raises:
        InputError: the data was not found, or is not the data the model was trained on.
    """
    artifact, split = reread(directory, source)
    settings = artifact.config.evaluation
    return evaluation.evaluate(
        Retriever(artifact),
        split.test,
        train=split.train,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        baselines=settings.baselines,
        slices=settings.slices,
    )


def reread(directory: str | Path, source: str | Path | None = None) -> tuple[SavedModel, Split]:
    """Load a saved model, and read and split the data it was trained on in the same way.

    Raises:
        InputError: the data was not found, or is not the data the model was trained on.
    """
    artifact = SavedModel.load(directory)
    known = artifact.metadata["data"]
    if len(known.get("lineage", [])) > 1:  # the training history exists only in the model folder
        folder = find_model(directory)
        contexts = load_context(folder), load_context(folder, "test_context")
        return artifact, incremental.split_again(artifact, load_rows(folder) or {}, *contexts)
    location = source or known.get("source")
    if location is None:
        raise InputError(f"{directory}: the model does not record where its data is; pass it with --data")
    data = read_data(location, artifact.config.data, context=wanted_context(artifact.config))
    if data.fingerprint != known["fingerprint"]:
        raise InputError(
            f"{location}: not the data this model was trained on (fingerprint {data.fingerprint[:12]}, expected "
            f"{known['fingerprint'][:12]}): the test rows may include its training rows; train on this data instead"
        )
    return artifact, split_data(data, artifact.config.data)


def settings_of(directory: str | Path) -> dict[str, Any]:
    """Return the settings of a saved model for a run that continues it, with batch size and warm-up back at "auto"."""
    values: dict[str, Any] = read_metadata(find_model(directory))["config"]
    for name in ("batch_size", "warmup_steps"):
        values.get("training", {}).pop(name, None)
    return values


def audit_run(directory: str | Path, source: str | Path | None = None, *, rows: int = 64, seed: int = 0) -> Subject:
    """Load what `twotower audit` measures: a saved model, rows of its training data, and their batches.

    Raises:
        InputError: see `evaluate_run`.
    """
    artifact, split = reread(directory, source)
    return subject_of(artifact, split.train, rows=rows, seed=seed)
