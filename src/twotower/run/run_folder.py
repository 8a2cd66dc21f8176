"""Run folders, written by `twotower train`, and the evaluation and audit of their models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from twotower import evaluation, incremental
from twotower.audit.subject import Subject, TrainingRun, subject_of
from twotower.config.run import Config, EligibilityConfig
from twotower.data import Interactions, Parts, Split, exposure_log
from twotower.data.io.id_lists import ids_like, read_ids
from twotower.data.schema.vocabulary import listed
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator, joined_processes
from twotower.errors import InputError, counted, require_flags
from twotower.evaluation import Evaluation
from twotower.features.from_config import context_to_read, fit_features, unused_tables
from twotower.incremental import ParentModel
from twotower.incremental.parent import objective_state
from twotower.incremental.saved_rows import load_context, load_rows
from twotower.incremental.split import ContinuedSplit
from twotower.objectives.build import build_objective, leaves_out_items
from twotower.run.advice import with_advice
from twotower.run.batches import Batches, make_batches, make_objective, weigh_train
from twotower.run.data import (
    absolute,
    read_by_all,
    read_together,
    ready_made,
    split_data,
    split_options,
    with_catalog,
)
from twotower.run.model import Model, continue_with, evaluate, fit, refit
from twotower.run.refit import refuse_refit, with_refit_note
from twotower.run.settings import CONFIG, complete_settings, require_same_settings
from twotower.run.windows import forget_windows, measure_earlier, with_windows
from twotower.serving import SavedModel
from twotower.serving.model_folder import (
    FOLDER,
    REFIT,
    TOWERS,
    VALIDATED,
    find_evaluated,
    find_model,
    read_metadata,
)
from twotower.system.checksums import read_json
from twotower.system.filesystem import locked, output_path, require_replaceable, write_text
from twotower.training.checkpoint.paths import BEST, LAST, require_checkpoint

#: File of a run folder that lists the input files of the run and their sizes.
INPUTS = "inputs.json"
#: File of a run folder that names the model that the run continues.
PARENT = "parent.json"
#: File in the folder of a refit that identifies the validated model.
BEGUN = "validated.json"
#: File that identifies a folder as a run folder; older versions did not write it.
MARKER = ".twotower-run"
#: Files and folders that a run replaces or deletes, except its model and its settings, which are checked separately.
OWN = (INPUTS, PARENT, "results.json", "checkpoints", "logs", "refit", "windows")
#: Lock file of a run folder; a run holds the lock while it writes into the folder.
LOCK = ".lock"


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
    """Implement `twotower train`: read, split, fit, evaluate on the test queries, and write the run folder.

    The processes that torchrun starts train one model together, and only the first rank writes files and prints. If
    torchrun restarts them, they resume from the last checkpoint, if there is one.

    Args:
        source: a file, a folder or the name of a data set.
        out: the run folder: `config.yaml`, `model/`, `results.json`, `checkpoints/`, `logs/`; with `training.refit`
            also `validated/`, the model that was evaluated, and `refit/`.
        config: the settings.
        warm_start: folder of the model to continue from; `source` is then the new data.
        withdraw: file with the ids of items to remove from the catalog.
        resume: resume an interrupted run in `out`.
        replace: replace an existing run in `out`; not used if `resume` is set.
        progress: show a progress bar.
        on_message: called with the accounts of the data and with progress messages.

    Raises:
        InputError: `out` is a file or cannot be written, another run is using it, it already contains a run and
            neither `resume` nor `replace` is set, or a setting cannot be changed on `resume`.
        RankLost: another process of the run has died.
    """
    require_flags(resume=resume, replace=replace)
    directory, training = output_path(out), config.training
    with (
        joined_processes(timeout=training.exchange_timeout, accelerator=training.accelerator) as team,
        reserved(directory) if team.ranks.is_first else nullcontext(),
    ):
        if team.resumes and not resume:  # torchrun restarts with the same arguments, without --resume
            resume = bool(team.broadcast_text("resume", "yes" if (directory / LAST).exists() else ""))
        elif resume:
            require_checkpoint(directory)
        elif team.ranks.is_first:
            _require_free(directory, replace=replace)
        return _train(
            source,
            directory,
            config,
            team,
            warm_start=warm_start,
            withdraw=withdraw,
            resume=resume,
            progress=progress,
            on_message=on_message if team.ranks.is_first else _discard,
        )


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Create a folder and lock it for one process during the block; remove it if it is empty at the end.

    Raises:
        InputError: the path is a file, cannot be written, or is locked by another process.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; choose a folder for --out")
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(directory / LOCK, wait=False))
        except OSError as error:
            raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another --out") from error
        if not lock:
            raise InputError(
                f"{directory}: in use by another run; wait until that run has ended, or choose another --out"
            )
        try:
            yield
        finally:
            stack.close()
            for path in created:
                with suppress(OSError):
                    path.rmdir()


def _require_free(directory: Path, *, replace: bool) -> None:
    for folder in (FOLDER, VALIDATED):
        require_replaceable(directory / folder, TOWERS, "model")  # fail before hours of training
    foreign = [] if is_run(directory) else [name for name in OWN if (directory / name).exists()]
    if foreign:
        raise InputError(f"{directory}: not a run folder, but it contains {listed(foreign)}; choose another --out")
    if replace:
        return
    if (directory / FOLDER).exists():
        raise InputError(f"{directory}: already contains a model; choose another --out, or pass --force to replace it")
    if (directory / LAST.parent).exists():
        raise InputError(
            f"{directory}: contains an interrupted run; pass --resume to continue it, or --force to start over"
        )
    settings = directory / CONFIG
    if settings.exists():  # the configuration of a run that stopped before its first checkpoint may be replaced
        try:
            Config.load(settings)
        except InputError:
            raise InputError(
                f"{settings}: exists and does not belong to a run; choose another --out, or pass --force to replace it"
            ) from None


def is_run(directory: Path) -> bool:
    """Return whether a folder is a run folder: it has the marker, or the files of a run of an older version."""
    if (directory / MARKER).is_file():
        return True
    if any((directory / LAST.parent).glob("*.ckpt/state.json")):
        return True
    return (directory / CONFIG).is_file() and ((directory / FOLDER / TOWERS).is_file() or _lists_inputs(directory))


def _lists_inputs(directory: Path) -> bool:
    try:
        sizes = read_json(directory / INPUTS).values()
    except (OSError, ValueError):
        return False
    return all(isinstance(size, int) for size in sizes)


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
    parent = _parent(directory, warm_start, resume=resume)
    if config.training.refit:
        refuse_refit(config, continues=parent is not None)
    files, data = _read(source, config, parent, team, before=directory / INPUTS if resume else None)
    on_message(data.account)
    split = _split(data, config, parent, withdraw)
    on_message(split.account)
    if config.data.windows > 1 and team.ranks.size > 1:
        raise InputError(
            "data.windows: several windows need a single process; start without torchrun, or use data.windows=1"
        )
    for line in unused_tables(config, split.train):
        on_message(line)
    given = config
    config, rows = complete_settings(config, split, parent, on_message)
    if resume:
        require_same_settings(directory, config, len(split.train) if rows is None else len(rows))
    _check(config, split)
    if config.training.refit:
        refuse_refit(config, split, continues=False)
    if parent is None:
        for fitted in fit_features(config, split.train).values():
            on_message(fitted)
    team.require_shared(directory)
    if team.ranks.is_first and not resume:
        _begin(directory, config, parent)
        write_text(directory / INPUTS, json.dumps(files, indent=1))
    team.begins()
    model = fit(
        split,
        config.changed("training", refit=False),
        directory=directory,
        warm_start=parent,
        resume=resume,
        progress=progress,
        on_message=on_message,
    )
    on_message(_summary(model, config))
    on_message(f"evaluating on the test queries{' with baselines' if config.evaluation.baselines else ''}")
    measured = _measure(model, config)
    if config.data.windows > 1:
        assert isinstance(data, Interactions)  # `split_data` rejects a ready-made split
        measure_earlier(data, given, directory, resume=resume, progress=progress, on_message=on_message)
        measured = with_windows(measured, directory, model.split.test, config.data.windows)
        model.artifact.metadata["metrics"] = measured.to_dict()
    model.artifact.metadata["data"]["source"] = absolute(source)
    if config.training.refit:
        model.save(directory / VALIDATED)
        model = _refit(directory, model, resume=resume, progress=progress, on_message=on_message)
        measured = with_refit_note(measured, model.artifact.metadata["refit"])
        model.artifact.metadata["metrics"] = measured.to_dict()
        model.artifact.metadata["data"]["source"] = absolute(source)
    _finish(directory, config, model, measured, is_first=team.ranks.is_first)
    return model, measured


def _parent(directory: Path, warm_start: str | Path | None, *, resume: bool) -> ParentModel | None:
    """Load the model to continue from; an interrupted run has recorded the model in the run folder."""
    recorded = directory / PARENT
    if warm_start is None and resume and recorded.is_file():
        warm_start = json.loads(recorded.read_text(encoding="utf-8"))["model"]
    return None if warm_start is None else ParentModel.load(warm_start)


def _read(
    source: str | Path, config: Config, parent: ParentModel | None, team: Coordinator, *, before: Path | None
) -> tuple[dict[str, int], Interactions | Parts]:
    settings = config.data if parent is None else with_catalog(config.data)
    if parent is not None and ready_made(source, settings) is not None:
        raise InputError(
            f"{source}: a ready-made split; with --from, DATA must be new interactions that are not split, and "
            "data.validation and data.test must be fractions"
        )
    return read_by_all(source, settings, team, context=context_to_read(config), before=before)


def _split(
    data: Interactions | Parts, config: Config, parent: ParentModel | None, withdraw: str | Path | None
) -> Split | ContinuedSplit:
    if parent is None:
        return split_data(data, config.data, **split_options(config))
    assert isinstance(data, Interactions)  # `_read` rejects a ready-made split
    ids = None if withdraw is None else ids_like(read_ids(withdraw), parent.artifact.items, str(withdraw))
    return continue_with(parent, data, config, withdrawn=ids)


def _check(config: Config, split: Split) -> None:
    """Reject wrong settings before anything is written and before hours of training."""
    build_objective(config, split.train)
    evaluation.check_slices(split.train, config.evaluation.slices)
    for holdout in (split.validation, split.test):
        evaluation.check_targets(holdout, split.train.num_items, config.evaluation.exclude_seen)
    exposure_log(split, config.evaluation.exposure, config.evaluation.ks)


def _refit(
    directory: Path, model: Model, *, resume: bool, progress: bool, on_message: Callable[[object], None]
) -> Model:
    """Refit in `directory/refit`; resume an interrupted refit of the same validated model."""
    folder, metadata = directory / REFIT, model.artifact.metadata
    begun = json.dumps({name: metadata["training"][name] for name in ("kept_epochs", "history", "best")})
    marker = folder / BEGUN
    resume = resume and (folder / LAST).exists() and marker.is_file() and marker.read_text(encoding="utf-8") == begun
    if not resume:
        shutil.rmtree((folder / LAST).parent, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(marker, begun)
    return refit(model, directory=folder, resume=resume, progress=progress, on_message=on_message)


def _begin(directory: Path, config: Config, parent: ParentModel | None) -> None:
    """Write the files that a resumed run needs, and remove the files of an older run."""
    write_text(directory / MARKER, f"{version('twotower')}\n")
    shutil.rmtree((directory / LAST).parent, ignore_errors=True)  # checkpoints of an older run must not be resumed
    forget_windows(directory)
    for older, marker in ((directory / VALIDATED, TOWERS), (directory / REFIT, BEGUN)):
        if (older / marker).is_file():
            shutil.rmtree(older)
    write_text(directory / CONFIG, config.to_yaml())
    (directory / PARENT).unlink(missing_ok=True)
    if parent is not None:
        write_text(directory / PARENT, json.dumps({"model": parent.where, "fingerprint": parent.fingerprint}))


def _measure(model: Model, config: Config) -> Evaluation:
    """Evaluate on the test queries, and record the result in the model."""
    settings = config.evaluation
    measured = evaluate(
        model,
        model.split.test,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        baselines=settings.baselines,
        slices=settings.slices,
        log=exposure_log(model.split, settings.exposure, settings.ks),
    )
    measured = with_advice(measured, config)
    model.artifact.metadata["metrics"] = measured.to_dict()
    return measured


def _finish(directory: Path, config: Config, model: Model, measured: Evaluation, *, is_first: bool) -> None:
    """Write settings, model and results on the first rank; all ranks take part if the tables are sharded."""
    if is_first or model.artifact.is_shared:
        model.save(directory / FOLDER)
    if is_first:
        write_text(directory / CONFIG, config.to_yaml())  # a resumed run may have changed settings
        write_text(directory / "results.json", json.dumps(measured.to_dict(), indent=1))


def _discard(message: object) -> None:
    """Discard a message: only the first rank prints."""


def _summary(model: Model, config: Config) -> str:
    """Summarize training in one line."""
    result = model.fit
    text = f"trained {counted(result.epochs, 'epoch')} in {result.seconds:.0f} s"
    if not result.history:
        return text
    metric = config.training.metric
    best = max(result.history, key=lambda row: row[metric])
    before = model.artifact.metadata["training"].get("before", {}).get(metric)
    if before is not None:
        text = f"{text}; validation {metric} of the previous model {before:.4f}"
    ended = "stopped early" if result.epochs < config.training.max_epochs else "all epochs done"
    return f"{text} ({ended}); best validation {metric} {best[metric]:.4f} after epoch {int(best['epoch']) + 1}"


def annotated(measured: Evaluation, directory: str | Path, artifact: SavedModel, split: Split) -> Evaluation:
    """Add notes on the run to an evaluation: settings to try, earlier test windows, and whether there was a refit."""
    measured = with_advice(measured, artifact.config)
    measured = with_windows(measured, find_model(directory).parent, split.test, artifact.config.data.windows)
    return with_refit_note(measured, refit_of(directory))


def refit_of(directory: str | Path) -> dict[str, Any] | None:
    """Return the section `refit` of a saved model's metadata, or None if the model was not refitted."""
    found: dict[str, Any] | None = read_metadata(find_model(directory)).get("refit")
    return found


def reread(
    directory: str | Path, source: str | Path | None = None, team: Coordinator | None = None
) -> tuple[SavedModel, Split]:
    """Load a saved model, and read and split its data as for training.

    If the model was refitted on all rows, the validated model is loaded instead, because the refit was trained on the
    test rows.

    Args:
        directory: a run folder or a model folder.
        source: the current location of the data, if it has moved.
        team: the processes that read the same data; None for a single process.

    Raises:
        InputError: the data was not found, or is not the data that the model was trained on.
    """
    artifact = SavedModel.load(find_evaluated(directory))
    known = artifact.metadata["data"]
    if len(known.get("lineage", [])) > 1:  # only the model folder has the rows of all training runs of the model
        folder = find_model(directory)
        contexts = load_context(folder), load_context(folder, "test_context")
        return artifact, incremental.split_again(artifact, load_rows(folder) or {}, *contexts)
    location = source or known.get("source")
    if location is None:
        raise InputError(f"{directory}: the model does not record where its data is; pass it with --data")
    settings, columns = artifact.config.data, context_to_read(artifact.config)
    data = read_together(location, settings, team or Coordinator(Communicator()), context=columns)
    if data.fingerprint != known["fingerprint"]:
        raise InputError(
            f"{location}: not the data this model was trained on (fingerprint {data.fingerprint[:12]}, expected "
            f"{known['fingerprint'][:12]}): the test rows may include rows that the model was trained on; train a "
            "new model on this data instead"
        )
    # Older versions did not test queries that have a history but no training row.
    saved = artifact.metadata["split"]["settings"]
    histories, cold = bool(saved.get("histories", False)), None
    if artifact.config.data.texts_are_queries:
        histories, cold = artifact.config.query_tower.history is not None, saved["cold"]
    return artifact, split_data(data, artifact.config.data, histories=histories, cold=cold)


def audit_run(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    rows: int = 64,
    seed: int = 0,
    team: Coordinator | None = None,
) -> Subject:
    """Load the subject of `twotower audit`: a saved model, rows of its training data, its batches and its objective.

    Batches and objective are built as in `fit`, from the rows that the model was trained on; in an incremental run,
    these are the new rows and the replayed rows. Estimated frequencies continue from the best checkpoint.

    Args:
        directory: a run folder or a model folder.
        source: the current location of the data, if it has moved.
        rows: number of training rows to measure.
        seed: seed of the rows and the batches.
        team: the processes that share the measurement; None for a single process.

    Raises:
        InputError: as in `reread`; also if the model was trained with a rule or setting that leaves out items, or if
            an older version did not record the rows of an incremental run.
    """
    rule = read_metadata(find_model(directory))["config"].get("data", {}).get("eligibility")
    if rule and EligibilityConfig.model_validate(rule).governs_rows:
        raise InputError(
            f"{directory}: trained under data.eligibility; the audit compares with the softmax over the whole catalog, "
            "which this model does not estimate; use twotower evaluate, or audit a model without the rule"
        )
    artifact, split = reread(directory, source, team)
    if (setting := leaves_out_items(artifact.config.objective)) is not None:
        raise InputError(
            f"{directory}: trained with {setting}; the audit compares with the softmax over the whole catalog, which "
            "this model does not estimate; use twotower evaluate"
        )
    folder, trained = find_model(directory), None
    if len(artifact.metadata["data"].get("lineage", [])) > 1:
        trained = (load_rows(folder) or {}).get("trained")
        if trained is None:
            raise InputError(
                f"{directory}: the model does not record which rows it was trained on; continue its parent again with "
                "this version, or audit the parent"
            )
    context = {one.features.side: one for one in artifact.towers.feature_tables()}.get("context")
    config = artifact.config.resolved(len(split.train) if trained is None else len(trained))

    train, _ = weigh_train(config, split.train, trained, artifact.metadata.get("row_weights"))
    learnt = None if trained is None else train.select(trained)

    def batches(config: Config) -> Batches:
        return make_batches(config, train, trained, context=context)

    run = TrainingRun(
        batches=batches,
        objective=lambda config: make_objective(config, train, learnt, batches(config)),
        state=objective_state(artifact, folder.parent / BEST),
    )
    ranks = None if team is None else team.ranks
    return subject_of(replace(artifact, config=config), train, run, rows=rows, seed=seed, ranks=ranks)
