"""A save that is killed, or that fails, at any of its calls leaves the old content or the new one, never a mixture.

Python reports every call that opens, renames, makes or removes files to audit hooks. A kill is played at such a call by
an exception that every later call raises too, so that nothing touches the disk after it.
"""

import dataclasses
import errno
import os
import shutil
import sys

import pytest
import torch

from support.hostile_folders import sound_folder
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.serving import SavedModel
from twotower.training.checkpoint.io import SafeCheckpointIO

EVENTS = {"open", "fsync"} | {
    f"os.{name}" for name in ("rename", "mkdir", "remove", "rmdir", "truncate", "link", "listdir", "scandir")
}


class Killed(BaseException):
    """The process is gone."""


class Fault:
    """What happens at the calls of a save: nothing, an error at one of them, or a kill."""

    def __init__(self):
        self.active, self.calls, self.at, self.kills = False, 0, None, False

    def hook(self, event, arguments):
        if not self.active or event not in EVENTS:
            return
        number, self.calls = self.calls, self.calls + 1
        if self.at is None or number < self.at:
            return
        if self.kills:
            raise Killed
        if number == self.at:
            raise OSError(errno.EIO, "Input/output error")


FAULT = Fault()
sys.addaudithook(FAULT.hook)


def run(save, *, at=None, kills=False):
    """Call `save`; return the number of its calls, and the exception."""
    FAULT.active, FAULT.calls, FAULT.at, FAULT.kills = True, 0, at, kills
    failed = None
    try:
        save()
    except (Killed, OSError, InputError) as error:
        failed = error
    finally:
        FAULT.active = False
    return FAULT.calls, failed


@pytest.fixture(autouse=True)
def _reported_fsync(monkeypatch):
    real = os.fsync

    def fsync(handle):
        FAULT.hook("fsync", ())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def model(folder):
    target = folder / "model"
    first = SavedModel.load(sound_folder(target))
    second = dataclasses.replace(first, item_counts=2 * first.item_counts)
    return (lambda: second.save(target)), (lambda: int(SavedModel.load(target).item_counts[0])), (1, 2)


def checkpoint(folder):
    target = folder / "checkpoints" / "last.ckpt"

    def save(epoch):
        SafeCheckpointIO().save_checkpoint(
            {"epoch": epoch, "state_dict": {"w": torch.full((9,), float(epoch))}}, target
        )

    def read():
        found = SafeCheckpointIO().load_checkpoint(target)
        assert found["state_dict"]["w"].tolist() == [found["epoch"]] * 9
        return found["epoch"]

    save(1)
    return (lambda: save(2)), read, (1, 2)


def prepared(folder):
    first = Interactions.from_frame({"user": [1, 1, 2], "item": [1, 2, 1]})
    second = Interactions.from_frame({"user": [1, 1, 2, 2], "item": [1, 2, 1, 2]}, items={"item": [1, 2], "x": [5, 6]})
    first.save(folder / "data")
    return (lambda: second.save(folder / "data")), (lambda: len(Interactions.open(folder / "data"))), (3, 4)


@pytest.mark.parametrize("kills", [False, True], ids=["errors", "kills"])
@pytest.mark.parametrize("make", [pytest.param(model, marks=pytest.mark.slow), checkpoint, prepared])
def test_every_call_of_a_save_may_fail(tmp_path, make, kills):
    folder = tmp_path / "folder"
    save, read, (before, after) = make(folder)
    pristine = shutil.copytree(folder, tmp_path / "pristine")
    run(save)  # imports whatever is imported at the first call
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    calls, failed = run(save)
    assert failed is None and calls > 10 and read() == after
    found = set()
    for at in range(calls):
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        _, failed = run(save, at=at, kills=kills)
        assert failed is None or isinstance(failed, Killed) == kills
        found.add(state := read())
        assert state == after or (state == before and failed is not None), f"call {at}"
        save()  # the next save succeeds, and removes what this one has left
        assert read() == after
        left = [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".previous"))]
        assert not left or make is prepared, f"call {at}: {left}"
    assert found == {before, after}
