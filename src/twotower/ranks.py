"""The processes of one run, and what they exchange: codes, embeddings with their gradient, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.errors import RankLost

# Newer torch has other names for the same collectives, and warns of the older ones.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Ranks:
    """W processes that train one model, and which of them this one is.

    A process that is alone (`Ranks()`) exchanges nothing, so that nobody has to ask whether there are others. All
    methods but `shares` and `part` are collective: every rank calls them, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: W.
        group: the process group of torch.distributed; None for that of all processes.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def current(cls, group: Any = None) -> Ranks:
        """All processes of torch.distributed where it is set up, or those of a group; otherwise a process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and tells."""
        return self.rank == 0

    def shares(self, total: int) -> list[int]:
        """How many of `total` things each rank takes, W numbers that differ by one at most."""
        return [total // self.size + (rank < total % self.size) for rank in range(self.size)]

    def part(self, total: int) -> slice:
        """The things of this rank, in the order of ranks."""
        return self.within(self.shares(total))

    def within(self, sizes: list[int]) -> slice:
        """Where this rank's rows stand among those of all ranks, in the order of ranks."""
        return slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))

    def sizes(self, count: int, device: torch.device | str = "cpu") -> list[int]:
        """`count` of every rank, W numbers. An accelerator waits for the answer."""
        if self.size == 1:
            return [count]
        found = torch.empty(self.size, dtype=torch.int64, device=device)
        with self.exchange():
            _all_gather(found, torch.tensor([count], device=device), group=self.group)
        numbers: list[int] = found.tolist()
        return numbers

    def gather(self, values: Tensor, sizes: list[int] | None = None) -> Tensor:
        """The rows of all ranks, in the order of ranks, without gradient.

        Args:
            values: [n, ...]; n may differ between ranks, and be 0.
            sizes: n of every rank, where it is known (`sizes`); asked for otherwise.

        Returns:
            [sum of sizes, ...].
        """
        if self.size == 1:
            return values
        sizes = self.sizes(len(values), values.device) if sizes is None else sizes
        most = max(sizes)
        if len(values) < most:
            padding = values.new_zeros(most - len(values), *values.shape[1:])
            values = torch.cat([values, padding])
        every = values.new_empty(self.size * most, *values.shape[1:])
        if most:
            with self.exchange():
                _all_gather(every, values.detach().contiguous(), group=self.group)
        if min(sizes) == most:
            return every
        return torch.cat([every[rank * most : rank * most + size] for rank, size in enumerate(sizes)])

    def gather_with_gradient(self, values: Tensor) -> Tensor:
        """The rows of all ranks, [n, D] of each -> [W n, D]; n is the same for all.

        Backward sums what all ranks' losses give to a row, and hands it to the rank that brought the row
        (reduce-scatter): the gradient is that of the *sum* of the ranks' losses.
        """
        if self.size == 1:
            return values
        every: Tensor = _Gathered.apply(values, self)  # type: ignore[no-untyped-call]
        return every

    def swap(self, values: Tensor, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
        """Rows for every rank, in the order of ranks, against those of every rank for this one; without gradient.

        Args:
            values: [n, ...]; of dtype and further shape that are the same on every rank.
            sent: how many of the n rows go to each rank, W numbers; None: one each.
            received: how many come from each rank, W numbers.

        Returns:
            [sum of received, ...].
        """
        if self.size == 1:
            return values
        found = values.new_empty(len(values) if received is None else sum(received), *values.shape[1:])
        with self.exchange():
            dist.all_to_all_single(found, values.detach().contiguous(), received, sent, group=self.group)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in a new tensor without gradient, the shape of `values`."""
        return self.sum_in_place(values.detach().clone())

    def sum_in_place(self, values: Tensor) -> Tensor:
        """The same, over the values themselves."""
        if self.size > 1:
            with self.exchange():
                dist.all_reduce(values, group=self.group)
        return values

    def agree(self, said: bool) -> bool:  # a question with one answer
        """Whether any rank says so."""
        return said if self.size == 1 else bool(self.sum(torch.tensor([float(said)], device=self.device)) > 0)

    def copy_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors of the same shapes on every rank with those of rank 0."""
        if self.size > 1:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            with self.exchange():
                for tensor in tensors:
                    dist.broadcast(tensor, source, group=self.group)

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.agree(False)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around every exchange: a rank that is gone or does not answer is told as such.

        Raises:
            RankLost: in place of the error of torch.distributed.
        """
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> RankLost:
        """What to tell when torch.distributed has failed."""
        said = " ".join(str(error).split())
        return RankLost(
            f"rank {self.rank} of {self.size}: another rank is gone, or has not answered in time; "
            f"`torchrun --max-restarts` goes on from the last checkpoint ({said[:200]})"
        )

    @property
    def device(self) -> torch.device:
        """Where numbers have to be for this group to exchange them: NCCL knows no other memory than its device's."""
        on_cuda = self.size > 1 and "nccl" in str(dist.get_backend(self.group))
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def comes_from_exchange(error: RuntimeError) -> bool:
    """Whether an error is one of torch.distributed: Lightning has exchanges of its own, which are not wrapped."""
    # gloo raises plain RuntimeErrors, and its sources stand in their text; so do aborted communicators of NCCL.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("/gloo/", "ProcessGroup", "NCCL"))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, len(values)
        every = values.new_empty(ranks.size * len(values), *values.shape[1:])
        if len(values):
            with ranks.exchange():
                _all_gather(every, values.contiguous(), group=ranks.group)
        return every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        if ctx.rows:
            with ctx.ranks.exchange():
                _reduce_scatter(own, grad.contiguous(), group=ctx.ranks.group)
        return own, None
