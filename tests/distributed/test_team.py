"""What ranks tell each other outside of exchanges, and which rows each of them touches."""

import threading
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist

from twotower.data import TrainingBatches
from twotower.errors import InputError
from twotower.launch import Launch, Team, called_together
from twotower.ranks import Ranks


@pytest.fixture
def store(tmp_path):
    made = dist.FileStore(str(tmp_path / "store"), 3)
    made.set_timeout(timedelta(seconds=60))
    return made


def together(store, work):
    """`work(team)` on three ranks, threads of this process; what each gave."""
    gave = [None] * 3
    threads = [
        threading.Thread(target=lambda r=rank: gave.__setitem__(r, work(Team(Ranks(r, 3), store)))) for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return gave


def called(store, ranks, restarts=(0, 0, 0), patience=20.0):
    """What `called_together` gives on some of three ranks, which come one after another; an error as its text."""
    gave = {}

    def come(rank):
        told = Launch(rank, 3, local_size=1, restarts=restarts[rank])
        try:
            gave[rank] = called_together(store, told, patience)
        except dist.DistStoreError as error:
            gave[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        thread.join(0.1)  # a head start, for those that come late to find what was said
    for thread in threads:
        thread.join(60)
    return [gave[rank] for rank in sorted(gave)]


def test_an_attempt_has_a_name_of_its_own_also_after_one_that_not_all_lived_to_see(store):
    alone = {False: "the first rank did not come in 0.5 s", True: "not all ranks came in 0.5 s"}
    names = []
    for coming, restarts in (([0, 1, 2], 0), ([1, 2], None), ([2, 1, 0], 1), ([0, 1], None), ([1, 0, 2], 3)):
        gave = called(store, coming, patience=20.0 if len(coming) == 3 else 0.5)
        if len(coming) < 3:  # what they have said stays in the store
            assert gave == [alone[0 in coming]] * 2
            continue
        assert gave == [(gave[0][0], restarts)] * 3
        names.append(gave[0][0])
    assert len(set(names)) == 3


def test_a_machine_that_was_started_anew_tells_all_of_its_restarts(store):
    first, *others = called(store, [0, 1, 2], restarts=(0, 3, 1))
    assert first[1] == 3 and others == [first] * 2


def test_all_make_it_at_the_same_moment_and_wait_for_each_other(store):
    inside, done = threading.Barrier(3), []

    def make():
        inside.wait(30)  # would break if one came after another
        done.append(1)
        return len(done)

    def work(team):
        made = team.all_at_once(make, "data")
        assert len(done) == 3, "nobody goes on before all have done it"
        return made

    assert sorted(together(store, work)) == [1, 2, 3]


def test_everybody_hears_the_first(store):
    assert together(store, lambda team: team.said_by_first("files", f"rank {team.ranks.rank}")) == ["rank 0"] * 3
    assert Team(Ranks()).said_by_first("files", "mine") == "mine"
    assert Team(Ranks()).all_at_once(lambda: 5, "data") == 5


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
        "rank 2 does not find what the first rank writes there; give a folder on a file system that all machines share"
    )
    assert together(dist.PrefixStore("again", store), work(2)) == [f"{places[rank == 2]}: {said}" for rank in range(3)]
    assert not any(list(place.iterdir()) for place in places), "no mark is left"
    Team(Ranks()).require_shared(tmp_path / "nowhere")


class Watched(np.ndarray):
    """Remembers which of its values were read."""

    def __getitem__(self, at):
        self.read.update(np.asarray(at).reshape(-1).tolist())
        return np.asarray(super().__getitem__(at))

    def take(self, at, mode="raise"):
        self.read.update(np.clip(at, 0, len(self) - 1).reshape(-1).tolist())
        return np.asarray(self).take(at, mode=mode)


def test_a_rank_reads_its_own_rows_of_the_prepared_data_and_no_others(planted_data):
    whole = list(TrainingBatches(planted_data, 64, seed=3))
    codes = planted_data.item_codes
    touched = []
    for rank in range(2):
        watched = np.asarray(codes).view(Watched)
        watched.read = set()
        planted_data.item_codes = watched
        try:
            batches = list(TrainingBatches(planted_data, 64, history_length=2, seed=3, ranks=Ranks(rank, 2)))
        finally:
            planted_data.item_codes = codes
        own = set()
        for batch, all_rows in zip(batches, whole, strict=True):
            assert batch.rows.tolist() == all_rows.rows.tolist()[Ranks(rank, 2).part(64)], "the order is that of one"
            own |= set(batch.rows.tolist())
        histories = {max(row - back, 0) for row in own for back in (1, 2)}
        assert own <= watched.read <= own | histories
        touched.append(own)
    assert not touched[0] & touched[1]
