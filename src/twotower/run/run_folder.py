"""Run folders: `twotower train` writes one; its model is evaluated and audited later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

from twotower import evaluation, incremental
from twotower.audit.subject import Subject, subject_of
from twotower.config.run import Config
from twotower.data import Interactions, Parts, Split
from twotower.data.io.id_lists import ids_like, read_ids
from twotower.data.schema.vocabulary import listed
from twotower.distributed.launch import Coordinator, joined_processes
from twotower.errors import InputError
from twotower.evaluation import Evaluation
from twotower.features.from_config import fit_features, unused_tables, wanted_context
from twotower.incremental import ParentModel
from twotower.incremental.saved_rows import load_context, load_rows
from twotower.incremental.split import ContinuedSplit
from twotower.objectives.build import build_objective
from twotower.run.advice import with_advice
from twotower.run.data import absolute, read_by_all, read_data, ready_made, split_data, with_catalog
from twotower.run.model import Model, continue_with, evaluate, fit
from twotower.run.settings import CONFIG, complete_settings, require_same_settings
from twotower.serving import Retriever, SavedModel
from twotower.serving.model_folder import FOLDER, TOWERS, find_model
from twotower.system.checksums import read_json
from twotower.system.filesystem import locked, require_replaceable, write_text
from twotower.training import LAST, require_checkpoint

#: File of a run folder that lists the input files of the run and their sizes.
INPUTS = "inputs.json"
#: File of a run folder that names the model that the run continues.
PARENT = "parent.json"
#: File that identifies a folder as that of a run; older versions wrote none.
MARKER = ".twotower-run"
#: What a run writes over or deletes, apart from its model and settings, which have checks of their own.
OWN = (INPUTS, PARENT, "results.json", "checkpoints", "logs")
#: Lock file of a run folder, while a run writes into it.
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
        InputError: `out` is a file or cannot be written, another run is writing into it, it already contains a run and
            neither `resume` nor `replace` is set, or `resume` would not apply a setting.
        RankLost: another process of the run has died.
    """
    directory, training = Path(out), config.training
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
    """Create a folder and hold it for one process during the block; remove it if the block leaves it empty.

    Raises:
        InputError: it is a file, cannot be written, or another process holds it.
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
            raise InputError(f"{directory}: another run is writing into it; wait for it, or choose another --out")
        try:
            yield
        finally:
            stack.close()
            for path in created:
                with suppress(OSError):
                    path.rmdir()


def _require_free(directory: Path, *, replace: bool) -> None:
    require_replaceable(directory / FOLDER, TOWERS, "model")  # fail now, not after hours of training
    foreign = [] if is_run(directory) else [name for name in OWN if (directory / name).exists()]
    if foreign:
        raise InputError(
            f"{directory}: exists and is not the folder of a run, but contains {listed(foreign)}; choose another --out"
        )
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
    """Return whether a folder is that of a run: marked, or with the files of a run of an older version."""
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
    files, data = _read(source, config, parent, team, before=directory / INPUTS if resume else None)
    on_message(data.account)
    split = _split(data, config, parent, withdraw)
    on_message(split.account)
    _report_unused(config, split, on_message)
    config, rows = complete_settings(config, split, parent, on_message)
    if resume:
        require_same_settings(directory, config, len(split.train) if rows is None else len(rows))
    _check(config, split)
    if parent is None:
        _report_features(config, split, on_message)
    team.require_shared(directory)
    if team.ranks.is_first and not resume:
        _begin(directory, config, parent)
        write_text(directory / INPUTS, json.dumps(files, indent=1))
    team.begins()
    model = fit(
        split, config, directory=directory, warm_start=parent, resume=resume, progress=progress, on_message=on_message
    )
    on_message(_summary(model, config))
    on_message(f"evaluating on the test{' next to the baselines' if config.evaluation.baselines else ''}")
    measured = _measure(model, config)
    model.artifact.metadata["data"]["source"] = absolute(source)
    _finish(directory, config, model, measured, is_first=team.ranks.is_first)
    return model, measured


def _parent(directory: Path, warm_start: str | Path | None, *, resume: bool) -> ParentModel | None:
    """Load the model to continue from; that of an interrupted run is recorded in its folder."""
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
            f"{source}: a ready-made split; with --from, DATA is new interactions, not split, and data.validation and "
            "data.test are fractions"
        )
    return read_by_all(source, settings, team, context=wanted_context(config), before=before)


def _split(
    data: Interactions | Parts, config: Config, parent: ParentModel | None, withdraw: str | Path | None
) -> Split | ContinuedSplit:
    if parent is None:
        return split_data(data, config.data, histories=config.query_tower.history is not None)
    assert isinstance(data, Interactions)  # `_read` refuses a ready-made split
    ids = None if withdraw is None else ids_like(read_ids(withdraw), parent.artifact.items, str(withdraw))
    return continue_with(parent, data, config, withdrawn=ids)


def _report_unused(config: Config, split: Split, on_message: Callable[[object], None]) -> None:
    for line in unused_tables(config, split.train):
        on_message(line)


def _report_features(config: Config, split: Split, on_message: Callable[[object], None]) -> None:
    for fitted in fit_features(config, split.train).values():
        on_message(fitted)


def _check(config: Config, split: Split) -> None:
    """Refuse wrong settings now: before anything is written, and not after hours of training."""
    build_objective(config, split.train)
    evaluation.check_slices(split.train, config.evaluation.slices)
    for holdout in (split.validation, split.test):
        evaluation.check_targets(holdout, split.train.num_items, config.evaluation.exclude_seen)


def _begin(directory: Path, config: Config, parent: ParentModel | None) -> None:
    """Write what a resumed run needs, in place of what an older run has left."""
    write_text(directory / MARKER, f"{version('twotower')}\n")
    shutil.rmtree((directory / LAST).parent, ignore_errors=True)  # of an older run: must not be resumed
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
    )
    measured = with_advice(measured, config)
    model.artifact.metadata["metrics"] = measured.to_dict()
    return measured


def _finish(directory: Path, config: Config, model: Model, measured: Evaluation, *, is_first: bool) -> None:
    """Write settings, model and results on the first rank; all ranks take part if the tables are sharded."""
    if is_first or model.artifact.is_shared:
        model.save(directory / FOLDER)
    if is_first:
        write_text(directory / CONFIG, config.to_yaml())  # a resumed run may have changed some
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
    measured = evaluation.evaluate(
        Retriever(artifact),
        split.test,
        train=split.train,
        ks=tuple(settings.ks),
        exclude_seen=settings.exclude_seen,
        baselines=settings.baselines,
        validation=split.validation,
        slices=settings.slices,
    )
    return with_advice(measured, artifact.config)


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
    # Models of older versions were tested without the queries that have a history but no training row.
    histories = bool(artifact.metadata["split"]["settings"].get("histories", False))
    return artifact, split_data(data, artifact.config.data, histories=histories)


def audit_run(directory: str | Path, source: str | Path | None = None, *, rows: int = 64, seed: int = 0) -> Subject:
    """Load what `twotower audit` measures: a saved model, rows of its training data, and their batches.

    Raises:
        InputError: see `evaluate_run`.
    """
    artifact, split = reread(directory, source)
    return subject_of(artifact, split.train, rows=rows, seed=seed)
