"""Tests of background checkpoints: they have the state of their step, report errors, and survive a kill."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import twotower as tt
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.objectives.build import build_objective
from twotower.system import hardware
from twotower.towers import build_towers
from twotower.training import memory_plan, plan_memory
from twotower.training.callbacks import Clock
from twotower.training.checkpoint import io as checkpoint_io
from twotower.training.checkpoint.io import Background, SafeCheckpointIO
from twotower.training.module import TrainingModule

SMALL = [
    "training={batch_size: 64, learning_rate: 0.01, warmup_steps: 5, accelerator: cpu, max_epochs: 2}",
    "item_tower.dimension=16",
    "query_tower={dropout: 0.1, history: {length: 10, heads: 2}}",
    "objective.sources=[{in_batch: {}}, {memory: {size: 50}}]",
]


def config(*changes):
    return Config.load(None, [*SMALL, *changes])


STEPS = 20  # per epoch
IN_BACKGROUND = "training.checkpoint_in_background=true"
FULL = OSError(errno.ENOSPC, "No space left on device")


class Held:
    """A replacement for the writing of tensors that blocks until it is released."""

    def __init__(self, monkeypatch, name="save_file"):
        self.begun, self.released = threading.Event(), threading.Event()
        write = getattr(checkpoint_io, name)

        def held(*given):
            self.begun.set()
            assert self.released.wait(60)
            write(*given)

        monkeypatch.setattr(checkpoint_io, name, held)


def test_a_checkpoint_has_the_state_at_the_time_of_the_request(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a": weight, "tied": weight, "turned": weight.t(), "half": weight.bfloat16(), "steps": [1, 2], "n": 3}
    expected = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    io = SafeCheckpointIO(in_background=True)
    io.save_checkpoint(state, tmp_path / "c.ckpt")
    assert held.begun.wait(60) and not (tmp_path / "c.ckpt").exists()
    weight.mul_(-7)
    state["half"].zero_()
    state["steps"].append(3)
    state["n"] = 4
    held.released.set()
    found = io.load_checkpoint(tmp_path / "c.ckpt")  # waits
    assert found["steps"] == [1, 2] and found["n"] == 3
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    io.close()


def test_the_next_checkpoint_is_copied_after_the_previous_one_is_written(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    weight, io = torch.zeros(3), SafeCheckpointIO(in_background=True)
    io.save_checkpoint({"w": weight}, tmp_path / "first.ckpt")
    weight += 1
    second = threading.Thread(target=io.save_checkpoint, args=({"w": weight}, tmp_path / "second.ckpt"))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not (tmp_path / "first.ckpt").exists()
    weight += 1  # not copied yet: only one copy exists at a time
    held.released.set()
    second.join(60)
    io.settle()
    found = [io.load_checkpoint(tmp_path / f"{name}.ckpt")["w"].tolist() for name in ("first", "second")]
    assert found == [[0.0] * 3, [2.0] * 3]
    io.close()


def test_an_error_is_raised_once_by_the_next_call():
    work, done, before = Background(), [], threading.enumerate()  # other threads may not have been collected yet

    def fail():
        raise FULL

    work.start(fail)
    with pytest.raises(OSError, match="No space left"):
        work.start(lambda: done.append(1))
    work.wait()
    assert not done, "no task starts while an error is pending"
    work.start(lambda: done.append(2))
    work.wait()
    work.start(fail)
    work.close()
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert done == [2] and not [thread for thread in left if thread.name.startswith("checkpoint")]


def kept_states(split, directory, monkeypatch, *changes, hold=False):
    """Return every checkpoint of a run by step; with `hold` each is written while the next steps run."""
    write, step, reached = SafeCheckpointIO._write, [0], threading.Condition()
    training_step = TrainingModule.training_step
    kept = directory.with_name(f"{directory.name}-kept")

    def training(self, batch, batch_idx):
        with reached:
            step[0] = self.global_step
            reached.notify_all()
        return training_step(self, batch, batch_idx)

    def late(self, path, structure, *given):
        steps = dict(structure["dict"])["global_step"]
        if hold and steps % STEPS:  # at the end of an epoch the next checkpoint follows at once
            with reached:
                assert reached.wait_for(lambda: step[0] > steps, 60)
        write(self, path, structure, *given)
        shutil.copytree(path, kept / f"{path.stem}-{steps}", dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(SafeCheckpointIO, "_write", late)
        patch.setattr(TrainingModule, "training_step", training)
        tt.fit(split, config("training.checkpoint_every=6", *changes), directory=directory, progress=False)
    return kept


def test_background_checkpoints_equal_blocking_ones(planted_split, tmp_path, monkeypatch):
    # The time of a run is in its checkpoints too, and is no part of the state that must be equal.
    monkeypatch.setattr(Clock, "state_dict", lambda clock: {"seconds": 0.0, "cpu_seconds": 0.0})
    waited = kept_states(
        planted_split, tmp_path / "run", monkeypatch, "training.checkpoint_in_background=false"
    ).rename(tmp_path / "waited")
    shutil.rmtree(tmp_path / "run")
    beside = kept_states(planted_split, tmp_path / "run", monkeypatch, IN_BACKGROUND, hold=True)
    names = sorted(path.name for path in waited.iterdir())
    assert sorted(path.name for path in beside.iterdir()) == names
    assert {"last-6", "last-12", "last-18", "last-24", "last-30", "last-36", "last-20", "best-20", "last-40"} <= set(
        names
    )
    for name in names:
        expected, found = (load_file(where / name / "tensors.safetensors") for where in (waited, beside))
        assert found.keys() == expected.keys() and len(expected) > 10
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{name}: {key}"
        states = [json.loads((where / name / "state.json").read_text()) for where in (waited, beside)]
        assert states[0] == states[1], name


# In the second epoch; and in the third, after a second one that was worse than the first.
@pytest.mark.parametrize(("every", "step", "left"), [(3, 29, 27), ("null", 45, 40)])
def test_a_run_that_breaks_off_resumes_to_the_same_model(planted_split, tmp_path, monkeypatch, every, step, left):
    # Without masks the second epoch is worse here, so the best checkpoint is not the last one.
    more = ["training.max_epochs=3", "training.weight_average=0.5", "objective.mask_known_positives=false"]
    settings = config(f"training.checkpoint_every={every}", *more, IN_BACKGROUND)
    whole = tt.fit(planted_split, settings, directory=tmp_path / "whole", progress=False)
    first, second, _ = (row["NDCG@10"] for row in whole.fit.history)
    assert second < first
    training_step = TrainingModule.training_step

    def breaks(self, batch, batch_idx):
        if self.global_step == step:
            raise RuntimeError("broken off")
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", breaks)
        with pytest.raises(RuntimeError, match="broken off"):
            tt.fit(planted_split, settings, directory=tmp_path / "cut", progress=False)
    state = json.loads((tmp_path / "cut" / "checkpoints" / "last.ckpt" / "state.json").read_text())
    assert dict(state["dict"])["global_step"] == left, "the checkpoint being written was completed"
    again = tt.fit(planted_split, settings, directory=tmp_path / "cut", resume=True, progress=False)
    for name, value in whole.artifact.towers.state_dict().items():
        assert torch.equal(again.artifact.towers.state_dict()[name], value), name
    assert whole.fit.history == again.fit.history


@pytest.mark.parametrize("at", [3, 8])  # after 15 steps; after all 40, when nothing more is saved
def test_a_full_disk_is_reported_by_the_next_save_or_at_the_end(planted_split, tmp_path, monkeypatch, at):
    write, written = checkpoint_io.save_file, []

    def full(tensors, path):
        written.append(path.parent.name.split(".")[1])
        path.write_bytes(b"half")
        if written.count("last") == at:
            raise FULL
        write(tensors, path)

    monkeypatch.setattr(checkpoint_io, "save_file", full)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"/last.ckpt: cannot be written, the disk is full \(.*No space left"):
        tt.fit(planted_split, config("training.checkpoint_every=5", IN_BACKGROUND), directory=run, progress=False)
    assert written.count("last") == at and written[-1] == "last", "nothing is written while an error is pending"
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == (["last.ckpt"] if at == 3 else ["best.ckpt", "last.ckpt"]), "no partial checkpoint remains"
    SafeCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_process_killed_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    last, (reading, telling) = tmp_path / "last.ckpt", os.pipe()

    def half(tensors, path):
        path.write_bytes(b"half of it")
        os.write(telling, b".")
        time.sleep(600)

    io = SafeCheckpointIO()
    io.save_checkpoint({"w": torch.ones(1000)}, last)
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(checkpoint_io, "save_file", half)
            beside = SafeCheckpointIO(in_background=True)
            beside.save_checkpoint({"w": torch.zeros(1000)}, last)
            beside.wait()
        finally:
            os._exit(0)  # in any case: the other tests belong to the parent
    os.close(telling)  # so that reading ends when the child exits
    assert os.read(reading, 1) == b"."
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert io.load_checkpoint(last)["w"].tolist() == [1.0] * 1000
    io.save_checkpoint({"w": torch.full((2,), 3.0)}, last)
    assert io.load_checkpoint(last)["w"].tolist() == [3.0, 3.0]


def test_the_copy_is_planned_and_made_if_memory_allows(planted_split, tmp_path, monkeypatch):
    train, there = planted_split.train, hardware.memory()

    def planned(available, *changes):
        monkeypatch.setattr(memory_plan.hardware, "memory", lambda processes=1: replace(there, available=available))
        settings = config(*changes).resolved(len(train))
        towers = build_towers(settings, num_queries=train.num_queries, num_items=train.num_items)
        plan = plan_memory(settings, towers, build_objective(settings, train), train)
        monkeypatch.undo()
        return plan

    plan = planned(None)
    without = planned(None, "training.checkpoint_in_background=false")
    assert plan.in_background and not without.in_background and plan.peak == without.peak + plan.state
    assert "written in the background" in str(plan) and "training pauses" in str(without)
    assert planned(without.needed + 2 * plan.state).in_background
    assert not planned(without.needed + 2 * plan.state - 1).in_background
    assert planned(0, IN_BACKGROUND).in_background
    assert "checkpoint_in_background=false" in str(replace(planned(0, IN_BACKGROUND), state=1 << 30))
    # The actual size of a checkpoint; besides weights and optimizer state it has counts and random states.
    for changes in ([], ["training.weight_average=0.9"], ["training.table_optimizer=rowwise-adagrad"]):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = config("training.max_epochs=1", "query_tower.id_embedding=true", *changes)
        tt.fit(planted_split, settings, directory=run, progress=False)
        found = load_file(run / "checkpoints" / "last.ckpt" / "tensors.safetensors")
        held = sum(value.nbytes for name, value in found.items() if "random_state" not in name)
        assert planned(None, "query_tower.id_embedding=true", *changes).state == pytest.approx(held, rel=0.02)
