"""Folders of shards: read by several processes, resumed after a kill, prepared twice at once; missing shards."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from data.test_interactions import SECOND, frame_of, some_rows
from support.slow_reference import as_sequences, sequences
from twotower.data import Interactions
from twotower.data.io import folders, readers
from twotower.data.io.readers import ParquetSource, open_source
from twotower.data.prepare import cache as preparation
from twotower.data.prepare import shards
from twotower.data.prepare.cache import into_folder
from twotower.data.prepare.first_pass import FileReader
from twotower.data.prepare.shards import FOLDER, Shards, in_turn, take_all
from twotower.data.schema.columns import ColumnRoles
from twotower.errors import InputError
from twotower.system import filesystem as locks

#: Prepares a folder after a common start signal, and logs every file it reads. It waits until `together` processes have
#: begun to read, and stops at shard number `stop`.
SLOWLY = """
import os, sys, time
from pathlib import Path
from twotower.data import Interactions
from twotower.data.io.readers import ParquetSource
source, cache, log, together, stop = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
read, count = ParquetSource.chunks, 0
def chunks(self, wanted):
    global count
    frames = list(read(self, wanted))
    if len(wanted) > 1:
        with log.open("a") as out:
            out.write(f"{os.getpid()} {self.path.name}\\n")
        while len({line.split()[0] for line in log.read_text().splitlines()}) < together:
            time.sleep(0.01)
        count += 1
        while count == stop:
            time.sleep(1)
    yield from frames
ParquetSource.chunks = chunks
print("ready", flush=True)
sys.stdin.readline()
data = Interactions.read(source, cache=cache)
print(data.fingerprint, flush=True)
"""
PATIENCE = 600

#: Prepares a folder at the same time as another process, both holding the lock: `slow` pauses while it reads a shard
#: until `fast` has read all, and after it has adopted the first shard until `fast` is done. `none`: the file system has
#: no locks; `here`: every process gets the lock, as on a file system that does not show locks of other machines.
AT_ONCE = """
import sys, time, types
from pathlib import Path
source, cache, log, name, locks = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5]
from twotower.system import filesystem
from twotower.data import Interactions; from twotower.data.prepare import cache as preparation
from twotower.data.io.readers import ParquetSource
filesystem.fcntl = None if locks == "none" else types.SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=lambda *_: None)
def meet(said, heard):
    if not (log / said).exists():
        (log / said).touch()
        while not (log / heard).exists():
            time.sleep(0.01)
read, adopt = ParquetSource.chunks, preparation.adopt
def chunks(self, wanted):
    frames = list(read(self, wanted))
    if name == "slow" and len(wanted) > 1:
        meet("slow reads", "fast has read")
    yield from frames
def adopted(*given):
    if name == "fast":
        meet("fast has read", "slow adopts")
    found = adopt(*given)
    if name == "slow":
        meet("slow adopts", "fast is done")
    return found
ParquetSource.chunks, preparation.adopt = chunks, adopted
if name == "fast":
    meet("fast is here", "slow reads")
print(Interactions.read(source, cache=cache).fingerprint)
if name == "fast":
    (log / "fast is done").touch()
"""


def folder_of_shards(folder: Path, rows: int = 300, each: int = 30, **options) -> Path:
    folder.mkdir()
    for number, part in enumerate(frame_of(some_rows(rows, **options)).iter_slices(each)):
        part.write_parquet(folder / f"part-{number:03d}.parquet")
    return folder


@pytest.fixture
def started(tmp_path):
    """Return a function that starts such processes on a folder; all are ended afterwards."""
    processes = []

    def start(source: Path, *, together: int = 1, stop: int = -1) -> subprocess.Popen:
        words = [str(source), str(tmp_path / "cache"), str(tmp_path / "log"), str(together), str(stop)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen([sys.executable, "-c", SLOWLY, *words], text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def go(*processes: subprocess.Popen) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def first_pass(folder: Path) -> tuple[FileReader, list[Path]]:
    files = folders.find_files(folder).interactions
    return FileReader.of([open_source(file) for file in files], ColumnRoles(), ids={}), files


@pytest.mark.parametrize("text", [False, True])
def test_helper_processes_read_the_same(tmp_path, monkeypatch, text):
    folder = folder_of_shards(tmp_path / "shards", text=text)
    expected = Interactions.read(folder, cache=tmp_path / "alone")
    monkeypatch.setattr(shards, "BYTES_PER_WORKER", 1)
    data = Interactions.read(folder, cache=tmp_path / "helped", workers=3)
    assert data.fingerprint == expected.fingerprint
    assert as_sequences(data) == sequences(some_rows(text=text))
    assert str(data.account) == str(expected.account)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "helped", "shards"], "nothing else is left"


def test_helpers_read_all_shards(tmp_path):
    first, files = first_pass(folder_of_shards(tmp_path / "shards"))
    pending = Shards(tmp_path / FOLDER, files, first.to_dict())
    with shards.helpers(pending, 2):
        until = time.monotonic() + PATIENCE
        while not all(pending.folder(file).is_dir() for file in files) and time.monotonic() < until:
            time.sleep(0.05)
    assert all((pending.folder(file) / "shard.json").is_file() for file in files)

    def read(*_):
        raise AssertionError("read again")

    take_all(pending, read, workers=1, done=lambda: False)


def test_two_processes_that_prepare_the_same_share_the_shards(tmp_path, started):
    folder = folder_of_shards(tmp_path / "shards")
    one, other = (started(folder, together=2) for _ in range(2))
    go(one, other)
    answers = [process.communicate(timeout=PATIENCE) for process in (one, other)]
    assert [process.returncode for process in (one, other)] == [0, 0], answers
    assert answers[0][0] == answers[1][0] == Interactions.read(folder, cache=tmp_path / "alone").fingerprint + "\n"
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for _, name in lines) == [f"part-{n:03d}.parquet" for n in range(10)], "each shard once"
    assert {pid for pid, _ in lines} == {str(one.pid), str(other.pid)}, "each read some"
    assert not (tmp_path / FOLDER).exists()


def test_ranks_share_the_shards_even_without_locks(tmp_path, monkeypatch):
    source = folder_of_shards(tmp_path / "shards", rows=210)
    first, files = first_pass(source)
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    read = into_folder(first)
    for rank in (1, 2, 0):
        taken = []

        def take(file, folder, taken=taken):
            taken.append(files.index(file))
            return read(file, folder)

        monkeypatch.setenv("RANK", str(rank))
        own = files[rank::3]
        pending = Shards(tmp_path / FOLDER, files, first.to_dict())
        take_all(
            pending,
            take,
            workers=1,
            done=lambda own=own, pending=pending: all(pending.folder(file).is_dir() for file in own),
        )
        assert taken == list(range(rank, 7, 3))
    assert in_turn(files, 5, 6) == [files[5], *files[:5], files[6]]
    data = Interactions.read(source, cache=tmp_path / "cache")
    assert data.fingerprint == Interactions.read(source, cache=tmp_path / "alone", workers=1).fingerprint


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "here"])
def test_two_processes_without_working_locks_both_succeed(tmp_path, kind):
    folder, log, cache = folder_of_shards(tmp_path / "shards"), tmp_path / "log", tmp_path / "cache"
    log.mkdir()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", AT_ONCE, str(folder), str(cache), str(log)]
    processes = [subprocess.Popen([*words, name, kind], **pipes) for name in ("slow", "fast")]
    try:
        while any(process.poll() is None for process in processes):
            assert not any(process.poll() for process in processes), "one failed while the other waits for it"
            time.sleep(0.02)
        answers = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
            print(*process.communicate(), sep="\n")
    expected = Interactions.read(folder, cache=tmp_path / "alone").fingerprint
    assert [(process.returncode, *answer) for process, answer in zip(processes, answers, strict=True)] == [
        (0, expected + "\n", "")
    ] * 2
    assert Interactions.open(cache).fingerprint == expected
    left = [path.name for path in (tmp_path / FOLDER).iterdir()] if (tmp_path / FOLDER).exists() else []
    assert len(left) == (10 if kind == "none" else 0), "without locks others may still read them"
    assert not any(name.endswith(".partial") for name in (*left, *(path.name for path in tmp_path.iterdir())))


def test_without_locks_only_partial_folders_older_than_an_hour_are_removed(tmp_path, monkeypatch):
    first, files = first_pass(folder_of_shards(tmp_path / "shards"))
    pending = Shards(tmp_path / FOLDER, files, first.to_dict())
    target = pending.folder(files[0])
    young, old, growing = (pending.root / f".{target.name}.{name}.partial" for name in ("a", "b", "c"))
    for left in (young, old, growing):
        left.mkdir(parents=True)
    (growing / "0.item").touch()
    for left in (old, growing):
        os.utime(left, (time.time() - shards.STALE_SECONDS - 60,) * 2)
    monkeypatch.setattr(locks, "fcntl", None)
    assert pending.take(files[0], into_folder(first), wait=True)
    pending.sweep()
    pending.remove()
    assert sorted(pending.root.iterdir()) == sorted([young, growing, target])
    monkeypatch.undo()
    pending.sweep()
    assert list(pending.root.iterdir()) == [target]
    os.utime(target, (0, 0))
    assert pending.take(files[0], into_folder(first), wait=True)
    shards.remove_old(pending.root)
    assert target.is_dir(), "used just now"
    # The folder is removed after the last required file was read: optional files must not count as absent.
    collected, adopting, parquet = first.empty(tmp_path), shards.read_parquet, [*target.glob("*.parquet")]
    monkeypatch.setattr(
        shards,
        "read_parquet",
        lambda path: (adopting(path), parquet.pop(), parquet or pending.remove())[0],
    )
    with pytest.raises(FileNotFoundError):
        shards.adopt(collected, target, "x")
    assert not pending.root.exists()


def test_a_damaged_cache_is_prepared_once(tmp_path, monkeypatch):
    folder, cache = folder_of_shards(tmp_path / "shards"), tmp_path / "cache"
    expected = Interactions.read(folder, cache=cache).fingerprint
    cache.rename(tmp_path / "sound")
    shutil.copytree(tmp_path / "sound", cache)
    (cache / "offsets.npy").write_bytes(b"x")

    def other_is_first(*_, **__):
        if (tmp_path / "sound").exists():
            shutil.rmtree(cache)
            (tmp_path / "sound").rename(cache)
        raise FileNotFoundError("a shard")

    monkeypatch.setattr(preparation, "build", other_is_first)
    assert Interactions.read(folder, cache=cache).fingerprint == expected
    (cache / "offsets.npy").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="a shard"):
        Interactions.read(folder, cache=cache)


@pytest.mark.slow
def test_several_processes_that_prepare_one_file_all_succeed(tmp_path, started):
    frame_of(some_rows()).write_parquet(tmp_path / "a.parquet")
    processes = [started(tmp_path / "a.parquet") for _ in range(3)]
    go(*processes)
    answers = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert len((tmp_path / "log").read_text().splitlines()) == 1, "the others wait for the first"


def test_a_killed_preparation_continues_with_the_shards_read(tmp_path, started):
    folder, log = folder_of_shards(tmp_path / "shards"), tmp_path / "log"
    killed = started(folder, stop=6)
    go(killed)
    while not log.exists() or len(log.read_text().splitlines()) < 6:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "cache").exists(), "no partial cache is left"
    log.unlink()
    (folder / "part-002.parquet").touch()  # a new modification time: its rows must be read again
    again = started(folder)
    go(again)
    out, error = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, error
    assert out.strip() == Interactions.read(folder, cache=tmp_path / "alone").fingerprint
    read = {line.split()[1] for line in log.read_text().splitlines()}
    assert read == {f"part-{n:03d}.parquet" for n in (2, 5, 6, 7, 8, 9)}, "the others were read before the kill"
    kept = {p.name for p in tmp_path.iterdir()} - {"alone", "cache", "shards", "log"}
    assert kept <= {FOLDER}
    left = [p.name for p in (tmp_path / FOLDER).iterdir()] if kept else []
    assert len(left) <= 1 and not any(name.startswith(".") for name in left), "only the rows of the older file"


def test_shards_already_read_are_kept_when_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr("twotower.data.prepare.cache.BYTES_PER_WORKER", 1)
    folder = folder_of_shards(tmp_path / "shards")
    good = (folder / "part-005.parquet").read_bytes()
    frame_of(some_rows(30)).with_columns(user_id=None).write_parquet(folder / "part-005.parquet")
    with pytest.raises(InputError, match=r"part-005.parquet: column 'user_id', row 1: empty query id"):
        Interactions.read(folder, cache=tmp_path / "cache", workers=1)
    kept = list((tmp_path / FOLDER).iterdir())
    assert len(kept) == 5 and all((p / "shard.json").is_file() for p in kept), "five complete folders and nothing else"
    (folder / "part-005.parquet").write_bytes(good)
    read = []
    real = ParquetSource.chunks
    monkeypatch.setattr(ParquetSource, "chunks", lambda self, w: (read.append(self.path.name), real(self, w))[1])
    data = Interactions.read(folder, cache=tmp_path / "cache", workers=1)
    assert as_sequences(data) == sequences(some_rows())
    assert read == [f"part-{number:03d}.parquet" for number in range(5, 10)], "the others were read before, once"


def test_old_shards_are_removed(tmp_path):
    old = tmp_path / FOLDER / "0123"
    old.mkdir(parents=True)
    (old / "shard.json").write_text("{}")
    os.utime(old, (time.time() - shards.KEPT_SECONDS - 60,) * 2)
    Interactions.read(folder_of_shards(tmp_path / "shards"), cache=tmp_path / "cache")
    assert not (tmp_path / FOLDER).exists()


def test_a_shard_deleted_during_preparation_is_named(tmp_path, monkeypatch):
    folder = folder_of_shards(tmp_path / "shards")
    first, files = first_pass(folder)

    def read(file, into):
        (folder / "part-004.parquet").unlink(missing_ok=True)
        return into_folder(first)(file, into)

    with pytest.raises(InputError, match=r"part-004.parquet: the shard no longer exists"):
        take_all(Shards(tmp_path / FOLDER, files, {}), read, workers=1, done=lambda: False)


def test_a_shard_missing_among_numbered_ones_is_named(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate(frame_of(some_rows()).iter_slices(100)):
        part.write_parquet(folder / f"part-{number:05d}-of-00003.parquet")
    assert len(Interactions.read(folder).account.lines)
    (folder / "part-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00001-of-00003.parquet: the shard is missing"):
        Interactions.read(folder)


def test_files_that_differ_are_named(tmp_path):
    folder = folder_of_shards(tmp_path / "shards")
    before = folders.listing(folder)
    assert len(before) == 10 and folders.listing("movielens-1m") == {} == folders.listing(tmp_path / "no")
    Interactions.read(folder).save(tmp_path / "saved")
    assert folders.listing(tmp_path / "saved") == {}
    folders.refuse_other_files(before, folders.listing(folder), "x")
    shutil.copy(folder / "part-000.parquet", folder / "part-010.parquet")
    with pytest.raises(
        InputError, match=r"part-010.parquet: exists, but is not among the files that the run began with"
    ):
        folders.refuse_other_files(before, folders.listing(folder), "the run began with")
    (folder / "part-010.parquet").unlink()
    (folder / "part-003.parquet").unlink()
    with pytest.raises(InputError, match=r"part-003.parquet: missing, but the first rank has it"):
        folders.refuse_other_files(before, folders.listing(folder), "the first rank has")
    pl.concat([pl.read_parquet(folder / "part-004.parquet")] * 40).write_parquet(folder / "part-003.parquet")
    with pytest.raises(
        InputError, match=r"part-003.parquet: has [\d,]+ bytes, expected [\d,]+ \(the first rank has that version\)"
    ):
        folders.refuse_other_files(before, folders.listing(folder), "the first rank has")


def test_lists_and_query_columns_come_from_every_shard(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    lists = pl.DataFrame({"user_id": [1, 2], "items": [[3, 4], [4]], "age": [30, 40]})
    lists.write_parquet(folder / "a.parquet")
    lists.with_columns(pl.col("user_id") + 2).write_parquet(folder / "b.parquet")
    data = Interactions.read(folder)
    assert data.query_table["age"].to_list() == [30, 40, 30, 40]
    assert as_sequences(data) == {1: [(3, 0), (4, 0)], 2: [(4, 0)], 3: [(3, 0), (4, 0)], 4: [(4, 0)]}


def test_input_order_follows_the_order_of_the_files(tmp_path):
    rows = [(1, item, 5 * SECOND) for item in range(40)]  # all with one timestamp: only the input order decides
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate(frame_of(rows).iter_slices(7)):
        part.write_parquet(folder / f"p{number}.parquet")
    assert Interactions.read(folder).item_codes.tolist() == list(range(40))


def test_every_chunk_is_read_once(tmp_path, monkeypatch):
    frame_of(some_rows(90)).write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(readers, "CHUNK_ROWS", 40)
    read, starts = pl.LazyFrame.slice, []
    monkeypatch.setattr(pl.LazyFrame, "slice", lambda self, at, rows: starts.append(at) or read(self, at, rows))
    Interactions.read(tmp_path / "a.parquet", cache=tmp_path / "cache")
    assert starts == list(range(0, 90, 40))
