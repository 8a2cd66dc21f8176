"""Several processes become the ranks of one run: what torchrun tells each of them, and how they join."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twotower.errors import InputError

if TYPE_CHECKING:
    from twotower.ranks import Ranks

T = TypeVar("T")

#: The first rank may prepare data for so long before the others give up.
PREPARATION = timedelta(days=2)


@dataclass(frozen=True)
class Launch:
    """What the environment says of this process.

    Attributes:
        rank: number of this process among all, from 0.
        size: processes in all; 1 where nobody started several.
        local_size: processes on this machine.
        local_rank: number among them.
        restarts: how often torchrun on this machine has started its processes anew. That on another machine may have
            another number.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @classmethod
    def of_environment(cls) -> Launch:
        """From the variables that torchrun sets; a process alone where it did not start this one."""
        told = os.environ
        if "RANK" not in told or "WORLD_SIZE" not in told:
            return cls()
        return cls(
            rank=int(told["RANK"]),
            size=int(told["WORLD_SIZE"]),
            local_size=int(told.get("LOCAL_WORLD_SIZE", told["WORLD_SIZE"])),
            local_rank=int(told.get("LOCAL_RANK", told["RANK"])),
            restarts=int(told.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines in all."""
        return max(self.size // self.local_size, 1)


@dataclass(frozen=True)
class Team:
    """The processes of a run, joined.

    Attributes:
        ranks: what they exchange numbers by.
        store: what they tell each other outside of exchanges; None for a process alone.
        restarts: how often all processes have been started anew; the same number on every rank.
    """

    ranks: Ranks
    store: Any = None
    restarts: int = 0

    def first_then_others(self, make: Callable[[], T], what: str) -> T:
        """`make()` on the first rank, then on the others: what it leaves in a cache is made once.

        The others wait without an exchange, which would time out while the first is still at work.
        """
        if self.ranks.is_first or self.store is None:
            made = make()
            if self.store is not None:
                self.store.set(what, "done")
            return made
        self.store.wait([what], PREPARATION)
        return make()

    def all_at_once(self, make: Callable[[], T], what: str) -> T:
        """`make()` on every rank at the same moment, for work that they share; returns when all have done it.

        The others are waited for without an exchange, as in `first_then_others`.
        """
        made = make()
        if self.store is not None:
            self.store.set(f"{what} {self.ranks.rank}", "done")
            self.store.wait([f"{what} {rank}" for rank in range(self.ranks.size)], PREPARATION)
        return made

    def said_by_first(self, what: str, here: str) -> str:
        """What the first rank says; `here` is what this one would."""
        if self.store is None:
            return here
        if self.ranks.is_first:
            self.store.set(what, here)
        said: str = self.store.get(what).decode()
        return said

    def require_shared(self, folder: Path, patience: float = 30.0) -> None:
        """Find out whether every rank sees what the first writes into a folder, before hours are spent on it.

        Args:
            folder: is there.
            patience: seconds that a file of the first rank may take to be seen: networks are not always prompt.

        Raises:
            InputError: a rank sees another folder of that name; on every rank.
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
        self.store.set(f"{mark.name} {self.ranks.rank}", str(seen))
        blind = [rank for rank in range(self.ranks.size) if self.store.get(f"{mark.name} {rank}") != b"True"]
        if self.ranks.is_first:
            mark.unlink(missing_ok=True)
        if blind:
            raise InputError(
                f"{folder}: rank {blind[0]} does not find what the first rank writes there; give a folder on a file "
                "system that all machines share"
            )


def called_together(store: Any, told: Launch, patience: float) -> tuple[str, int]:
    """A name for this attempt of all processes that none of the earlier attempts had, and how many those were.

    torchrun keeps one store for all of its attempts, with the addresses and words of processes that are gone, and what
    it counts on several machines need not agree. So each process brings a word that nobody had before. The first reads
    out the words it finds, again whenever one of them is another, and a process that hears its own answers to the name
    of the first. When all words that were read out are answered, nobody of an earlier attempt was among them.

    Args:
        store: a store of torch.distributed that all processes reach.
        told: which of them this one is.
        patience: seconds to wait for the others.

    Raises:
        DistStoreError: not all came.
    """
    import torch.distributed as dist  # noqa: PLC0415  # as in `joined`

    until = time.monotonic() + patience

    def pause(what: str) -> None:
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{what} in {patience:g} s")
        time.sleep(0.02)

    name = uuid.uuid4().hex
    own = f"{name} {told.restarts}"
    places = [f"word of {rank}" for rank in range(told.size)]
    store.set(places[told.rank], own)
    if not told.is_first:
        while True:
            roll = json.loads(store.get("roll")) if store.check(["roll"]) else None
            if roll is not None and own in roll["words"]:
                break
            pause("the first rank did not come")
        name = roll["name"]
        store.set(f"{name} {own}", "here")
        while not store.check([f"{name} restarts"]):
            pause("not all ranks came")
        return name, int(store.get(f"{name} restarts"))
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
        pause("not all ranks came")
    restarts = max(attempts - 1, *(int(word.split()[1]) for word in words))
    store.set(f"{name} restarts", str(restarts))
    return name, restarts


@contextmanager
def joined(*, timeout: int, accelerator: str = "auto") -> Iterator[Team]:
    """Join the other processes that torchrun has started, for as long as the block lasts.

    CPU tensors are exchanged by gloo, those of CUDA devices by NCCL. An exchange that is not answered for `timeout`
    seconds fails on every rank that waits in it.

    Args:
        timeout: seconds.
        accelerator: as in section `training`; anything but "cpu" takes the machine's CUDA devices where it has some.

    Raises:
        InputError: more processes on this machine than it has CUDA devices.
        RankLost: the others did not come, or an exchange in the block has failed.
    """
    from twotower.ranks import Ranks, comes_from_exchange  # noqa: PLC0415  # torch, which the command line loads only where it trains

    told = Launch.of_environment()
    if told.size == 1:
        yield Team(Ranks(), restarts=told.restarts)
        return
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    on_cuda = accelerator != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if told.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun: {told.local_size} processes on this machine, which has {torch.cuda.device_count()} CUDA "
                "devices; expected --nproc_per_node to be that number, or --set training.accelerator=cpu"
            )
        torch.cuda.set_device(told.local_rank)
    patience = timedelta(seconds=timeout)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
        name, restarts = called_together(store, told, timeout)
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # public, and missing in __all__
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=patience
        )
        yield Team(Ranks.current(), dist.PrefixStore("twotower", store), restarts)  # type: ignore[attr-defined]  # as above
    except RuntimeError as error:
        if comes_from_exchange(error):
            raise Ranks(told.rank, told.size).lost(error) from error
        raise
    # Only where nothing failed: with a rank missing, leaving in good order would wait for it.
    dist.destroy_process_group()
