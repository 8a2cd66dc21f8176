"""Tests of coordination outside of collectives, and of the rows that each rank reads."""

import contextlib
import signal
import threading
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from twotower.data import TrainingBatches
from twotower.distributed import launch
from twotower.distributed import launch as team_module
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import BEGUN, Coordinator, Launch, called_together
from twotower.errors import InputError, RankLost


@pytest.fixture
def store(tmp_path):
    made = dist.FileStore(str(tmp_path / "store"), 3)
    made.set_timeout(timedelta(seconds=60))
    return made


def together(store, work):
    """Run `work(team)` on three ranks, threads of this process; return the results."""
    gave = [None] * 3
    threads = [
        threading.Thread(target=lambda r=rank: gave.__setitem__(r, work(Coordinator(Communicator(r, 3), store))))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return gave


class Clock:
    """A clock for waits in `called_together`, advanced by the test."""

    def __init__(self):
        self.now, self.pauses = 0.0, Counter()

    def monotonic(self):
        return self.now

    def sleep(self, _):
        self.pauses[threading.get_ident()] += 1
        time.sleep(0.001)

    def all_have_looked(self, threads):
        """Wait until each thread has ended, or has seen the current messages and paused again."""
        for _ in range(4):  # the words, the roll, the answers to it, and what is agreed
            for thread in threads:
                goal = self.pauses[thread.ident] + 2
                while thread.is_alive() and self.pauses[thread.ident] < goal:
                    time.sleep(0.001)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(launch, "time", made)
    return made


def called(store, ranks, clock, restarts=(0, 0, 0), local_sizes=(1, 1, 1)):
    """Return the results of `called_together` on some of three ranks that join one by one; errors as text."""
    gave = {}

    def come(rank):
        launch = Launch(rank, 3, local_size=local_sizes[rank], restarts=restarts[rank])
        try:
            gave[rank] = called_together(store, launch, 20.0)
        except (dist.DistStoreError, InputError) as error:
            gave[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for number, thread in enumerate(threads):
        thread.start()
        clock.all_have_looked(threads[: number + 1])  # a head start, so that late ranks find earlier messages
    clock.now += 21 if len(ranks) < 3 else 0
    for thread in threads:
        thread.join(60)
    return [gave[rank] for rank in sorted(gave)]


def test_an_attempt_has_a_unique_name_even_after_an_incomplete_one(store, clock):
    alone = {False: "rank 0 did not join within 20 s", True: "not all ranks joined within 20 s"}
    names = []
    for coming in ([0, 1, 2], [1, 2], [2, 1, 0], [0, 1], [1, 0, 2]):
        gave = called(store, coming, clock)
        if len(coming) < 3:  # their messages stay in the store
            assert gave == [alone[0 in coming]] * 2
            continue
        assert gave == [(gave[0][0], False)] * 3, "no attempt has begun"
        names.append(gave[0][0])
    assert len(set(names)) == 3


def test_an_attempt_resumes_if_an_earlier_one_has_begun(store, clock):
    def resumes(restarts):
        (name, resumes), *others = called(store, [0, 1, 2], clock, restarts=restarts)
        assert others == [(name, resumes)] * 2
        return resumes

    assert not resumes((0, 0, 0))
    assert not resumes((1, 0, 1)), "the earlier attempt was refused or died too early: the run folder is not its own"
    Coordinator(Communicator(1, 3), store, attempts=store).begins()
    assert not store.check([BEGUN]), "only rank 0 records it"
    Coordinator(Communicator(0, 3), store, attempts=store).begins()
    assert resumes((0, 0, 0)), "a machine whose own processes never died counts no restart"


def test_without_a_lasting_store_the_launchers_count_decides(store, clock):
    first, *others = called(store, [0, 1, 2], clock, restarts=(0, 3, 1))
    assert first[1] is True and others == [first] * 2


def test_machines_with_different_numbers_of_processes_are_refused_on_every_rank(store, clock):
    message = "torchrun: machines with 1 and 2 processes; expected the same --nproc-per-node on all"
    assert called(store, [0, 1, 2], clock, local_sizes=(2, 2, 1)) == [message] * 3


def lost(team, wait):
    try:
        wait(team)
    except RankLost as error:
        return str(error)


@pytest.mark.parametrize(
    "wait",
    [
        lambda team: team.first_then_others(lambda: None, "data"),
        lambda team: team.all_at_once(lambda: None, "data"),
        lambda team: team.broadcast_text("files", "mine"),
    ],
    ids=["first", "all", "said"],
)
def test_waiting_for_a_failed_rank_raises_its_error(store, wait):
    last = []

    def work(team):
        if team.ranks.is_first:
            with pytest.raises(InputError), team.living():
                raise InputError("part-7.parquet: row 3 is wrong")
            last.append("first")
            return None
        time.sleep(0.3 * team.ranks.rank)
        with pytest.raises(RankLost) as caught, team.living():
            try:
                wait(team)
            finally:
                last.append("other")
        return str(caught.value)

    first, *others = together(store, work)
    assert first is None and last == ["other", "other", "first"], "rank 0 leaves last, because it may own the store"
    assert all("(rank 0 has failed: part-7.parquet: row 3 is wrong)" in said for said in others), others
    assert "rank 1 has failed" not in others[1], "a rank that only received the error is not a cause"


def test_a_busy_rank_is_awaited_and_a_silent_one_is_not(store):
    began = threading.Barrier(3)

    def work(silent):
        def wait(team):
            team = Coordinator(team.ranks, team.store, patience=1.0)
            with contextlib.ExitStack() as stack:
                if team.ranks.rank != silent:
                    stack.enter_context(team.living())
                began.wait()
                if team.ranks.is_first:
                    time.sleep(2.2)
                    if silent == 0:
                        return None
                return lost(team, lambda team: team.first_then_others(lambda: None, "data"))

        return wait

    assert together(store, work(None)) == [None] * 3
    first, *others = together(dist.PrefixStore("again", store), work(0))
    assert first is None and all("rank 0 has not been heard from for 1 s" in said for said in others)


def test_a_suspended_process_gives_the_others_time_to_send_heartbeats(store, monkeypatch):
    """Processes are suspended together and resumed later: the clock has advanced, but none counts as silent."""
    hours = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + hours[0], sleep=time.sleep)
    monkeypatch.setattr(team_module, "time", clock)
    first, other = (Coordinator(Communicator(rank, 2), store, patience=60.0) for rank in range(2))
    said = []
    waiting = threading.Thread(target=lambda: said.append(lost(other, lambda t: t._wait_for(["data"]))))
    waiting.start()
    for _ in range(3):
        waiting.join(0.3)
        hours[0] += 3600.0
    waiting.join(0.3)
    first.store.set("data", "done")
    waiting.join(60)
    assert said == [None]


def test_all_ranks_work_at_the_same_time_and_wait_for_each_other(store):
    inside, done = threading.Barrier(3), []

    def make():
        inside.wait(30)  # would break if one came after another
        done.append(1)
        return len(done)

    def work(team):
        made = team.all_at_once(make, "data")
        assert len(done) == 3, "no rank continues before all have finished"
        return made

    assert sorted(together(store, work)) == [1, 2, 3]


def test_sigterm_ends_a_rank_in_order_with_one_message():
    """As torchrun sends it to the other ranks when one has died."""
    before, left = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(RankLost) as lost, launch._reporting_sigterm(Launch(1, 2)):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not stop the cleaning up
            left.append("cleaned up")
    assert str(lost.value).startswith("rank 1 of 2: ended by SIGTERM, ") and "\n" not in str(lost.value)
    assert left == ["cleaned up"] and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(KeyboardInterrupt), launch._reporting_sigterm(Launch(1, 2)):
        signal.raise_signal(signal.SIGINT)  # is not reported as SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_rank_gets_the_value_of_rank_0(store):
    assert together(store, lambda team: team.broadcast_text("files", f"rank {team.ranks.rank}")) == ["rank 0"] * 3
    assert Coordinator(Communicator()).broadcast_text("files", "mine") == "mine"
    assert Coordinator(Communicator()).all_at_once(lambda: 5, "data") == 5


def test_a_folder_that_not_all_ranks_share_is_refused_on_every_rank(store, tmp_path):
    places = [tmp_path / name / "run" for name in ("shared", "other")]
    for place in places:
        place.mkdir(parents=True)

    def work(apart):
        def ask(team):
            try:
                team.require_shared(places[team.ranks.rank == apart], patience=0.5)
            except InputError as error:
                return str(error)

        return ask

    assert together(store, work(None)) == [None] * 3
    said = (
        "rank 2 does not see the files that rank 0 writes there; use a folder on a file system that all machines share"
    )
    assert together(dist.PrefixStore("again", store), work(2)) == [f"{places[rank == 2]}: {said}" for rank in range(3)]
    assert not any(list(place.iterdir()) for place in places), "no mark file remains"
    Coordinator(Communicator()).require_shared(tmp_path / "nowhere")


class Watched(np.ndarray):
    """An array that records which values were read."""

    def __getitem__(self, at):
        self.read.update(np.asarray(at).reshape(-1).tolist())
        return np.asarray(super().__getitem__(at))

    def take(self, at, mode="raise"):
        self.read.update(np.clip(at, 0, len(self) - 1).reshape(-1).tolist())
        return np.asarray(self).take(at, mode=mode)


def test_a_rank_reads_only_its_own_rows_of_the_prepared_data(planted_data):
    whole = list(TrainingBatches(planted_data, 64, seed=3))
    codes = planted_data.item_codes
    touched = []
    for rank in range(2):
        watched = np.asarray(codes).view(Watched)
        watched.read = set()
        planted_data.item_codes = watched
        try:
            batches = list(TrainingBatches(planted_data, 64, history_length=2, seed=3, ranks=Communicator(rank, 2)))
        finally:
            planted_data.item_codes = codes
        own = set()
        for batch, all_rows in zip(batches, whole, strict=True):
            assert batch.rows.tolist() == all_rows.rows.tolist()[Communicator(rank, 2).part(64)], (
                "same order as one process"
            )
            own |= set(batch.rows.tolist())
        histories = {max(row - back, 0) for row in own for back in (1, 2)}
        assert own <= watched.read <= own | histories
        touched.append(own)
    assert not touched[0] & touched[1]
