"""From settings to a trained, evaluated model: the only place that maps names to classes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from twotower import continuing, evaluation
from twotower.analysis.subject import Subject, subject_of
from twotower.build import build_objective, needs_known_positives, reads_gaps, reads_sequences
from twotower.config import Config, DataConfig, HashedConfig
from twotower.continuing import Parent
from twotower.data import (
    GroupedBatches,
    Holdout,
    Interactions,
    KnownPositives,
    SequenceBatches,
    Split,
    TrainingBatches,
    by_time,
    datasets,
    held_out_queries,
    leave_last_out,
)
from twotower.data.context import Wanted
from twotower.data.declaring import (
    encode_context,
    encode_features,
    fit_features,
    in_training,
    unused_tables,
    wanted_context,
    with_features,
)
from twotower.data.encoding import EncodedTable
from twotower.data.folders import listing, refuse_other_files
from twotower.data.gaps import gap_codes
from twotower.data.past import ContinuedSplit
from twotower.data.proposing import Proposed, propose
from twotower.data.proposing_context import propose_context
from twotower.data.written import ids_like, read_ids
from twotower.errors import InputError
from twotower.evaluation import Evaluation, Ranker
from twotower.evaluation.by_parts import ShardedRanker, own_item_embeddings
from twotower.evaluation.over_ranks import item_embeddings, over_ranks
from twotower.evaluation.towers import TowerRanker
from twotower.files import write_text
from twotower.ids import Hashed
from twotower.launch import Launch, Team, joined
from twotower.losses import Objective
from twotower.machine import cores
from twotower.negatives import Mined
from twotower.ranks import Ranks
from twotower.schema import IdValues
from twotower.serving import Artifact, Retriever
from twotower.serving.artifact import FOLDER, find_model, load_context, load_rows, read_metadata
from twotower.towers import TwoTower, build_towers
from twotower.towers.lookups import shared_tables_of
from twotower.towers.shards import Part

if TYPE_CHECKING:
    from twotower.training import FitResult

#: Queries mined at once.
MINING_BLOCK = 8192

#: In a run folder: the files that the run began with, and their sizes.
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Model:
    """A fitted model: ranks, recommends, saves itself.

    Attributes:
        artifact: what `save` writes.
        split: what it was fitted on.
        fit: how the fitting went.
    """

    artifact: Artifact
    split: Split
    fit: FitResult

    @cached_property
    def retriever(self) -> Retriever:
        """The model as something that answers by ids.

        Raises:
            InputError: its tables lie in parts on several ranks.
        """
        if self.artifact.is_shared:
            raise InputError("model: its tables lie in parts on several ranks; save it, and load it in one process")
        return Retriever(self.artifact)

    @cached_property
    def ranker(self) -> Ranker:
        """What ranks for an evaluation; over ranks all of them ask for it, and use it together."""
        if self.artifact.is_shared:
            return ShardedRanker(self.artifact.towers, history_length(self.artifact.config), Ranks.current())
        return over_ranks(self.retriever, Ranks.current())

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray:
        """Best items of every query of a holdout, int64 [E, k]."""
        return self.retriever.rank(holdout, k, exclude_seen)

    def save(self, directory: str | Path) -> Path:
        """Write the model folder, whole or not at all; by all ranks together where they share its tables."""
        return self.artifact.save(directory, Ranks.current() if self.artifact.is_shared else None)


def read_data(
    source: str | Path, settings: DataConfig, *, items: str | None = None, context: Wanted = None
) -> Interactions:
    """Read a file, a folder or a named data set with the settings of section `data`.

    `context`: further columns of the interactions to read; those that a configuration needs are `wanted_context`.
    """
    told = settings.query_ids
    return datasets.load(
        source,
        items=items or settings.items,
        queries=settings.queries,
        columns=settings.columns.model_dump(),
        positive_label=settings.positive_label,
        catalog=settings.catalog,
        context=context,
        query_ids=Hashed(told.hashed) if isinstance(told, HashedConfig) else told,
        item_ids=settings.item_ids,
        workers=settings.workers or max(cores() // Launch.of_environment().local_size, 1),
    )


def split_data(data: Interactions, settings: DataConfig, *, cold: Literal["drop", "keep"] | None = None) -> Split:
    """Split as section `data` says; `cold` in place of the protocol's own way with cold targets."""
    told: dict[str, Any] = {} if cold is None else {"cold": cold}
    if settings.split == "leave-last-out":
        return leave_last_out(data, validation_queries=settings.validation_queries, **told)
    if settings.split == "held-out-queries":
        return held_out_queries(data, validation=settings.validation, test=settings.test, **told)
    return by_time(data, validation=settings.validation, test=settings.test, **told)


def fit(
    split: Split,
    config: Config | str | Path | None = None,
    *,
    directory: str | Path | None = None,
    start: Model | Parent | str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[object], None] | None = None,
) -> Model:
    """Train a two-tower model, or go on with one on new days.

    Args:
        split: training interactions and the validation queries that early stopping looks at; with `start` what
            `continued` makes of new days.
        config: settings, or a YAML file of them; the defaults where None, with `start` those of that model.
        start: the model to go on with, or its folder.
        directory: where checkpoints and logs go; a temporary folder where None.
        resume: go on from the last checkpoint in `directory`.
        progress: show a progress bar.
        say: where the memory plan is told; nowhere where None.

    Returns:
        The model with its best weights.

    Raises:
        InputError: a setting is wrong, or there is nothing to resume; `split` does not continue `start`.
        Interrupted: Ctrl-C; a checkpoint was left in `directory`.
    """
    # Lightning is slow to import, and only this needs it.
    from twotower.continuing.growth import carry_on, grown_features  # noqa: PLC0415
    from twotower.training import fit_towers, place_tables, plan_memory  # noqa: PLC0415

    parent = continuing.parent_of(start)
    if config is None and parent is not None:
        config = parent.artifact.config
    settings = config if isinstance(config, Config) else Config.load(config)
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="twotower-") as temporary:
            return fit(split, settings, directory=temporary, start=parent, resume=resume, progress=progress, say=say)
    rows = continuing.rows_to_learn(split, parent, settings)
    if parent is not None:
        settings = continuing.settled(parent.artifact.config, settings)
    settings = with_features(settings.resolved(len(split.train) if rows is None else len(rows)), split.train)
    train, training = split.train, settings.training
    learnt = None if rows is None else train.select(rows)
    ranks = Ranks.current()
    placement = place_tables(settings, train, ranks, kept_whole=_kept_whole(settings, parent))
    # The seed decides the start, the order of the rows and the draws; the caller's generators are left as they were.
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        growth = None if parent is None else grown_features(parent, continuing.checked(split))
        features = encode_features(settings, train) if growth is None else growth.features
        with placement.applied():
            towers = build_towers(
                settings,
                num_queries=train.num_queries,
                num_items=train.num_items,
                item_features=features.get("item"),
                query_features=features.get("query"),
                context=features.get("context"),
                trained_items=torch.from_numpy(in_training(train, "item")),
            )
        length = history_length(settings)
        batches = make_batches(settings, train, rows, ranks, features.get("context"))
        known = KnownPositives(train) if needs_known_positives(settings) else None
        objective = build_objective(settings, train, learnt=learnt)
        optimizer = mine = None
        if growth is not None and parent is not None:
            optimizer = carry_on(parent, settings, growth, towers=towers, objective=objective)
            if (mine := _miner(objective, train, length, gaps_of(settings, train))) is not None and not resume:
                mine(towers)
        validate = _validation(split.validation, settings, train) if len(split.validation) else None
        before = validate(towers) if validate is not None and parent is not None and not resume else None
        if say is not None:
            say(plan_memory(settings, towers, objective, train))
        result = fit_towers(
            towers,
            objective,
            batches,
            training,
            Path(directory),
            known_positives=known,
            counts=torch.from_numpy(train.item_counts()),
            mine=_miner(objective, train, length, gaps_of(settings, train)),
            validate=validate,
            resume=resume,
            progress=progress,
            hyperparameters=settings.model_dump(mode="json"),
            start=optimizer,
        )
    artifact = _artifact(settings, split, towers, result)
    new = len(train) if learnt is None else int((~continuing.checked(split).learnt).sum())
    artifact.metadata["data"]["lineage"] = continuing.lineage(
        parent, split, new, 0 if rows is None else len(rows) - new
    )
    if before is not None:
        artifact.metadata["training"]["before"] = before
    return Model(artifact, split, result)


def continue_with(
    start: Model | Parent | str | Path,
    data: Interactions,
    config: Config | None = None,
    *,
    withdrawn: IdValues | None = None,
) -> ContinuedSplit:
    """New interactions joined to what a model was trained on, and split; what `fit(split, start=model)` takes.

    Args:
        start: the model, or its folder.
        data: what has come since, or a log that has grown: rows up to the model's last moment are left out.
        config: settings whose section `data` says how to split; the model's own where None.
        withdrawn: item ids that leave the catalog.

    Returns:
        Training rows of old and new days; validation and test of the new ones.

    Raises:
        InputError: nothing is new, ids of another type, or a split that cannot be made.
    """
    parent = continuing.parent_of(start)
    assert parent is not None
    settings = parent.artifact.config if config is None else config
    return continuing.new_days(
        parent, data, settings, lambda fresh: split_data(fresh, settings.data, cold="keep"), withdrawn=withdrawn
    )


def evaluate(
    model: Ranker,
    holdout: Holdout,
    *,
    train: Interactions | None = None,
    ks: tuple[int, ...] = (10, 20),
    exclude_seen: bool = True,
    baselines: bool = True,
    empty: Literal["skip", "zero"] = "skip",
    slices: Sequence[str] = (),
) -> Evaluation:
    """Rank the full catalog for every query of a holdout, beside popularity and item-kNN.

    Args:
        model: a `Model`, or anything with `rank(holdout, k, exclude_seen)`.
        holdout: queries with histories and targets, such as `split.test`.
        train: the training interactions, for baselines and popularity slices; taken from a `Model` where None.
        ks: cut-offs K.
        exclude_seen: never rank what stands in the query's history.
        baselines: measure popularity and item-kNN as well.
        empty: a query without targets is left out of every mean (`"skip"`) or counts as 0 (`"zero"`).
        slices: columns to slice by, such as `"items.genres"` or `"queries.age"`.

    Raises:
        InputError: `train` is missing for a ranker that does not know it, or the tables have no such column.
    """
    if train is None:
        if not isinstance(model, Model):
            raise InputError("evaluate: give train=..., the training interactions, for baselines and popularity slices")
        train = model.split.train
    return evaluation.evaluate(
        model.ranker if isinstance(model, Model) else over_ranks(model, Ranks.current()),
        holdout,
        train=train,
        ks=ks,
        exclude_seen=exclude_seen,
        baselines=baselines,
        empty=empty,
        slices=slices,
    )


def history_length(config: Config) -> int:
    """L of the query tower; 0 where it looks at no history."""
    return config.query_tower.history.length if config.query_tower.history else 0


def make_batches(
    config: Config,
    train: Interactions,
    rows: np.ndarray | None = None,
    ranks: Ranks | None = None,
    context: EncodedTable | None = None,
) -> TrainingBatches | GroupedBatches | SequenceBatches:
    """The batches that the towers and the objective of a configuration learn from.

    Args:
        config: the settings, without "auto" (`Config.resolved`).
        train: the training interactions.
        rows: the rows of them to learn from; None for all.
        ranks: gives this rank's part of every batch; None for a process alone.
        context: the fitted features of requests; None where the towers look at none.

    Raises:
        InputError: whole sequences are to be read, and batches built within groups.
    """
    size, seed, length = int(config.training.batch_size), config.training.seed, history_length(config)
    grouped = config.objective.frequency.startswith("grouped")
    if reads_sequences(config):
        if grouped:
            raise InputError("objective.frequency: grouped: a sequence may run over several groups; expected counted")
        # rows are those of whole queries: ContinuedSplit.rows_to_learn
        learnt = train if rows is None else train.select(rows)
        encoded = None if context is None else encode_context(context.features, learnt)
        return SequenceBatches(learnt, size, history_length=length, seed=seed, context=encoded, gaps=reads_gaps(config))
    encoded = None if context is None else encode_context(context.features, train)
    batches = TrainingBatches(train, size, history_length=length, seed=seed, rows=rows, ranks=ranks, context=encoded)
    return GroupedBatches(batches) if grouped else batches


def gaps_of(config: Config, data: Interactions) -> np.ndarray | None:
    """Codes of the gap before each row, int8 [n], where the tower reads them and rows have times; else None."""
    return gap_codes(data.offsets, data.timestamps) if reads_gaps(config) and data.timestamps is not None else None


def _kept_whole(config: Config, parent: Parent | None) -> str | None:
    """Why a training needs whole tables on every rank; None where it does not."""
    if parent is not None:
        return "a training that continues a model reads its whole tables"
    if reads_sequences(config):
        return "batches of whole sequences are for one process"
    if any("mined" in source for source in config.objective.sources or []):
        return "mined negatives search the whole catalog on every rank"
    return None


def _miner(
    objective: Objective, train: Interactions, length: int, gaps: np.ndarray | None
) -> Callable[[TwoTower], None] | None:
    """Refreshes the mined sources of an objective: the best items of each query, without its training items."""
    sources = [source for source in objective.pool.members() if isinstance(source, Mined)]
    if not sources:
        return None

    def mine(towers: TwoTower) -> None:
        ranker = TowerRanker(towers, length)
        # By the raw score: on corrected logits rare items would look hard.
        for block in np.array_split(np.arange(train.num_queries), -(-train.num_queries // MINING_BLOCK)):
            offsets = train.offsets[block[0] : block[-1] + 2]
            rows = (offsets - offsets[0], train.item_codes[offsets[0] : offsets[-1]])
            since = None if gaps is None else gaps[offsets[0] : offsets[-1]]
            _, items = ranker.search(block, rows, max(source.size for source in sources), exclude=rows, gaps=since)
            for source in sources:
                source.refresh(torch.from_numpy(block).to(source.items.device), items.to(source.items.device))

    return mine


def _validation(holdout: Holdout, config: Config, train: Interactions) -> Callable[[TwoTower], dict[str, float]]:
    k = int(config.training.metric.split("@")[1])

    def validate(towers: TwoTower) -> dict[str, float]:
        ranks = Ranks.current()
        ranker: Ranker
        if shared_tables_of(towers):
            ranker = ShardedRanker(towers, history_length(config), ranks)
        else:
            ranker = over_ranks(TowerRanker(towers, history_length(config), item_embeddings(towers, ranks)), ranks)
        measured = evaluation.evaluate(
            ranker,
            holdout,
            train=train,
            ks=(k,),
            exclude_seen=config.evaluation.exclude_seen,
            baselines=False,
        )
        return {name: value for name, value in measured["model"].values.items() if math.isfinite(value)}

    return validate


def _artifact(config: Config, split: Split, towers: TwoTower, result: FitResult) -> Artifact:
    data = split.data
    return Artifact(
        config=config,
        towers=towers.eval(),
        item_embeddings=_item_embeddings(towers),
        item_counts=torch.from_numpy(split.train.item_counts()),
        queries=data.queries,
        items=data.items,
        history_offsets=data.offsets,
        history_items=data.item_codes,
        history_gaps=gaps_of(config, data),
        item_table=data.item_table,
        rows=continuing.rows_of(split),
        contexts=continuing.contexts_of(split, config),
        metadata={
            "data": {
                "fingerprint": data.fingerprint,
                "account": data.account.to_dict(),
                "groups": None if data.group_names is None else data.group_names.ids.to_list(),
            },
            "split": {"name": split.name, "settings": split.settings, "account": split.account.to_dict()},
            "training": {
                "epochs": result.epochs,
                "seconds": round(result.seconds, 1),
                "cpu_seconds": round(result.cpu_seconds, 1),
                "peak_memory": result.peak_memory,
                "best": {config.training.metric: result.best},
                "history": result.history,
            },
        },
    )


def train_run(
    source: str | Path,
    out: str | Path,
    config: Config,
    *,
    start: str | Path | None = None,
    withdraw: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[object], None] = print,
) -> tuple[Model, Evaluation]:
    """The whole of `twotower train`: read, split, fit, evaluate on the test queries, write the run folder.

    Under torchrun its processes train one model together; the first of them writes and tells.

    Args:
        source: a file, a folder or the name of a data set.
        out: the run folder: `config.yaml`, `model/`, `results.json`, `checkpoints/`, `logs/`.
        config: the settings.
        start: folder of the model to go on with; `source` then holds the new days.
        withdraw: file of item ids that leave its catalog.
        resume: go on with an interrupted run in `out`.
        progress: show a progress bar.
        say: where the accounts are told.

    Raises:
        RankLost: another process of the run is gone.
    """
    training = config.training
    with joined(timeout=training.exchange_timeout, accelerator=training.accelerator) as team:
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
    reading = config.data if parent is None else _with_catalog(config.data)
    files, data = _read(
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
    directory.mkdir(parents=True, exist_ok=True)
    if not resume and is_first:
        write_text(directory / "config.yaml", config.to_yaml())
        write_text(directory / INPUTS, json.dumps(files, indent=1))
        parents.unlink(missing_ok=True)
        if parent is not None:
            write_text(parents, json.dumps({"model": parent.where, "fingerprint": parent.fingerprint}))
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
    model.artifact.metadata["data"]["source"] = _absolute(source)
    model.artifact.metadata["metrics"] = measured.to_dict()
    _write_results(model, measured, directory, is_first=is_first)
    return model, measured


def _write_results(model: Model, measured: Evaluation, directory: Path, *, is_first: bool) -> None:
    """What a run leaves: by its first rank, but for a model whose tables the ranks share."""
    if is_first or model.artifact.is_shared:
        model.save(directory / FOLDER)
    if is_first:
        write_text(directory / "results.json", json.dumps(measured.to_dict(), indent=1))


def _item_embeddings(towers: TwoTower) -> Tensor:
    """Those of all items, or of this rank's part of them where the ranks share the tables."""
    if shared_tables_of(towers):
        return own_item_embeddings(towers, Part(Ranks.current(), towers.item_tower.num_items))
    return towers.item_embeddings()


def _read(
    source: str | Path, settings: DataConfig, team: Team, *, context: Wanted, before: Path | None
) -> tuple[dict[str, int], Interactions]:
    """The data, the same on every rank and, where `before` lists them, from the same files as when the run began."""
    files = listing(source)
    refuse_other_files(json.loads(team.said_by_first("files", json.dumps(files))), files, "the first rank has")
    if before is not None and before.is_file():
        refuse_other_files(json.loads(before.read_text(encoding="utf-8")), files, "the run began with")
    # Shards are read by all ranks together; anything else by the first, and the others find it in the cache.
    share = team.all_at_once if len(files) > 1 else team.first_then_others
    data = share(lambda: read_data(source, settings, context=context), "data")
    if team.said_by_first("fingerprint", data.fingerprint) != data.fingerprint:
        raise InputError(f"{source}: rank {team.ranks.rank} reads other rows than the first; give all the same files")
    return files, data


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


def _with_catalog(settings: DataConfig) -> DataConfig:
    """New days are read with the whole item table, where there is one: it describes old items anew as well."""
    return settings if settings.items is None else settings.model_copy(update={"catalog": "table"})


def propose_features(
    source: str | Path, settings: DataConfig, *, items: str | None = None, queries: str | None = None
) -> dict[str, list[Proposed]]:
    """The whole of `twotower features`: what the columns of each table could be, by side where there is a table.

    Side "context" are the further columns of the interactions, their time among them.

    Raises:
        InputError: the data cannot be read, or has neither a feature table nor further columns.
    """
    told = settings.model_copy(update={"queries": queries or settings.queries})
    data = read_data(source, told, items=items, context="all")
    tables = {"item": data.item_table, "query": data.query_table}
    found = {side: propose(table) for side, table in tables.items() if table is not None and table.width > 1}
    if data.context is not None:
        found["context"] = propose_context(data)
    if not found:
        raise InputError(f"{source}: no table of item or query features; give one with --items or --queries")
    return found


def audit_run(directory: str | Path, source: str | Path | None = None, *, rows: int = 64, seed: int = 0) -> Subject:
    """What `twotower audit` measures: a saved model, rows of its training data, and their batches.

    Raises:
        InputError: as those of `evaluate_run`.
    """
    artifact, split = reread(directory, source)
    return subject_of(artifact, split.train, rows=rows, seed=seed)


def _absolute(source: str | Path) -> str:
    path = Path(source)
    return str(path.resolve()) if path.exists() else str(source)
