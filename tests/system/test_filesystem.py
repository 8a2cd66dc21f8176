"""Atomic files and folders, errors of a full disk, and locks."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from twotower.errors import InputError
from twotower.system import filesystem
from twotower.system.filesystem import full_disk_named, is_full_disk, locked, whole_file, whole_folder

WRITERS = {
    "text": lambda path: path.write_text("x" * 200_000),
    "numpy": lambda path: np.save(path, np.zeros(50_000)),
    "polars": lambda path: pl.DataFrame({"x": np.random.default_rng(0).random(50_000)}).write_parquet(path),
    "safetensors": lambda path: save_file({"x": torch.zeros(50_000)}, path),
}


@pytest.fixture
def small_files():
    """Limit files to 50,000 bytes, like `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_reported_by_name_and_keeps_the_old_file(tmp_path, small_files, write):
    (tmp_path / "file.npy").write_text("before")
    with (
        pytest.raises(InputError, match=r"file.npy: cannot be written, the disk is full"),
        whole_file(tmp_path / "file.npy") as partial,
    ):
        write(partial.with_suffix(".npy"))
    assert (tmp_path / "file.npy").read_text() == "before"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with (
        pytest.raises(InputError, match=r"folder: cannot be written, the disk is full"),
        whole_folder(tmp_path / "folder") as folder,
    ):
        write(folder / "a.npy")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["old"]
    assert not list(tmp_path.glob(".folder*"))


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    assert is_full_disk(OSError(errno.ENOSPC, "x")) and is_full_disk(OSError(errno.EDQUOT, "x"))
    assert not is_full_disk(OSError(errno.EIO, "x")) and not is_full_disk(ValueError("full of joy"))
    with pytest.raises(InputError, match="^mine$"), full_disk_named(tmp_path):
        raise InputError("mine")


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path, inside, most = tmp_path / "a.lock", [], []

    def work():
        for _ in range(30):
            with locked(path) as held:
                assert held
                inside.append(1)
                time.sleep(0.001)  # long enough for the others to enter, if the lock did not work
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 180 and max(most) == 1
    assert not path.exists()


def test_a_lock_is_released_when_its_process_is_killed(tmp_path):
    code = "from twotower.system.filesystem import locked\nfrom pathlib import Path\n"
    code += f"with locked(Path({str(tmp_path / 'a')!r})):\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + " print(1, flush=True)\n input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "1\n"
    with locked(tmp_path / "a", wait=False) as held:
        assert not held
    holder.kill()
    holder.communicate()
    assert (tmp_path / "a").exists()
    with locked(tmp_path / "a") as held:
        assert held
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_reports_whether_it_excludes_others(tmp_path, monkeypatch):
    with locked(tmp_path / "a") as lock:
        assert lock and lock.keeps_out
        with locked(tmp_path / "a", wait=False) as other:
            assert not other

    def refused(handle, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(filesystem.fcntl, "flock", refused)
    with locked(tmp_path / "a") as lock, locked(tmp_path / "a") as other:
        assert lock and other and not lock.keeps_out and not other.keeps_out
    monkeypatch.setattr(filesystem, "fcntl", None)
    with locked(tmp_path / "a") as lock, locked(tmp_path / "a", wait=False) as other:
        assert lock and other and not lock.keeps_out and not other.keeps_out
    assert not list(tmp_path.iterdir())


def test_without_replace_an_existing_folder_stays(tmp_path):
    for before in (True, False):
        target = tmp_path / str(before)
        with whole_folder(target, replace=False) as folder:
            (folder / "second").touch()
            if before:
                with whole_folder(target, replace=False) as other:
                    (other / "first").touch()
        assert [path.name for path in target.iterdir()] == ["first" if before else "second"]
    with pytest.raises(OSError, match="elsewhere"), whole_folder(tmp_path / "c", replace=False):
        raise OSError("elsewhere")
    assert len(list(tmp_path.iterdir())) == 2


def left_by(folder, name="m"):
    """Let a process create a temporary folder for `name` and be killed; return the folder."""
    before = set(folder.iterdir())
    code = "import os, signal\nfrom pathlib import Path\nfrom twotower.system.filesystem import whole_folder\n"
    code += f"with whole_folder(Path({str(folder / name)!r})) as partial:\n (partial / 'a').touch()\n"
    killed = subprocess.run([sys.executable, "-c", code + " os.kill(os.getpid(), signal.SIGKILL)"], check=False)
    assert killed.returncode == -9
    (left,) = set(folder.glob(f".{name}.*.partial")) - before
    return left


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".m.notes.partial").mkdir()  # no name of a temporary folder
    with whole_folder(tmp_path / "m") as alive:
        left, other = left_by(tmp_path), left_by(tmp_path, "m2")
        assert alive.is_dir()
        with whole_folder(tmp_path / "m") as second:
            assert alive.is_dir() and other.is_dir() and not left.exists()
            (second / "second").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".m.notes.partial", other.name, "m"])


def test_a_folder_of_another_machine_is_removed_after_an_hour(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "_MACHINE", "zzzz")
    left = left_by(tmp_path)
    filesystem.remove_abandoned(tmp_path / "m")
    assert left.is_dir()
    for path in (left / "a", left):
        os.utime(path, (time.time() - 4000,) * 2)
    filesystem.remove_abandoned(tmp_path / "m")
    assert not left.exists()


def test_without_locks_no_folder_counts_as_abandoned(tmp_path, monkeypatch):
    left = left_by(tmp_path)
    monkeypatch.setattr(filesystem, "fcntl", None)
    with whole_folder(tmp_path / "m") as folder:
        (folder / "a").touch()
    assert left.is_dir() and (tmp_path / "m" / "a").is_file()


def test_an_older_folder_that_a_kill_left_under_another_name_is_put_back(tmp_path):
    previous = left_by(tmp_path).rename(tmp_path / f".m.{filesystem._MACHINE}000000000000.previous")
    filesystem.remove_abandoned(tmp_path / "m")
    assert not previous.exists() and (tmp_path / "m" / "a").is_file()


def test_content_is_on_the_disk_before_a_rename_and_the_rename_before_the_return(tmp_path, monkeypatch):
    calls = []
    real = os.fsync

    def fsync(handle):
        calls.append(str(Path(f"/proc/self/fd/{handle}").readlink()).replace(str(tmp_path), ""))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_folder(tmp_path / "m") as folder:
        (folder / "tables").mkdir()
        (folder / "tables" / "a").touch()
        name = f"/{folder.name}"
        assert not calls
    assert calls == [f"{name}/tables", f"{name}/tables/a", name, ""]
    calls.clear()
    with whole_file(tmp_path / "f") as path:
        path.touch()
    assert calls == [f"/{path.name}", ""]


@pytest.mark.parametrize("replace", [True, False])
def test_a_full_disk_is_named_when_the_rename_needs_space(tmp_path, monkeypatch, replace):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "folder"
    with monkeypatch.context() as changed:
        changed.setattr(Path, "rename", full)
        with (
            pytest.raises(InputError, match=r"folder: cannot be written, the disk is full"),
            whole_folder(target, replace=replace) as folder,
        ):
            (folder / "file").write_text("x")
    assert not list(tmp_path.iterdir())
