"""The trials of a study: training runs that may be pruned after a validation. A killed study can be resumed."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from twotower.config.run import Config
from twotower.data import Split
from twotower.errors import InputError, Interrupted
from twotower.features.from_config import context_to_read
from twotower.run import fit, read_data, split_data, split_options
from twotower.study.space import Space
from twotower.training import LAST

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

#: Name of the study in its database, and file name of the database in the folder of the study.
NAME, DATABASE = "tune", "study.db"
#: Number of random trials before the sampler uses the results, and number of trials before pruning starts.
RANDOM_TRIALS, UNPRUNED_TRIALS = 10, 3
#: Number of initial epochs in which a trial is never pruned.
UNPRUNED_EPOCHS = 2


class PrunedTrialError(Exception):
    """Raised after the validation of a trial whose metric is below the median of the other trials."""


@dataclass
class StopRequest:
    """A request by Ctrl-C or SIGTERM to end the search. A second signal ends the process immediately."""

    is_made: bool = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in this block."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, frame: FrameType | None) -> None:
            del frame
            if self.is_made:
                raise KeyboardInterrupt
            self.is_made = True
            if number == signal.SIGTERM and signal.getsignal(signal.SIGINT) is not handle:
                signal.raise_signal(signal.SIGINT)  # a running fit stops between two steps

        try:
            for number in previous:
                signal.signal(number, handle)
        except ValueError:  # not the main thread: the caller handles interrupts
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class StudyPlan:
    """The description of a study that every worker needs; it can be pickled.

    Attributes:
        source: the data, as `twotower train` takes it.
        folder: the folder of the study.
        config: YAML file with settings, or None.
        changes: overrides of settings.
        space: the space of settings to search.
        metric: validation metric that is maximised.
        seed: seed of the sampler.
        trials: maximum number of finished trials; None for no limit.
        deadline: time (`time.time`) at which the search ends.
    """

    source: str
    folder: Path
    config: Path | None
    changes: tuple[str, ...]
    space: Space
    metric: str
    seed: int
    trials: int | None = None
    deadline: float = field(default=float("inf"))

    def load(self, more: list[str]) -> Config:
        """Read the settings of a run with additional overrides."""
        return Config.load(self.config, [*self.changes, *more])

    def read(self) -> Split:
        """Read and split the data; prepared data comes from the cache."""
        config = self.load([])
        data = read_data(self.source, config.data, context=context_to_read(config))
        return split_data(data, config.data, **split_options(config))


def open_study(folder: Path) -> optuna.Study:
    """Open the study in a folder, or create it.

    Raises:
        InputError: optuna is not installed.
    """
    package = import_optuna()
    package.logging.set_verbosity(package.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    study: optuna.Study = package.create_study(
        study_name=NAME,
        storage=_storage(folder),
        direction="maximize",
        load_if_exists=True,
        pruner=package.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS, n_warmup_steps=UNPRUNED_EPOCHS),
    )
    return study


def _storage(folder: Path) -> optuna.storages.RDBStorage:
    package = import_optuna()
    storage: optuna.storages.RDBStorage = package.storages.RDBStorage(
        f"sqlite:///{(folder / DATABASE).resolve()}", engine_kwargs={"connect_args": {"timeout": 120}}
    )
    return storage


def import_optuna() -> Any:
    """Import optuna.

    Raises:
        InputError: optuna or scikit-learn is not installed.
    """
    try:
        import optuna  # noqa: PLC0415  # an extra
    except ImportError:
        raise InputError("twotower tune needs optuna: pip install 'twotower[tune]'") from None
    if find_spec("sklearn") is None:  # optuna needs it for the importances of settings
        raise InputError("twotower tune needs scikit-learn: pip install 'twotower[tune]'")
    return optuna


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete and the pruned trials, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def score(trial: FrozenTrial) -> float:
    """Return the value of a complete trial; for a pruned or interrupted trial, the value of its best epoch so far."""
    if trial.state.name == "COMPLETE" and trial.value is not None:
        return trial.value
    return max(trial.intermediate_values.values(), default=float("-inf"))


def requeue_stopped(folder: Path) -> int:
    """Queue the trials of killed or interrupted workers again, and return their number.

    The trials keep their numbers and choices, and resume from their checkpoints. Only the process that holds the lock
    of the folder may call this function, before any worker starts.
    """
    waiting = import_optuna().trial.TrialState.WAITING
    stopped = [trial.number for trial in open_study(folder).get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
    storage = _storage(folder)
    study = storage.get_study_id_from_name(NAME)
    for number in stopped:
        storage.set_trial_state_values(storage.get_trial_id_from_study_id_trial_number(study, number), waiting)
    return len(stopped)


def spent(study: optuna.Study, workers: int) -> float:
    """Return the seconds that the trials have taken so far, over all sessions, divided by the number of workers."""
    seconds = [float(trial.user_attrs.get("seconds", 0.0)) for trial in study.get_trials(deepcopy=False)]
    return sum(seconds) / workers


def work(
    plan: StudyPlan,
    stop: StopRequest,
    *,
    split: Split | None = None,
    worker: int = 0,
    on_trial: Callable[[FrozenTrial], None] | None = None,
) -> None:
    """Run trials until the time is up, enough trials are finished, or a stop is requested.

    The seed of the sampler depends on the number of finished trials. A single worker that is killed and resumed
    therefore makes the same choices as one that is never killed.
    """
    optuna = import_optuna()
    study = open_study(plan.folder)
    split = plan.read() if split is None else split
    while not stop.is_made and time.time() < plan.deadline:
        done = len(finished(study))
        if plan.trials is not None and done >= plan.trials:
            return
        study.sampler = optuna.samplers.TPESampler(
            seed=1000 * plan.seed + 100_000 * worker + done, n_startup_trials=RANDOM_TRIALS, constant_liar=True
        )
        trial = study.ask()
        run_trial(study, trial, plan, split, stop)
        ended = study.get_trials(deepcopy=False)[trial.number]
        if on_trial is not None and ended.state.is_finished():
            on_trial(ended)
        if ended.state.name == "FAIL" and not done:
            raise InputError(f"tune: the defaults cannot be trained: {ended.user_attrs['error']}")


def run_trial(study: optuna.Study, trial: optuna.Trial, plan: StudyPlan, split: Split, stop: StopRequest) -> None:
    """Train one trial and record its result. An interrupted trial stays open, with a checkpoint to resume from."""
    state = import_optuna().trial.TrialState
    overrides = plan.space.suggest(trial)
    trial.set_user_attr("overrides", overrides)
    trial.set_user_attr("changed", plan.space.changed(overrides))
    begun = time.monotonic() - trial.user_attrs.get("seconds", 0.0)
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    folder = plan.folder / "trials" / f"{trial.number:04d}"

    def on_epoch(row: dict[str, float]) -> bool:
        epoch = int(row["epoch"])
        if epoch not in reported:
            trial.report(row[plan.metric], epoch)
        trial.set_user_attr("seconds", round(time.monotonic() - begun, 2))
        if time.time() >= plan.deadline:
            trial.set_user_attr("cut", True)
            return True
        if trial.should_prune():
            raise PrunedTrialError
        return False

    try:
        model = fit(
            split,
            plan.load([*overrides, "training.refit=false", "training.logger=none"]),
            directory=folder,
            resume=(folder / LAST).exists(),
            progress=False,
            on_epoch=on_epoch,
        )
    except PrunedTrialError:
        _close(trial, begun)
        study.tell(trial, state=state.PRUNED)
    except Interrupted:
        _close(trial, begun)
        stop.is_made = True
        return
    except InputError as error:
        trial.set_user_attr("error", str(error))
        _close(trial, begun)
        study.tell(trial, state=state.FAIL)
    else:
        training = model.artifact.metadata["training"]
        trial.set_user_attr("kept_epochs", training["kept_epochs"])
        _close(trial, begun)
        study.tell(trial, training["best"][plan.metric])
    shutil.rmtree(folder, ignore_errors=True)


def _close(trial: optuna.Trial, begun: float) -> None:
    trial.set_user_attr("seconds", round(time.monotonic() - begun, 2))
    trial.set_user_attr("ended", round(time.time(), 1))
