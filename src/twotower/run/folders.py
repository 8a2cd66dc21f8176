"""Run folders: a training as the command line runs it, and what is measured of it later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower import continuing, evaluation
from twotower.analysis.subject import Subject, subject_of
from twotower.build import build_objective
from twotower.config import Config
from twotower.continuing import Parent
from twotower.continuing.kept import load_context, load_rows
from twotower.data import Split
from twotower.data.declaring import fit_features, unused_tables, wanted_context, with_features
from twotower.data.written import ids_like, read_ids
from twotower.errors import InputError
from twotower.evaluation import Evaluation
from twotower.files import require_replaceable, write_text
from twotower.launch import joined
from twotower.run.fitting import Model, continue_with, fit
from twotower.run.measuring import evaluate
from twotower.run.reading import absolute, read_by_all, read_data, split_data, with_catalog
from twotower.serving import Artifact, Retriever
from twotower.serving.artifact import FOLDER, TOWERS, find_model, read_metadata
from twotower.team import Team
from twotower.training import LAST

#: In a run folder: the files that the run began with, and their sizes.
INPUTS = "inputs.json"


def train_run(
    source: str | Path,
    out: str | Path,
    config: Config,
    *,
    start: str | Path | None = None,
    withdraw: str | Path | None = None,
    resume: bool = False,
    replace: bool = True,
    progress: bool = True,
    say: Callable[[object], None] = print,
) -> tuple[Model, Evaluation]:
    """The whole of `twotower train`: read, split, fit, evaluate on the test queries, write the run folder.

    Under torchrun its processes train one model together; the first of them writes and tells. Where torchrun has
    started them anew, they go on from the last checkpoint, if there is one.

    Args:
        source: a file, a folder or the name of a data set.
        out: the run folder: `config.yaml`, `model/`, `results.json`, `checkpoints/`, `logs/`.
        config: the settings.
        start: folder of the model to go on with; `source` then holds the new days.
        withdraw: file of item ids that leave its catalog.
        resume: go on with an interrupted run in `out`.
        replace: otherwise, replace what is there.
        progress: show a progress bar.
        say: where the accounts are told.

    Raises:
        InputError: a run is in `out`, and is neither to be replaced nor gone on with.
        RankLost: another process of the run is gone.
    """
    training = config.training
    with joined(timeout=training.exchange_timeout, accelerator=training.accelerator) as team:
        if team.goes_on and not resume:  # torchrun gives the same words again
            resume = bool(team.said_by_first("resume", "yes" if (Path(out) / LAST).exists() else ""))
        elif not resume and team.ranks.is_first:
            _require_free(Path(out), replace=replace)
        return _train(
            source,
            Path(out),
            config,
            team,
            start=start,
            withdraw=withdraw,
            resume=resume,
            progress=progress,
            say=say if team.ranks.is_first else _nobody,
        )


def _require_free(directory: Path, *, replace: bool) -> None:
    require_replaceable(directory / FOLDER, TOWERS, "model")  # not hours later
    if replace:
        return
    if (directory / FOLDER).exists():
        raise InputError(f"{directory}: a model is there already; choose another --out, or give --force to replace it")
    if (directory / LAST.parent).exists():
        raise InputError(f"{directory}: an interrupted run is there; go on with --resume, or start anew with --force")
    settings = directory / "config.yaml"
    if settings.exists():  # of a run that did not come far, it is replaced
        try:
            Config.load(settings)
        except InputError:
            raise InputError(
                f"{settings}: is there and is not of a run; choose another --out, or give --force to replace it"
            ) from None


def _train(
    source: str | Path,
    directory: Path,
    config: Config,
    team: Team,
    *,
    start: str | Path | None,
    withdraw: str | Path | None,
    resume: bool,
    progress: bool,
    say: Callable[[object], None],
) -> tuple[Model, Evaluation]:
    is_first = team.ranks.is_first
    parents = directory / "parent.json"
    if start is None and resume and parents.is_file():
        start = json.loads(parents.read_text(encoding="utf-8"))["model"]
    parent = None if start is None else Parent.load(start)
    reading = config.data if parent is None else with_catalog(config.data)
    files, data = read_by_all(
        source, reading, team, context=wanted_context(config), before=directory / INPUTS if resume else None
    )
    say(data.account)
    split: Split
    if parent is None:
        split = split_data(data, config.data)
    else:
        ids = None
        if withdraw is not None:
            ids = ids_like(read_ids(withdraw), parent.artifact.items, str(withdraw))
        split = continue_with(parent, data, config, withdrawn=ids)
    say(split.account)
    for line in unused_tables(config, split.train):
        say(line)
    rows = continuing.rows_to_learn(split, parent, config)
    if parent is not None:
        config = continuing.settled(parent.artifact.config, config)
    config = with_features(config.resolved(len(split.train) if rows is None else len(rows)), split.train)
    # A wrong setting is told before anything is written.
    build_objective(config, split.train)
    if parent is None:
        for fitted in fit_features(config, split.train).values():
            say(fitted)
    evaluation.check_slices(split.train, config.evaluation.slices)
    for asked in (split.validation, split.test):
        evaluation.check_targets(asked, split.train.num_items, config.evaluation.exclude_seen)
    directory.mkdir(parents=True, exist_ok=True)
    team.require_shared(directory)
    if not resume and is_first:
        shutil.rmtree((directory / LAST).parent, ignore_errors=True)  # of another run: nobody may go on from it
        write_text(directory / "config.yaml", config.to_yaml())
        write_text(directory / INPUTS, json.dumps(files, indent=1))
        parents.unlink(missing_ok=True)
        if parent is not None:
            write_text(parents, json.dumps({"model": parent.where, "fingerprint": parent.fingerprint}))
    team.begins()
    model = fit(split, config, directory=directory, start=parent, resume=resume, progress=progress, say=say)
    if resume and is_first:  # only now: settings that do not fit the checkpoint must not replace those that do
        write_text(directory / "config.yaml", config.to_yaml())
    say(_story(model, config))
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
    """What a run leaves: by its first rank, but for a model whose tables the ranks share."""
    if is_first or model.artifact.is_shared:
        model.save(directory / FOLDER)
    if is_first:
        write_text(directory / "results.json", json.dumps(measured.to_dict(), indent=1))


def _nobody(told: object) -> None:
    """What the ranks after the first have to say: the same again."""


def _story(model: Model, config: Config) -> str:
    """One line on how the fitting went."""
    result = model.fit
    text = f"trained {result.epochs} epochs in {result.seconds:.0f} s"
    if not result.history:
        return text
    metric = config.training.metric
    best = max(result.history, key=lambda row: row[metric])
    before = model.artifact.metadata["training"].get("before", {}).get(metric)
    if before is not None:
        text = f"{text}; validation {metric} of the model it went on from {before:.4f}"
    ended = "stopped early" if result.epochs < config.training.max_epochs else "all epochs done"
    return f"{text} ({ended}); best validation {metric} {best[metric]:.4f} after epoch {int(best['epoch']) + 1}"


def evaluate_run(directory: str | Path, source: str | Path | None = None) -> Evaluation:
    """The whole of `twotower evaluate`: a saved model on the test queries of its data, or of other data.

    Raises:
        InputError: the data is not to be found, or not the data the model was trained on.
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


def reread(directory: str | Path, source: str | Path | None = None) -> tuple[Artifact, Split]:
    """A saved model, and the data it was trained on, read and split as then.

    Raises:
        InputError: the data is not to be found, or not the data the model was trained on.
    """
    artifact = Artifact.load(directory)
    known = artifact.metadata["data"]
    if len(known.get("lineage", [])) > 1:  # its test rows stand after a past that only the model folder holds
        folder = find_model(directory)
        contexts = load_context(folder), load_context(folder, "test_context")
        return artifact, continuing.split_again(artifact, load_rows(folder) or {}, *contexts)
    given = source or known.get("source")
    if given is None:
        raise InputError(f"{directory}: the model does not say where its data is; give it with --data")
    data = read_data(given, artifact.config.data, context=wanted_context(artifact.config))
    if data.fingerprint != known["fingerprint"]:
        raise InputError(
            f"{given}: not the data this model was trained on (fingerprint {data.fingerprint[:12]}, expected "
            f"{known['fingerprint'][:12]}): its training rows may be in this test; train on this data instead"
        )
    return artifact, split_data(data, artifact.config.data)


def settings_of(directory: str | Path) -> dict[str, Any]:
    """The settings of a saved model, for a training that goes on with it: "auto" where rows decide."""
    values: dict[str, Any] = read_metadata(find_model(directory))["config"]
    for name in ("batch_size", "warmup_steps"):
        values.get("training", {}).pop(name, None)
    return values


def audit_run(directory: str | Path, source: str | Path | None = None, *, rows: int = 64, seed: int = 0) -> Subject:
    """What `twotower audit` measures: a saved model, rows of its training data, and their batches.

    Raises:
        InputError: as those of `evaluate_run`.
    """
    artifact, split = reread(directory, source)
    return subject_of(artifact, split.train, rows=rows, seed=seed)
