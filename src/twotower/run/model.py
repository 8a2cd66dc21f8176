"""`tt.fit`, `tt.continue_with` and `tt.evaluate`: from a split and settings to a trained, evaluated model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower import evaluation, incremental
from twotower.config.run import Config
from twotower.data import ExposureLog, GroupedBatches, Holdout, Interactions, KnownPositives, Split
from twotower.data.loading.questions import QuestionBatches
from twotower.data.schema.vocabulary import IdValues
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard, placed_tables
from twotower.errors import InputError, counted, require_flags
from twotower.evaluation import Evaluation
from twotower.features.feature_set import EncodedTable
from twotower.features.from_config import encode_features, in_training
from twotower.incremental import ParentModel
from twotower.incremental.split import ContinuedSplit
from twotower.negatives.frequency import count_by_group
from twotower.objectives.build import needs_known_positives
from twotower.ranking import Ranker
from twotower.ranking.distributed import ShardedRanker, over_ranks, own_item_embeddings
from twotower.ranking.tower_ranker import SlowProgress
from twotower.run.batches import make_batches, make_objective, row_events, row_gaps, weigh_train
from twotower.run.data import split_data
from twotower.run.mining import make_mining
from twotower.run.propagation import use_training_rows
from twotower.run.recent_prior import RecentPrior, add_recent_prior
from twotower.run.refit import Refit, refuse_refit, without_holdouts
from twotower.run.settings import complete_settings
from twotower.run.start_weights import StartWeights
from twotower.run.validation import Validator
from twotower.run.widths import WidthRanker, with_widths
from twotower.serving import Retriever, SavedModel
from twotower.system.hardware import peak_memory
from twotower.towers import TwoTower, build_towers
from twotower.towers.propagation import fold
from twotower.towers.sharded_lookup import move_to_tables, shared_tables_of
from twotower.training import place_tables, plan_memory

if TYPE_CHECKING:
    from twotower.training import FitResult


@dataclass(frozen=True)
class Model:
    """A trained model that ranks, recommends and can be saved.

    Attributes:
        artifact: the content of the model folder.
        split: the data that the model was trained and validated on.
        fit: the result of training.
    """

    artifact: SavedModel
    split: Split
    fit: FitResult

    @cached_property
    def retriever(self) -> Retriever:
        """A retriever for this model, in one process.

        Raises:
            InputError: the tables are sharded over ranks.
        """
        if self.artifact.is_shared:
            raise InputError(
                "model: the tables are sharded over several ranks; save the model and load it in one process"
            )
        return Retriever(self.artifact)

    @cached_property
    def ranker(self) -> Ranker:
        """The ranker for an evaluation; on several ranks, all must use it together."""
        if self.artifact.is_shared:
            return ShardedRanker(self.artifact.towers, self.artifact.config.history_length, Communicator.current())
        return over_ranks(self.retriever, Communicator.current())

    def at_width(self, width: int) -> Ranker:
        """Return a ranker that uses the first coordinates of nested embeddings; see `ranker` for several ranks."""
        ranks = Communicator.current()
        if self.artifact.is_shared:
            return ShardedRanker(self.artifact.towers, self.artifact.config.history_length, ranks, width=width)
        return over_ranks(WidthRanker(self.retriever, width), ranks)

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray:
        """Return the top k items of every query of a holdout, int64 [E, k]."""
        return self.retriever.rank(holdout, k, exclude_seen)

    def save(self, directory: str | Path) -> Path:
        """Write the model folder atomically. If the tables are sharded, all ranks must call this together."""
        return self.artifact.save(directory, Communicator.current() if self.artifact.is_shared else None)


def fit(
    split: Split,
    config: Config | str | Path | None = None,
    *,
    directory: str | Path | None = None,
    warm_start: Model | ParentModel | str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_message: Callable[[object], None] | None = None,
    on_epoch: Callable[[dict[str, float]], bool] | None = None,
) -> Model:
    """Train a two-tower model from scratch, or continue training an existing one on new data.

    Args:
        split: training interactions, and the validation queries for early stopping; with `warm_start`, the split that
            `continue_with` returns.
        config: settings or a YAML file; None for the settings of `warm_start`, or the defaults.
        warm_start: the model to continue from, or its folder.
        directory: folder for checkpoints and logs; a temporary folder if None. With several ranks it is required and
            must be shared by all of them.
        resume: resume from the last checkpoint in `directory`.
        progress: show a progress bar.
        on_message: a function that receives the memory plan and other messages about the run; None discards them.
        on_epoch: a function that receives the metrics of each validation and returns whether to stop; an exception in
            it ends the run.

    Returns:
        The model with its best weights.

    Raises:
        InputError: a setting is wrong, there is no checkpoint to resume from, or `split` does not continue
            `warm_start`.
        Interrupted: Ctrl-C was pressed; `directory`, if given, contains a checkpoint.
    """
    require_flags(resume=resume)
    parent = incremental.parent_of(warm_start)
    config = _loaded(config, parent)
    if config.training.refit:
        raise InputError(
            "training.refit: fit trains only the validated model; set training.refit=false and pass the model to "
            "twotower.run.refit, or use `twotower train --refit`"
        )
    return _fit(
        split,
        config,
        directory=directory,
        parent=parent,
        resume=resume,
        progress=progress,
        on_message=on_message,
        on_epoch=on_epoch,
    )


def refit(
    model: Model,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_message: Callable[[object], None] | None = None,
) -> Model:
    """Train again on all rows, including validation and test, with the same settings, seed and number of epochs.

    Choices made on the validation queries are reused. The returned model cannot be evaluated on the rows that it was
    trained on; the metrics in its metadata are the metrics of `model`.

    Args:
        model: the validated model, from `fit` without `warm_start`.
        directory: see `fit`.
        resume: resume from the last checkpoint in `directory`.
        progress: show a progress bar.
        on_message: a function that receives a message with the numbers of rows and epochs; None discards it.

    Returns:
        The refitted model, whose split has no holdouts.

    Raises:
        InputError: `model` continues another model, its split has no validation, `training.time_limit` is set, or there
            are several processes.
        Interrupted: Ctrl-C was pressed; `directory`, if given, contains a checkpoint.
    """
    artifact, split = model.artifact, model.split
    refuse_refit(artifact.config, split, continues=len(artifact.metadata["data"]["lineage"]) > 1)
    taken = Refit.of(artifact.metadata)
    if on_message is not None:
        on_message(
            f"refit on all {counted(len(split.data), 'row')} ({len(split.train):,} before) "
            f"for {counted(taken.epochs, 'epoch')}, as in the validated run"
        )
    found = _fit(
        without_holdouts(split),
        artifact.config,
        directory=directory,
        parent=None,
        resume=resume,
        progress=progress,
        on_message=None,
        refit=taken,
    )
    metadata = found.artifact.metadata
    metadata["training"]["best"] = artifact.metadata["training"]["best"]
    metadata["recent_prior"] = artifact.metadata["recent_prior"]
    metadata["refit"] = {
        "epochs": taken.epochs,
        "rows": len(split.data),
        "validated_rows": len(split.train),
        "metrics": "of the validated model",
    }
    return replace(found, artifact=replace(found.artifact, config=artifact.config.changed("training", refit=True)))


def _fit(
    split: Split,
    config: Config,
    *,
    directory: str | Path | None,
    parent: ParentModel | None,
    resume: bool,
    progress: bool,
    on_message: Callable[[object], None] | None,
    on_epoch: Callable[[dict[str, float]], bool] | None = None,
    refit: Refit | None = None,
) -> Model:
    """Train a model; `refit` contains the choices of the validated run that a run on all rows reuses."""
    # Imported here because Lightning is slow to import and nothing else needs it.
    from twotower.incremental.warm_start import extend_features, load_parent_state  # noqa: PLC0415
    from twotower.training import FitResult, fit_towers  # noqa: PLC0415

    settings, rows = complete_settings(config, split, parent, on_message)
    kept = None if parent is None else parent.artifact.metadata.get("row_weights")
    train, quantiles = weigh_train(settings, split.train, rows, kept)
    ranks = Communicator.current()
    with _folder(directory) as folder, _seeded(settings.training.seed):
        growth = None if parent is None else extend_features(parent, incremental.require_continued(split))
        features = encode_features(settings, train) if growth is None else growth.features
        towers = _build_towers(settings, train, features, ranks, on_message)
        batches = make_batches(settings, train, rows, ranks, features.get("context"))
        questions = batches if isinstance(batches, QuestionBatches) else None
        slates = (batches.batches if isinstance(batches, GroupedBatches) else batches).slates
        if slates is not None and on_message is not None:
            on_message(slates)
        learnt = train if rows is None else train.select(rows)
        validate = Validator(split.validation, settings, train) if len(split.validation) else None
        start = StartWeights(folder, ranks, resume=resume)
        if parent is None and not resume:
            start.make(
                towers,
                settings,
                train,
                questions,
                validate=validate,
                choice=None if refit is None else refit.start,
                on_message=on_message,
            )
        settings = start.resize(towers, settings)
        objective = make_objective(settings, train, learnt, batches)
        optimizer = None
        if parent is not None and growth is not None:
            optimizer = load_parent_state(
                parent, settings, growth, towers=towers, objective=objective, ranks=ranks, on_message=on_message
            )
        counts = torch.from_numpy(count_by_group(learnt) if settings.objective.is_grouped else learnt.item_counts())
        use_training_rows(towers, settings, learnt, every=train, continues=parent is not None)
        mine = make_mining(objective, settings, train, towers)
        plan = plan_memory(settings, towers, objective, train, ranks)
        if on_message is not None:
            on_message(plan)
        before = None if parent is None or resume else _measure_parent(towers, mine, validate)
        if refit is not None and not refit.epochs:
            result = FitResult(towers, None, 0, 0.0, 0.0, peak_memory(), [], kept=0)
        else:
            result = fit_towers(
                towers,
                objective,
                batches,
                settings.training,
                folder,
                known_positives=KnownPositives(train) if needs_known_positives(settings) else None,
                counts=counts,
                mine=mine,
                validate=validate,
                resume=resume,
                progress=progress,
                hyperparameters=settings.model_dump(mode="json"),
                warm_start=optimizer,
                in_background=plan.in_background,
                epochs=None if refit is None else refit.epochs,
                on_epoch=on_epoch,
            )
        result = start.or_better(result, on_message)
        fold(towers)
        prior = None
        if refit is None:
            prior = add_recent_prior(towers, split, settings, validate, on_message)
        else:
            refit.set_prior(towers, train)
        chosen = start.choice()
    model = _model(settings, split, result, parent=parent, rows=rows, before=before, prior=prior, start=chosen)
    if quantiles is not None:
        model.artifact.metadata["row_weights"] = quantiles
    return model


def continue_with(
    warm_start: Model | ParentModel | str | Path,
    data: Interactions,
    config: Config | None = None,
    *,
    withdrawn: IdValues | None = None,
) -> ContinuedSplit:
    """Join new interactions to a model's training data and split them, for `fit(split, warm_start=model)`.

    Args:
        warm_start: the model, or its folder.
        data: the new interactions, or the complete log, whose rows up to the model's last timestamp are skipped.
        config: settings whose section `data` defines the split; the model's settings if None.
        withdrawn: ids of items to remove from the catalog.

    Returns:
        A split with the old rows and some of the new rows for training, and new rows for validation and test.

    Raises:
        InputError: there are no new rows, the ids have a different type, or the split is impossible.
    """
    parent = incremental.parent_of(warm_start)
    assert parent is not None
    settings = parent.artifact.config if config is None else config
    if settings.data.split == "random":
        raise InputError(
            "data.split=random: its training rows are not earlier than its test rows, so it cannot be used to continue "
            "a model; use data.split=time or data.split=leave-last-out for the new data"
        )
    if settings.data.windows > 1:
        raise InputError("data.windows: a continued model is tested on the newest rows; use data.windows=1 with --from")
    return incremental.new_days(
        parent,
        data,
        settings,
        lambda fresh: split_data(fresh, settings.data, cold="keep", histories=settings.query_tower.history is not None),
        withdrawn=withdrawn,
    )


def _loaded(config: Config | str | Path | None, parent: ParentModel | None) -> Config:
    if config is None and parent is not None:
        return parent.artifact.config.changed("training", refit=False)
    return config if isinstance(config, Config) else Config.load(config)


@contextmanager
def _folder(directory: str | Path | None) -> Iterator[Path]:
    """Yield the folder for checkpoints and logs; a temporary folder if None."""
    if directory is not None:
        yield Path(directory)
        return
    if Communicator.current().size > 1:
        raise InputError("fit(directory=...): required with several ranks; pass a folder that all ranks share")
    with tempfile.TemporaryDirectory(prefix="twotower-") as temporary:
        yield Path(temporary)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed initial weights, row order and draws, and restore the caller's random state at the end of the block."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _measure_parent(
    towers: TwoTower, mine: Callable[[TwoTower], None] | None, validate: Validator | None
) -> dict[str, float] | None:
    """Mine negatives with the parent model and measure it before the first epoch."""
    move_to_tables(towers)
    if mine is not None:
        mine(towers)
    return None if validate is None else validate(towers)


def _build_towers(
    config: Config,
    train: Interactions,
    features: Mapping[str, EncodedTable],
    ranks: Communicator,
    on_message: Callable[[object], None] | None,
) -> TwoTower:
    placement = place_tables(config, train, ranks)
    if placement.parts and on_message is not None:
        on_message(placement)
    with placed_tables(placement.parts, placement.open_engine(config.item_tower.dimension)):
        return build_towers(
            config,
            num_queries=train.num_queries,
            num_items=train.num_items,
            item_features=features.get("item"),
            query_features=features.get("query"),
            context=features.get("context"),
            trained_items=torch.from_numpy(in_training(train, "item")),
            trained_queries=torch.from_numpy(in_training(train, "query")),
        )


def _model(
    config: Config,
    split: Split,
    result: FitResult,
    *,
    parent: ParentModel | None,
    rows: NDArray[np.int64] | None,
    before: dict[str, float] | None,
    prior: RecentPrior | None,
    start: dict[str, Any] | None,
) -> Model:
    """Collect the content of the model folder; `before` has the validation metrics of the parent."""
    data, towers = split.data, result.towers.eval()
    new = len(split.train) if rows is None else int((~incremental.require_continued(split).learnt).sum())
    training = {
        "epochs": result.epochs,
        "kept_epochs": result.kept,
        "start": start,
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "peak_memory": result.peak_memory,
        "best": {config.training.metric: result.best if prior is None else prior.after[config.training.metric]},
        "history": result.history,
    }
    artifact = SavedModel(
        config=config,
        towers=towers,
        item_embeddings=_item_embeddings(towers),
        item_counts=torch.from_numpy(split.train.item_counts()),
        queries=data.queries,
        items=data.items,
        history_offsets=data.offsets,
        history_items=data.item_codes,
        history_gaps=row_gaps(config, data),
        history_events=row_events(config, data),
        item_table=data.item_table,
        rows=incremental.saved_rows_of(split, rows),
        contexts=incremental.contexts_of(split, config),
        metadata={
            "data": {
                "fingerprint": data.fingerprint,
                "account": data.account.to_dict(),
                "groups": None if data.group_names is None else data.group_names.ids.to_list(),
                "lineage": incremental.lineage(parent, split, new, 0 if rows is None else len(rows) - new),
            },
            "split": {"name": split.name, "settings": split.settings, "account": split.account.to_dict()},
            "training": training if before is None else {**training, "before": before},
            "recent_prior": None if prior is None else prior.to_dict(),
        },
    )
    return Model(artifact, split, result)


def _item_embeddings(towers: TwoTower) -> Tensor:
    """Embed all items, or only this rank's items if the tables are sharded."""
    if shared_tables_of(towers):
        return own_item_embeddings(towers, RowShard(Communicator.current(), towers.item_tower.num_items))
    with SlowProgress("embedding the items") as bar:
        return towers.item_embeddings(bar)


def evaluate(
    model: Ranker,
    holdout: Holdout,
    *,
    train: Interactions | None = None,
    ks: tuple[int, ...] = (10, 20),
    exclude_seen: bool = True,
    baselines: bool | Sequence[str] = True,
    validation: Holdout | None = None,
    empty: Literal["skip", "zero"] = "skip",
    slices: Sequence[str] = (),
    log: ExposureLog | None = None,
) -> Evaluation:
    """Evaluate a model and the baselines on rankings of the full catalog, for every query of a holdout.

    Args:
        model: a `Model`, or anything with `rank(holdout, k, exclude_seen)`.
        holdout: queries with histories and targets, such as `split.test`.
        train: the training interactions, for baselines and popularity slices; None to take them from the `Model`.
        ks: cut-offs K.
        exclude_seen: leave items of the query's history out of the ranking.
        baselines: True to measure all baselines too (see `fit_baselines`), False for none, or the names of some.
        validation: the validation queries, on which settings of the baselines are chosen; None to take them from the
            `Model`.
        empty: whether queries without targets are excluded from every mean (`"skip"`) or count as 0 (`"zero"`).
        slices: columns to slice by, such as `"items.genres"` or `"queries.age"`.
        log: the items shown in the test window, from `exposure_log`, to estimate rewards; None for no estimate.

    Raises:
        InputError: `train` is missing and `model` is not a `Model`, or a column named in `slices` is in no table.
    """
    if train is None:
        if not isinstance(model, Model):
            raise InputError("evaluate: pass train=..., the training interactions, for baselines and popularity slices")
        train = model.split.train
    if validation is None and isinstance(model, Model) and holdout is not model.split.validation:
        validation = model.split.validation
    measured = evaluation.evaluate(
        model.ranker if isinstance(model, Model) else over_ranks(model, Communicator.current()),
        holdout,
        train=train,
        ks=ks,
        exclude_seen=exclude_seen,
        baselines=baselines,
        validation=validation,
        empty=empty,
        slices=slices,
        log=log,
        ranks=Communicator.current(),
    )
    if not isinstance(model, Model):
        return measured
    return with_widths(measured, model.artifact.towers.widths, model.at_width, holdout, train, empty=empty)
