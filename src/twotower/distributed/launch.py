"""Joining of the processes that torchrun starts as ranks of one run, and coordination outside of collectives.

Through torchrun's store, each process announces that it has joined, is ready, has failed, or is still alive.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from twotower.errors import InputError, RankLost

if TYPE_CHECKING:
    from twotower.distributed.communicator import Communicator


T = TypeVar("T")

#: Store key: the error with which a process of the run has failed.
FAILED = "failed"
#: Key in the store of all attempts: set when an attempt has begun the run.
BEGUN = "begun"
#: Seconds that rank 0 waits for the other ranks to read its last message, because the store may disappear with rank 0.
FAREWELL = 5.0
#: Number of heartbeats that a process sends within the time after which silence counts as failure.
BEATS = 8


@dataclass(frozen=True)
class Coordinator:
    """The joined processes of a run.

    A collective must finish within a short timeout. Long work, such as preparing data, is awaited here instead,
    without a time limit, as long as the working processes are alive.

    Attributes:
        ranks: the processes, for exchanging tensors.
        store: the store for messages outside of collectives; None for a single process.
        patience: seconds of silence after which a process counts as failed.
        resumes: whether these processes were restarted after an earlier attempt had begun the run; equal on all ranks.
        attempts: the store that all attempts share; None without a launcher that restarts processes.

    All ranks must call the methods with an argument `what`, a name for the work, in the same order.
    """

    ranks: Communicator
    store: Any = None
    patience: float = 600.0
    resumes: bool = False
    attempts: Any = None
    _uses: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begins(self) -> None:
        """Record that the run folder now belongs to this run, so that restarted processes resume from it."""
        if self.attempts is not None and self.ranks.is_first:
            self.attempts.set(BEGUN, "yes")

    def first_then_others(self, make: Callable[[], T], what: str) -> T:
        """Call `make()` on rank 0, then on the other ranks, so that cached results are computed only once.

        Raises:
            RankLost: rank 0 has failed or is silent.
        """
        if self.store is None:
            return make()
        key = self._key(what)
        if self.ranks.is_first:
            made = make()
            self.store.set(key, "done")
            return made
        self._wait_for([key])
        return make()

    def all_at_once(self, make: Callable[[], T], what: str) -> T:
        """Call `make()` on every rank at the same time, for shared work; return when all ranks have finished.

        Raises:
            RankLost: a rank has failed or is silent.
        """
        made = make()
        if self.store is not None:
            key = self._key(what)
            self.store.set(f"{key} {self.ranks.rank}", "done")
            self._wait_for([f"{key} {rank}" for rank in range(self.ranks.size)])
        return made

    def broadcast_text(self, what: str, here: str) -> str:
        """Return rank 0's value of `here` on every rank.

        Raises:
            RankLost: rank 0 has failed or is silent.
        """
        if self.store is None:
            return here
        key = self._key(what)
        if self.ranks.is_first:
            self.store.set(key, here)
        self._wait_for([key])
        text: str = self.store.get(key).decode()
        return text

    def _key(self, what: str) -> str:
        """Return the store key for this use of `what`: a command may use one name several times, such as "data"."""
        self._uses[what] = self._uses.get(what, 0) + 1
        return f"{what}, use {self._uses[what]}"

    def require_shared(self, folder: Path, patience: float = 30.0) -> None:
        """Check that every rank sees the files that rank 0 writes to a folder, before hours of work depend on them.

        Args:
            folder: an existing folder.
            patience: seconds until a file of rank 0 must be visible; network file systems can be slow.

        Raises:
            InputError: a rank sees a different folder with that name; raised on every rank.
            RankLost: a rank has failed or is silent.
        """
        if self.store is None:
            return
        mark = folder / f".{uuid.uuid4().hex}.mark"
        if self.ranks.is_first:
            mark.touch()
        mark = folder / self.broadcast_text(f"mark in {folder.name}", mark.name)
        until = time.monotonic() + patience
        while not (seen := mark.exists()) and time.monotonic() < until:
            time.sleep(0.1)
        answers = [f"{mark.name} {rank}" for rank in range(self.ranks.size)]
        self.store.set(answers[self.ranks.rank], str(seen))
        self._wait_for(answers)
        blind = [rank for rank, answer in enumerate(answers) if self.store.get(answer) != b"True"]
        if self.ranks.is_first:
            mark.unlink(missing_ok=True)
        if blind:
            raise InputError(
                f"{folder}: rank {blind[0]} does not see the files that rank 0 writes there; use a folder on a file "
                "system that all machines share"
            )

    @contextmanager
    def living(self) -> Iterator[None]:
        """Send heartbeats to the other processes during the block, and report an error that ends it."""
        if self.store is None:
            yield
            return
        ended = threading.Event()
        store = self.store.clone()  # a separate connection, because a waiting call blocks all users of its connection

        def beat() -> None:
            count = 0
            with suppress(RuntimeError):  # the process with the store has ended; the collectives will fail
                while not ended.wait(self.patience / BEATS if count else 0):
                    count += 1
                    store.set(f"beat of {self.ranks.rank}", str(count))

        thread = threading.Thread(target=beat, name="living", daemon=True)
        thread.start()
        try:
            yield
            if self.ranks.is_first:
                with suppress(RuntimeError):
                    self._stay_until_heard()  # the others may not have read its last message
        except BaseException as error:
            with suppress(RuntimeError):
                message = f"rank {self.ranks.rank} has failed: {error or type(error).__name__}"
                self.store.compare_set(FAILED, "", message)  # the first error is the cause
                if self.ranks.is_first and isinstance(error, Exception) and not isinstance(error, RankLost):
                    self._stay_until_heard()
            raise
        finally:
            with suppress(RuntimeError):
                self.store.set(f"left {self.ranks.rank}", "yes")
            ended.set()
            thread.join(self.patience / BEATS)

    def _stay_until_heard(self) -> None:
        others = [f"left {rank}" for rank in range(self.ranks.size) if rank != self.ranks.rank]
        until = time.monotonic() + min(FAREWELL, self.patience)
        while not self.store.check(others) and time.monotonic() < until:
            time.sleep(0.02)

    def _wait_for(self, keys: list[str]) -> None:
        """Wait until all keys are in the store."""
        import torch.distributed as dist  # noqa: PLC0415  # loads torch, which the CLI imports only to train

        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        beats: dict[int, bytes | None] = dict.fromkeys(others)
        silent = dict.fromkeys(others, 0.0)
        looked = began = time.monotonic()
        while not self.store.check(keys):
            time.sleep(0.02 if time.monotonic() < began + 1 else 0.2)
            if self.store.check([FAILED]):
                raise self.ranks.lost(dist.DistStoreError(self.store.get(FAILED).decode()))
            if (now := time.monotonic()) < looked + self.patience / BEATS:
                continue
            # If this process was suspended, the others may have been too; this time does not count as silence.
            passed, looked = min(now - looked, 2 * self.patience / BEATS), now
            for rank in others:
                key = f"beat of {rank}"
                beat = self.store.get(key) if self.store.check([key]) else None
                silent[rank] = silent[rank] + passed if beat == beats[rank] else 0.0
                beats[rank] = beat
                if silent[rank] > self.patience:
                    silence = f"rank {rank} has not been heard from for {self.patience:g} s"
                    raise self.ranks.lost(dist.DistStoreError(silence))


@dataclass(frozen=True)
class Launch:
    """The launch of this process, from torchrun's environment variables.

    Attributes:
        rank: number of this process among all processes, from 0.
        size: number of processes; 1 without torchrun.
        local_size: number of processes on this machine.
        local_rank: number of this process on this machine.
        restarts: number of times torchrun has restarted the processes of this machine; may differ between machines.
        is_rank: whether a launcher started this process as a rank, possibly the only one, with a rendezvous address.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    local_rank: int = 0
    restarts: int = 0
    is_rank: bool = False

    @classmethod
    def of_environment(cls) -> Launch:
        """Read the variables set by torchrun; if they are not set, return the launch of a single process."""
        env = os.environ
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return cls()
        return cls(
            rank=int(env["RANK"]),
            size=int(env["WORLD_SIZE"]),
            local_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            is_rank="MASTER_ADDR" in env,
        )

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """The number of machines."""
        return max(self.size // self.local_size, 1)


def called_together(store: Any, launch: Launch, patience: float) -> tuple[str, bool]:
    """Agree with all processes on a unique name for this attempt, and on whether an earlier attempt began the run.

    torchrun keeps one store for all attempts, including the keys of processes that have ended, and restart counts may
    differ between machines. So each process publishes a unique word. Rank 0 publishes the list of these words (the
    roll), and publishes it again whenever a word changes. A process that finds its own word in the roll confirms it
    under the name of rank 0. When all words of the roll are confirmed, it contains no process of an earlier attempt.

    Args:
        store: a store of torch.distributed that all processes can reach.
        launch: the launch of this process.
        patience: seconds to wait for the other processes.

    Returns:
        The name, and whether an earlier attempt reached `Coordinator.begins`. If the store does not outlive an
        attempt, the launcher's restart count decides instead.

    Raises:
        DistStoreError: not all processes joined.
        InputError: the machines have different numbers of processes; raised on every rank.
    """
    import torch.distributed as dist  # noqa: PLC0415  # as in `joined_processes`

    until = time.monotonic() + patience

    def pause(what: str) -> None:
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{what} within {patience:g} s")
        time.sleep(0.02)

    name = uuid.uuid4().hex
    own = f"{name} {launch.restarts} {launch.local_size}"
    places = [f"word of {rank}" for rank in range(launch.size)]
    store.set(places[launch.rank], own)
    if launch.is_first:
        attempts = store.add("attempts of the first rank", 1)
        store.set(f"{name} {own}", "here")
        read: list[str] = []
        while True:
            if store.check(places):
                words = [word.decode() for word in store.multi_get(places)]
                if words != read:
                    store.set("roll", json.dumps({"name": name, "words": words}))
                    read = words
                elif store.check([f"{name} {word}" for word in words]):
                    break
            pause("not all ranks joined")
        restarts, sizes = ({int(word.split()[place]) for word in words} for place in (1, 2))
        resumes = store.check([BEGUN]) if attempts > 1 else max(restarts) > 0
        store.set(f"{name} agreed", json.dumps({"resumes": resumes, "sizes": sorted(sizes)}))
    else:
        while True:
            roll = json.loads(store.get("roll")) if store.check(["roll"]) else None
            if roll is not None and own in roll["words"]:
                break
            pause("rank 0 did not join")
        name = roll["name"]
        store.set(f"{name} {own}", "here")
        while not store.check([f"{name} agreed"]):
            pause("not all ranks joined")
    agreed = json.loads(store.get(f"{name} agreed"))
    if len(agreed["sizes"]) > 1:
        counts = " and ".join(map(str, agreed["sizes"]))
        raise InputError(f"torchrun: machines with {counts} processes; expected the same --nproc-per-node on all")
    return name, agreed["resumes"]


@contextmanager
def _reporting_sigterm(launch: Launch) -> Iterator[None]:
    """End the block cleanly on SIGTERM, so that it leaves no partial files, and report why.

    When a rank has died, torchrun sends SIGTERM to the other ranks of that machine within a tenth of a second, often
    before they wait for the dead rank in an exchange.

    Raises:
        RankLost: SIGTERM was received.
    """
    received = False

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        nonlocal received
        received = True
        signal.signal(number, signal.SIG_IGN)  # once
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if not received:
            raise
        raise RankLost(
            f"rank {launch.rank} of {launch.size}: ended by SIGTERM, which torchrun sends when another rank is gone; "
            "`torchrun --max-restarts` restarts all ranks from what they have saved"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def joined_processes(*, timeout: int, accelerator: str = "auto") -> Iterator[Coordinator]:
    """Join the processes started by torchrun for the duration of the block.

    CPU tensors are exchanged by gloo, CUDA tensors by NCCL. A collective that does not finish within `timeout` seconds
    fails on every waiting rank.

    Args:
        timeout: time limit in seconds.
        accelerator: as in section `training`; any value except "cpu" uses the machine's CUDA devices, if any.

    Raises:
        InputError: this machine has more processes than CUDA devices, or machines have different numbers of processes.
        RankLost: other processes did not join, a collective in the block has failed, or SIGTERM was received.
    """
    from twotower.distributed.communicator import Communicator, comes_from_exchange  # noqa: PLC0415  # loads torch, which the CLI imports only to train

    launch = Launch.of_environment()
    if launch.size == 1 and not launch.is_rank:
        yield Coordinator(Communicator())
        return
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    on_cuda = accelerator != "cpu" and torch.cuda.is_available()
    if on_cuda and launch.size > 1:
        if launch.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun: {launch.local_size} processes on this machine, which has {torch.cuda.device_count()} CUDA "
                "devices; use that number as --nproc_per_node, or --set training.accelerator=cpu"
            )
        torch.cuda.set_device(launch.local_rank)
    patience = timedelta(seconds=timeout)
    try:
        attempts, rank, size = next(iter(rendezvous("env://", timeout=patience)))
        name, resumes = called_together(attempts, launch, timeout)
        if size == 1:
            yield Coordinator(Communicator(), resumes=resumes, attempts=attempts)
            return
        store = dist.PrefixStore(name, attempts)  # type: ignore[attr-defined]  # public, but missing in __all__
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=patience
        )
        store = dist.PrefixStore("twotower", store)  # type: ignore[attr-defined]  # as above
        team = Coordinator(Communicator.current(), store, float(timeout), resumes, attempts)
        with _reporting_sigterm(launch), team.living():
            yield team
    except RuntimeError as error:
        if comes_from_exchange(error):
            raise Communicator(launch.rank, launch.size).lost(error) from error
        raise
    # Only without a failure: an orderly shutdown would wait for a missing rank.
    dist.destroy_process_group()
