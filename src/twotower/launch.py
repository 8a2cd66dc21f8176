"""Several processes become the ranks of one run: what torchrun tells each of them, and how they join."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from twotower.errors import InputError
from twotower.team import BEGUN, Team


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
        is_told: whether somebody has started this process as a rank, be it the only one, and tells where they meet.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    local_rank: int = 0
    restarts: int = 0
    is_told: bool = False

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
            is_told="MASTER_ADDR" in told,
        )

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines in all."""
        return max(self.size // self.local_size, 1)


def called_together(store: Any, told: Launch, patience: float) -> tuple[str, bool]:
    """A name for this attempt of all processes that none of the earlier attempts had, and whether one had begun.

    torchrun keeps one store for all of its attempts, with the addresses and words of processes that are gone, and what
    it counts on several machines need not agree. So each process brings a word that nobody had before. The first reads
    out the words it finds, again whenever one of them is another, and a process that hears its own answers to the name
    of the first. When all words that were read out are answered, nobody of an earlier attempt was among them.

    Args:
        store: a store of torch.distributed that all processes reach.
        told: which of them this one is.
        patience: seconds to wait for the others.

    Returns:
        The name, and whether an earlier attempt got as far as `Team.begins`. Where the store does not outlive an
        attempt it cannot know; then the launcher's count of restarts says it.

    Raises:
        DistStoreError: not all came.
        InputError: the machines have different numbers of processes; on every rank.
    """
    import torch.distributed as dist  # noqa: PLC0415  # as in `joined`

    until = time.monotonic() + patience

    def pause(what: str) -> None:
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{what} in {patience:g} s")
        time.sleep(0.02)

    name = uuid.uuid4().hex
    own = f"{name} {told.restarts} {told.local_size}"
    places = [f"word of {rank}" for rank in range(told.size)]
    store.set(places[told.rank], own)
    if told.is_first:
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
        restarts, sizes = ({int(word.split()[place]) for word in words} for place in (1, 2))
        goes_on = store.check([BEGUN]) if attempts > 1 else max(restarts) > 0
        store.set(f"{name} agreed", json.dumps({"goes on": goes_on, "sizes": sorted(sizes)}))
    else:
        while True:
            roll = json.loads(store.get("roll")) if store.check(["roll"]) else None
            if roll is not None and own in roll["words"]:
                break
            pause("the first rank did not come")
        name = roll["name"]
        store.set(f"{name} {own}", "here")
        while not store.check([f"{name} agreed"]):
            pause("not all ranks came")
    agreed = json.loads(store.get(f"{name} agreed"))
    if len(agreed["sizes"]) > 1:
        counts = " and ".join(map(str, agreed["sizes"]))
        raise InputError(f"torchrun: machines with {counts} processes; expected the same --nproc-per-node on each")
    return name, agreed["goes on"]


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
    if told.size == 1 and not told.is_told:
        yield Team(Ranks())
        return
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    on_cuda = accelerator != "cpu" and torch.cuda.is_available()
    if on_cuda and told.size > 1:
        if told.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun: {told.local_size} processes on this machine, which has {torch.cuda.device_count()} CUDA "
                "devices; expected --nproc_per_node to be that number, or --set training.accelerator=cpu"
            )
        torch.cuda.set_device(told.local_rank)
    patience = timedelta(seconds=timeout)
    try:
        attempts, rank, size = next(iter(rendezvous("env://", timeout=patience)))
        name, goes_on = called_together(attempts, told, timeout)
        if size == 1:
            yield Team(Ranks(), goes_on=goes_on, attempts=attempts)
            return
        store = dist.PrefixStore(name, attempts)  # type: ignore[attr-defined]  # public, and missing in __all__
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=patience
        )
        store = dist.PrefixStore("twotower", store)  # type: ignore[attr-defined]  # as above
        team = Team(Ranks.current(), store, float(timeout), goes_on, attempts)
        with team.living():
            yield team
    except RuntimeError as error:
        if comes_from_exchange(error):
            raise Ranks(told.rank, told.size).lost(error) from error
        raise
    # Only where nothing failed: with a rank missing, leaving in good order would wait for it.
    dist.destroy_process_group()
