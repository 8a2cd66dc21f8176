"""Validation, checkpoints and divergence around the training steps."""

import signal
from itertools import count

import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError, Interrupted
from twotower.training import callbacks
from twotower.training.callbacks import Clock, StopBetweenSteps, Validation
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.checkpoint.paths import BEST, LAST
from twotower.training.module import TrainingModule
from twotower.training.step import compute_loss

SMALL = [
    "training.batch_size=64",
    "training.learning_rate=0.01",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "training.max_epochs=5",
    "item_tower.dimension=16",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
]


def config(*changes):
    return Config.load(None, [*SMALL, *changes])


def weights(model):
    return torch.cat([value.flatten() for value in model.artifact.towers.state_dict().values()])


def validated(*values, metric="NDCG@10", patience=2):
    validation = Validation(lambda towers: {}, metric, patience=patience)
    validation.load_state_dict({"rows": [{"epoch": place, metric: value} for place, value in enumerate(values)]})
    return validation


def test_the_first_of_equal_values_is_the_best():
    assert validated().best is None and validated().since_best == 0 and not validated().has_improved(0)
    assert validated(0.1, 0.3, 0.3).best == 0.3 and validated(0.1, 0.3, 0.3).since_best == 1
    assert validated(0.1, 0.3).has_improved(1) and not validated(0.1, 0.3).has_improved(2), "epoch 2 was not validated"
    assert not validated(0.3, 0.3).has_improved(1)


def scripted(monkeypatch, values):
    """Let the validation of a fit return these values of the metric, one after another."""
    left = iter(values)

    class Scripted(Validation):
        def __init__(self, measure, metric, **options):
            del measure
            super().__init__(lambda towers: {"NDCG@10": next(left)}, metric, **options)

    monkeypatch.setattr("twotower.training.fit.Validation", Scripted)


def saved_epoch(path):
    loops = SafeCheckpointIO().load_checkpoint(path)["loops"]["fit_loop"]["epoch_progress"]
    return loops["current"]["processed"]


def test_the_best_epoch_and_the_last_one_are_saved_and_patience_ends_the_run(planted_split, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.4, 0.2, 0.4, 0.9])
    model = tt.fit(planted_split, config("training.patience=2"), directory=tmp_path, progress=False)
    assert [row["NDCG@10"] for row in model.fit.history] == [0.1, 0.4, 0.2, 0.4], "equal to the best is no improvement"
    assert (model.fit.best, model.fit.epochs, model.fit.checkpoint) == (0.4, 4, tmp_path / BEST)
    assert (saved_epoch(tmp_path / BEST), saved_epoch(tmp_path / LAST)) == (2, 4)


def test_epochs_between_validations_are_saved_but_not_judged(planted_split, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.4, 0.2])
    options = ["training.validate_every=2", "training.patience=1"]
    model = tt.fit(planted_split, config(*options), directory=tmp_path, progress=False)
    assert [row["epoch"] for row in model.fit.history] == [1, 3] and model.fit.epochs == 4
    assert (saved_epoch(tmp_path / BEST), saved_epoch(tmp_path / LAST)) == (2, 4)


def test_no_validation_before_the_end_leaves_the_last_weights(planted_split, tmp_path):
    model = tt.fit(planted_split, config("training.validate_every=9"), directory=tmp_path, progress=False)
    assert (model.fit.best, model.fit.history, model.fit.checkpoint) == (None, [], None)
    assert (tmp_path / LAST).is_dir() and not (tmp_path / BEST).exists()


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_a_run_resumes_after_any_epoch(planted_split, tmp_path, monkeypatch, stop, every):
    """Also after an epoch that was not validated; the validation metrics and weights are those of an unbroken run."""
    settings = config(f"training.validate_every={every}", "query_tower.dropout=0.2", "training.max_epochs=4")
    whole = tt.fit(planted_split, settings, directory=tmp_path / "whole", progress=False)
    original = TrainingModule.on_train_epoch_start

    def interrupted(self):
        if self.trainer.current_epoch == stop:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "on_train_epoch_start", interrupted)
        with pytest.raises(Interrupted):
            tt.fit(planted_split, settings, directory=tmp_path / "cut", progress=False)
    resumed = tt.fit(planted_split, settings, directory=tmp_path / "cut", resume=True, progress=False)
    assert resumed.fit.history == whole.fit.history and resumed.fit.epochs == 4
    assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_of_an_older_version_resumes(planted_split, tmp_path, monkeypatch, recwarn):
    """Older versions kept the best score and the patience in states of Lightning's own callbacks, and no times."""
    whole = tt.fit(planted_split, config("training.max_epochs=3"), directory=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Checkpoints, "on_train_epoch_start", stop_in_epoch(2), raising=False)
        with pytest.raises(Interrupted):
            tt.fit(planted_split, config("training.max_epochs=3"), directory=tmp_path / "cut", progress=False)
    io, last = SafeCheckpointIO(), tmp_path / "cut" / LAST
    saved = io.load_checkpoint(last)
    rows = saved["callbacks"]["_History"]["rows"]
    assert len(rows) == 2
    saved["callbacks"] = {
        "_History": {"rows": rows},
        "EarlyStopping{'monitor': 'NDCG@10', 'mode': 'max'}": {
            "wait_count": 0,
            "stopped_epoch": 0,
            "best_score": torch.tensor(rows[-1]["NDCG@10"]),
            "patience": 5,
        },
        "_BestAndLast{'monitor': 'NDCG@10', 'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
        "'train_time_interval': None}": {"best_model_path": str(tmp_path / "cut" / BEST)},
    }
    io.save_checkpoint(saved, last)
    resumed = tt.fit(
        planted_split, config("training.max_epochs=3"), directory=tmp_path / "cut", resume=True, progress=False
    )
    assert resumed.fit.history == whole.fit.history
    assert torch.equal(weights(resumed), weights(whole))
    assert not [str(one.message) for one in recwarn if "callbacks" in str(one.message)]


def stop_in_epoch(epoch):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt

    return on_train_epoch_start


def test_after_training_sigterm_is_handled_as_before(tmp_path):
    """Lightning installs a handler that communicates with other ranks, and restores the previous one at the end."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopBetweenSteps(tmp_path, Communicator(0, 2))
    with stop:
        found = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("of Lightning"))
        stop.on_train_start(None, None)
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, found)
    assert stop.requested and signal.getsignal(signal.SIGTERM) == before
    with StopBetweenSteps(tmp_path) as alone:
        alone.on_train_start(None, None)
        assert signal.getsignal(signal.SIGTERM) == before, "a single process stops at once"


def test_the_time_of_an_interrupted_part_counts():
    clock = Clock()
    clock.load_state_dict({"seconds": 100.0, "cpu_seconds": 50.0})
    assert 100 <= clock.seconds < 110 and 50 <= clock.cpu_seconds < 60
    assert clock.state_dict()["seconds"] >= 100


def test_a_weight_that_is_not_finite_ends_the_run_before_it_is_saved(planted_split, tmp_path, monkeypatch):
    def damage(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                next(pl_module.towers.parameters()).view(-1)[0] = torch.nan

    monkeypatch.setattr(callbacks.EpochOrder, "on_train_epoch_end", damage, raising=False)
    with pytest.raises(
        InputError, match=r"diverged in epoch 2 \(a weight is not finite\); lower training.learning_rate"
    ):
        tt.fit(planted_split, config(), directory=tmp_path, progress=False)
    assert saved_epoch(tmp_path / LAST) == 1


def test_a_loss_that_is_not_finite_ends_the_run_within_an_epoch(planted_split, tmp_path, monkeypatch):
    steps = count()

    def damaged(*arguments, **options):
        loss, embedded, drawn = compute_loss(*arguments, **options)
        return loss * (torch.nan if next(steps) >= 3 else 1.0), embedded, drawn

    monkeypatch.setattr("twotower.training.module.compute_loss", damaged)
    with pytest.raises(
        InputError, match=r"the model has diverged in epoch 1 \(the loss is nan\); lower training.learn"
    ):
        tt.fit(planted_split, config(), directory=tmp_path, progress=False)
    assert next(steps) == 10, "the first step that logs the loss"
    assert not (tmp_path / "checkpoints").exists()
