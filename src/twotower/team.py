"""Coordination of the processes of a run outside of collectives: order, readiness, liveness."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twotower.errors import InputError, RankLost

if TYPE_CHECKING:
    from twotower.ranks import Ranks

T = TypeVar("T")

#: Store key: the error that a process of the run has failed with.
FAILED = "failed"
#: Key in the store of all attempts: set when one of them has begun the run.
BEGUN = "begun"
#: Seconds that rank 0 waits for the others to read its error: the store may disappear with it.
FAREWELL = 5.0
#: Heartbeats that a process sends within the time after which its silence counts as failure.
BEATS = 8


@dataclass(frozen=True)
class Team:
    """The joined processes of a run.

    A collective must be answered within a short timeout. Long work such as preparing data is awaited here instead, for
    as long as it takes, provided that the processes doing it are alive.

    Attributes:
        ranks: for exchanging tensors.
        store: for messages outside of collectives; None for a single process.
        patience: seconds of silence after which a process counts as failed.
        goes_on: whether these processes were restarted after an earlier attempt had begun the run; the same on every
            rank.
        attempts: the store of all attempts; None if nothing restarts processes.
    """

    ranks: Ranks
    store: Any = None
    patience: float = 600.0
    goes_on: bool = False
    attempts: Any = None

    def begins(self) -> None:
        """Record that the run folder now belongs to this run: restarted processes resume from it."""
        if self.attempts is not None and self.ranks.is_first:
            self.attempts.set(BEGUN, "yes")

    def first_then_others(self, make: Callable[[], T], what: str) -> T:
        """Call `make()` on rank 0, then on the others, so that what it caches is made only once.

        Raises:
            RankLost: rank 0 has failed, or is silent.
        """
        if self.ranks.is_first or self.store is None:
            made = make()
            if self.store is not None:
                self.store.set(what, "done")
            return made
        self._wait_for([what])
        return make()

    def all_at_once(self, make: Callable[[], T], what: str) -> T:
        """Call `make()` on every rank at the same time, for shared work; return when all have finished.

        Raises:
            RankLost: a rank has failed, or is silent.
        """
        made = make()
        if self.store is not None:
            self.store.set(f"{what} {self.ranks.rank}", "done")
            self._wait_for([f"{what} {rank}" for rank in range(self.ranks.size)])
        return made

    def said_by_first(self, what: str, here: str) -> str:
        """Return the value of `here` on rank 0.

        Raises:
            RankLost: rank 0 has failed, or is silent.
        """
        if self.store is None:
            return here
        if self.ranks.is_first:
            self.store.set(what, here)
        self._wait_for([what])
        text: str = self.store.get(what).decode()
        return text

    def require_shared(self, folder: Path, patience: float = 30.0) -> None:
        """Check that every rank sees what rank 0 writes into a folder, before hours of work depend on it.

        Args:
            folder: an existing folder.
            patience: seconds until a file of rank 0 must be visible: network file systems can be slow.

        Raises:
            InputError: a rank sees another folder of that name; raised on every rank.
            RankLost: a rank has failed, or is silent.
        """
        if self.store is None:
            return
        mark = folder / f".{uuid.uuid4().hex}.mark"
        if self.ranks.is_first:
            mark.touch()
        mark = folder / self.said_by_first(f"mark in {folder.name}", mark.name)
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
        store = self.store.clone()  # a separate connection: a waiting call blocks all that share one

        def beat() -> None:
            count = 0
            with suppress(RuntimeError):  # the process with the store is gone; the collectives will fail
                while not ended.wait(self.patience / BEATS if count else 0):
                    count += 1
                    store.set(f"beat of {self.ranks.rank}", str(count))

        thread = threading.Thread(target=beat, name="living", daemon=True)
        thread.start()
        try:
            yield
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
            # If this process was suspended, the others may have been too: that does not count as silence.
            passed, looked = min(now - looked, 2 * self.patience / BEATS), now
            for rank in others:
                key = f"beat of {rank}"
                beat = self.store.get(key) if self.store.check([key]) else None
                silent[rank] = silent[rank] + passed if beat == beats[rank] else 0.0
                beats[rank] = beat
                if silent[rank] > self.patience:
                    silence = f"rank {rank} has not been heard of for {self.patience:g} s"
                    raise self.ranks.lost(dist.DistStoreError(silence))
