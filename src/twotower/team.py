"""The processes of a run beside their exchanges: who is first, who is ready, who still lives."""

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

#: In the store: what a process of the run has failed with.
FAILED = "failed"
#: In the store of all attempts: that one of them has begun the run.
BEGUN = "begun"
#: Seconds that the first rank stays for the others to hear what it has failed with: the store may go with it.
FAREWELL = 5.0
#: A process says so many times that it lives before its silence counts.
BEATS = 8


@dataclass(frozen=True)
class Team:
    """The processes of a run, joined.

    An exchange has to be answered in a short time. What takes long, such as preparing data, is waited for here: as long
    as it takes, while those who are at work live.

    Attributes:
        ranks: what they exchange numbers by.
        store: what they tell each other outside of exchanges; None for a process alone.
        patience: seconds after which a process that says nothing is given up.
        goes_on: whether these processes have been started anew after an earlier attempt had begun the run; the same on
            every rank.
        attempts: the store of all attempts; None where nobody starts processes anew.
    """

    ranks: Ranks
    store: Any = None
    patience: float = 600.0
    goes_on: bool = False
    attempts: Any = None

    def begins(self) -> None:
        """From here on the run folder is that of this run: processes that are started anew go on with what is in it."""
        if self.attempts is not None and self.ranks.is_first:
            self.attempts.set(BEGUN, "yes")

    def first_then_others(self, make: Callable[[], T], what: str) -> T:
        """`make()` on the first rank, then on the others: what it leaves in a cache is made once.

        Raises:
            RankLost: the first has failed, or is not heard of.
        """
        if self.ranks.is_first or self.store is None:
            made = make()
            if self.store is not None:
                self.store.set(what, "done")
            return made
        self._wait_for([what])
        return make()

    def all_at_once(self, make: Callable[[], T], what: str) -> T:
        """`make()` on every rank at the same moment, for work that they share; returns when all have done it.

        Raises:
            RankLost: a rank has failed, or is not heard of.
        """
        made = make()
        if self.store is not None:
            self.store.set(f"{what} {self.ranks.rank}", "done")
            self._wait_for([f"{what} {rank}" for rank in range(self.ranks.size)])
        return made

    def said_by_first(self, what: str, here: str) -> str:
        """What the first rank says; `here` is what this one would.

        Raises:
            RankLost: the first has failed, or is not heard of.
        """
        if self.store is None:
            return here
        if self.ranks.is_first:
            self.store.set(what, here)
        self._wait_for([what])
        said: str = self.store.get(what).decode()
        return said

    def require_shared(self, folder: Path, patience: float = 30.0) -> None:
        """Find out whether every rank sees what the first writes into a folder, before hours are spent on it.

        Args:
            folder: is there.
            patience: seconds that a file of the first rank may take to be seen: networks are not always prompt.

        Raises:
            InputError: a rank sees another folder of that name; on every rank.
            RankLost: a rank has failed, or is not heard of.
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
                f"{folder}: rank {blind[0]} does not find what the first rank writes there; give a folder on a file "
                "system that all machines share"
            )

    @contextmanager
    def living(self) -> Iterator[None]:
        """Say to the others that this process lives, as long as the block lasts; or what it has failed with."""
        if self.store is None:
            yield
            return
        ended = threading.Event()
        store = self.store.clone()  # a connection of its own: one that waits for an answer holds up all who share it

        def beat() -> None:
            count = 0
            with suppress(RuntimeError):  # whoever keeps the store is gone; the exchanges will tell
                while not ended.wait(self.patience / BEATS if count else 0):
                    count += 1
                    store.set(f"beat of {self.ranks.rank}", str(count))

        thread = threading.Thread(target=beat, name="living", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):
                told = f"rank {self.ranks.rank} has failed: {error or type(error).__name__}"
                self.store.compare_set(FAILED, "", told)  # what came first is the reason
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
        """Return when all keys are in the store."""
        import torch.distributed as dist  # noqa: PLC0415  # torch, which the command line loads only where it trains

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
            # Where this process stood still in between, so did the others, perhaps: that is no silence of theirs.
            passed, looked = min(now - looked, 2 * self.patience / BEATS), now
            for rank in others:
                key = f"beat of {rank}"
                beat = self.store.get(key) if self.store.check([key]) else None
                silent[rank] = silent[rank] + passed if beat == beats[rank] else 0.0
                beats[rank] = beat
                if silent[rank] > self.patience:
                    silence = f"rank {rank} has not been heard of for {self.patience:g} s"
                    raise self.ranks.lost(dist.DistStoreError(silence))
