"""Tests of whole training runs: they learn, are reproducible, and resume to the same model."""

import json
import os
import signal

import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError, Interrupted
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.module import TrainingModule

SMALL = [
    "training.batch_size=64",
    "training.learning_rate=0.01",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "item_tower.dimension=16",
    "query_tower.history.length=10",
    "query_tower.history.heads=2",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
]


def config(*changes):
    return Config.load(None, [*SMALL, *changes])


def weights(model):
    return torch.cat([value.flatten() for value in model.artifact.towers.state_dict().values()])


def test_a_planted_answer_is_learnt(planted_split):
    model = tt.fit(planted_split, config("training.max_epochs=15"), progress=False)
    measured = tt.evaluate(model, planted_split.test, ks=(5, 10))
    found = measured["model"].values["Recall@10"]
    assert found > 1.3 * measured["popularity"].values["Recall@10"]
    best = model.rank(planted_split.test, 10, True)
    parity = best % 2 == (planted_split.test.queries % 2)[:, None]
    assert parity[best >= 0].mean() > 0.9


@pytest.mark.parametrize(
    "change",
    [
        "query_tower={history: null, id_embedding: true}",
        "query_tower.id_embedding=true",
        "query_tower.history.share_table=false",
        "query_tower.hidden=[]",
        "item_tower.hidden=[16]",
        "objective.similarity=dot",
        "objective.temperature=0.2",
        "objective.unique=false",
    ],
)
def test_every_kind_of_tower_learns(planted_split, change):
    model = tt.fit(planted_split, config("training.max_epochs=12", change), progress=False)
    best = model.rank(planted_split.test, 10, True)
    parity = best % 2 == (planted_split.test.queries % 2)[:, None]
    assert parity[best >= 0].mean() > 0.8


def test_a_seed_reproduces_the_model_and_leaves_the_callers_generator_alone(planted_split):
    state = torch.get_rng_state()
    models = [
        tt.fit(planted_split, config("training.max_epochs=2", f"training.seed={seed}"), progress=False)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def interrupt_at(step, monkeypatch):
    """Send Ctrl-C in the middle of a step."""
    original = TrainingModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


# Epochs have 13 steps: interrupt in the first epoch, at its last step, and in the second.
@pytest.mark.parametrize("step", [4, 12, 20])
def test_an_interrupted_run_resumes_to_the_same_model(planted_split, tmp_path, monkeypatch, step):
    settings = config("training.max_epochs=3", "query_tower.dropout=0.2")
    whole = tt.fit(planted_split, settings, directory=tmp_path / "whole", progress=False)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(Interrupted, match="last.ckpt"):
            tt.fit(planted_split, settings, directory=tmp_path / "cut", progress=False)
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C must work again"
    resumed = tt.fit(planted_split, settings, directory=tmp_path / "cut", resume=True, progress=False)
    assert whole.fit.history == resumed.fit.history
    assert torch.equal(weights(whole), weights(resumed))


def test_several_ranks_need_a_folder(planted_split, monkeypatch):
    monkeypatch.setattr(Communicator, "current", lambda group=None: Communicator(1, 2))
    with pytest.raises(InputError, match="required with several ranks; pass a folder that all ranks share"):
        tt.fit(planted_split, progress=False)


def test_resuming_without_a_checkpoint_is_refused(planted_split, tmp_path):
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        tt.fit(planted_split, config(), directory=tmp_path, resume=True, progress=False)


def test_early_stopping_keeps_the_best_weights(planted_split, tmp_path):
    model = tt.fit(
        planted_split, config("training.max_epochs=30", "training.patience=2"), directory=tmp_path, progress=False
    )
    curve = [row["NDCG@10"] for row in model.fit.history]
    assert len(curve) < 30
    assert model.fit.best == pytest.approx(max(curve))
    again = tt.evaluate(model, planted_split.validation, ks=(10,), baselines=False)
    assert again["model"].values["NDCG@10"] == pytest.approx(max(curve), abs=1e-6)


def test_checkpoints_contain_no_pickle_and_refuse_damage(tmp_path):
    io = SafeCheckpointIO()
    state = {"epoch": 3, 5: (1, [2.5, None]), "t": {"x": torch.arange(4), 0: torch.tensor(True)}, "name": "a"}
    io.save_checkpoint(state, tmp_path / "c.ckpt")
    assert sorted(path.name for path in (tmp_path / "c.ckpt").iterdir()) == [
        *("SHA256SUMS", "state.json", "tensors.safetensors")
    ]
    assert json.loads((tmp_path / "c.ckpt" / "state.json").read_text())
    back = io.load_checkpoint(tmp_path / "c.ckpt")
    assert back.keys() == state.keys() and back[5] == (1, [2.5, None]) and back["epoch"] == 3
    assert torch.equal(back["t"]["x"], torch.arange(4)) and back["t"][0].item() is True
    io.save_checkpoint({"epoch": 4}, tmp_path / "c.ckpt")
    assert io.load_checkpoint(tmp_path / "c.ckpt") == {"epoch": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"], "no partial checkpoint may remain"
    (tmp_path / "c.ckpt" / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"tensors.safetensors: its checksum differs from SHA256SUMS"):
        io.load_checkpoint(tmp_path / "c.ckpt")
    (tmp_path / "c.ckpt" / "SHA256SUMS").unlink()  # as in older versions
    with pytest.raises(InputError, match="not a readable checkpoint"):
        io.load_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(TypeError, match="without pickle"):
        io.save_checkpoint({"model": object()}, tmp_path / "d.ckpt")
    assert not (tmp_path / "d.ckpt").exists()
